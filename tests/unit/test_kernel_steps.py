# SPDX-License-Identifier: Apache-2.0
"""Kernels one after the other: pairs in one pass, results in the room of what nobody reads any more, shared rows."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdbev_ros.engine.convolution import Convolution, PreparedConvolution
from qdbev_ros.engine.kernel_steps import Buffers, ChainStep, ConvolutionStep, Values, chained
from qdbev_ros.engine.native import Team
from tests.unit.test_convolution import SIGNED, UNSIGNED, convolution, kernel, made_codes, plain

SIDES = (2, 13, 11)


def summed_and_behind() -> tuple[Convolution, Convolution]:
    """A 3x3 convolution with a shortcut, and a 1x1 of what comes out."""
    first = convolution(64, 128, (UNSIGNED, SIGNED), 1, with_shortcut=True)
    second = convolution(128, 64, (UNSIGNED, UNSIGNED), 2, (1, 1, 0))
    return first, replace(second, codes="result", output="behind")


def steps(*convolutions: Convolution, threads: int = 1) -> list[ConvolutionStep]:
    return [ConvolutionStep(PreparedConvolution(c, kernel(threads))) for c in convolutions]


def tensors(c: Convolution) -> Values:
    other = np.random.default_rng(3).integers(96, 160, (*SIDES, 128)).astype(np.uint8)
    arrays = {"codes": made_codes(c, SIDES, 4), "other": other}
    return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_pair_in_one_pass_puts_out_what_the_two_put_out(threads: int) -> None:
    pair = summed_and_behind()
    apart, together, buffers = tensors(pair[0]), tensors(pair[0]), Buffers()
    for step in steps(*pair):
        apart[step.output] = step(apart, buffers)
    (chain,) = chained(steps(*pair, threads=threads))
    assert isinstance(chain, ChainStep)
    together[chain.output] = chain(together, Buffers())
    for name in ("result", "behind"):
        np.testing.assert_array_equal(together[name].numpy(), apart[name].numpy())


def test_only_1x1_convolutions_of_the_very_result_go_with_another() -> None:
    first, second = summed_and_behind()
    wide = replace(convolution(128, 64, (UNSIGNED, UNSIGNED), 2), codes="result", output="behind")
    large = convolution(1024, 1024, (UNSIGNED, UNSIGNED), 0, (1, 1, 0))
    for other in (
        wide,
        replace(second, codes="other"),
        replace(second, stride=2),
        replace(second, shortcut=first.shortcut),
    ):
        assert len(chained(steps(first, other))) == 2
    assert len(chained(steps(large, replace(large, codes="result", output="behind")))) == 2, "too large"


def test_a_sum_may_lie_where_its_shortcut_was() -> None:
    first, second = summed_and_behind()
    buffers, values = Buffers(), tensors(first)
    wanted = plain(first, values["codes"].numpy(), values["other"].numpy())
    for pair in (steps(first), chained(steps(first, second))):
        (step,) = pair
        own = step.first if isinstance(step, ChainStep) else step
        assert isinstance(own, ConvolutionStep)
        own.overwrites = True
        for _ in range(2):  # two frames
            room = buffers.take("other", [*SIDES, 128], np.uint8)
            room.numpy()[:] = values["other"].numpy()
            given = {**values, "other": room}
            made = step(given, buffers)
            result = given["result"] if isinstance(step, ChainStep) else made
            assert result.data_ptr() == room.data_ptr()
            np.testing.assert_array_equal(result.numpy(), wanted)
            buffers.give("result")


def test_a_shortcut_of_somebody_else_is_left_alone() -> None:
    (step,) = steps(summed_and_behind()[0])
    step.overwrites = True
    values = tensors(step.prepared.convolution)
    before = values["other"].numpy().copy()
    step(values, Buffers())
    np.testing.assert_array_equal(values["other"].numpy(), before)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 5000), st.integers(1, 4))
def test_every_row_is_worked_on_once(rows: int, threads: int) -> None:
    seen, lock = np.zeros(rows, np.int64), threading.Lock()

    def work(thread: int, first: int, last: int) -> None:
        assert 0 <= thread < threads
        with lock:
            seen[first:last] += 1

    Team(threads, "test").share(rows, work)
    assert (seen == 1).all()


def test_what_goes_wrong_in_another_thread_is_not_lost() -> None:
    begun = threading.Event()

    def work(thread: int, first: int, last: int) -> None:
        if thread:
            begun.set()
            raise ValueError("no room")
        begun.wait(5)

    with pytest.raises(ValueError, match="no room"):
        Team(2, "test").share(5000, work)
