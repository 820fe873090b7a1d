# SPDX-License-Identifier: Apache-2.0
"""Our convolutions on codes: the plain convolution's codes, to the last one."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdbev_ros.core.errors import EngineError, PackageError
from qdbev_ros.engine.convolution import (
    Convolution,
    ConvolutionKernel,
    Grid,
    MaxPool,
    PreparedConvolution,
    PreparedPool,
    Shortcut,
)
from qdbev_ros.engine.kernel_steps import Buffers, ConvolutionStep
from qdbev_ros.engine.native import KernelError

SIGNED, UNSIGNED, BYTES = Grid(128, 96, 159), Grid(0, 0, 63), Grid(128, 0, 255)
GRIDS = st.sampled_from([SIGNED, UNSIGNED, BYTES])


@cache
def kernel(threads: int) -> ConvolutionKernel:
    try:
        return ConvolutionKernel(threads)
    except KernelError as error:
        pytest.skip(str(error))


def convolution(
    inputs: int,
    outputs: int,
    grids: tuple[Grid, Grid],
    seed: int,
    window: tuple[int, int, int] = (3, 1, 1),
    with_shortcut: bool = False,
) -> Convolution:
    """window: size, stride, padding"""
    random, (size, stride, padding) = np.random.default_rng(seed), window
    own, other = random.uniform(0.2, 1.5, 2).astype(np.float32).tolist()
    return Convolution(
        "codes",
        "result",
        random.integers(-8, 8, (outputs, inputs, size, size)).astype(np.int8),
        random.integers(-3000, 3000, outputs).astype(np.int32),
        (random.uniform(0.2, 2.0, outputs) * 0.02 / np.sqrt(inputs) / size).astype(np.float32),
        stride,
        padding,
        *grids,
        Shortcut("other", 128, other, own, UNSIGNED) if with_shortcut else None,
    )


def made_codes(c: Convolution, sides: tuple[int, int, int], seed: int) -> np.ndarray:
    shape = (*sides, c.weights.shape[1])
    random = np.random.default_rng(seed)
    return random.integers(c.source.low, c.source.high + 1, shape).astype(np.uint8)


def cut_off(numbers: np.ndarray, grid: Grid) -> np.ndarray:
    return np.clip(np.rint(numbers), grid.low - grid.zero, grid.high - grid.zero)


def plain(c: Convolution, codes: np.ndarray, other: np.ndarray | None = None) -> np.ndarray:
    """The definition, in numpy: sums over shifted pictures, one rounding to even, the shortcut, one more."""
    size, p = c.weights.shape[2], c.padding
    values = np.pad(codes.astype(np.int32) - c.source.zero, ((0, 0), (p, p), (p, p), (0, 0)))
    high, wide = ((side - size) // c.stride + 1 for side in values.shape[1:3])
    sums = np.zeros((len(codes), high, wide, len(c.bias)), np.int32)
    for i in range(size):
        for j in range(size):
            rows, columns = (slice(k, k + c.stride * n, c.stride) for k, n in ((i, high), (j, wide)))
            sums += values[:, rows, columns] @ c.weights[:, :, i, j].astype(np.int32).T
    numbers = cut_off((sums + c.bias).astype(np.float32) * c.factors, c.grid)
    grid = c.grid
    if c.shortcut is not None and other is not None:
        grid = c.shortcut.grid
        added = (other.astype(np.float32) - c.shortcut.zero) * np.float32(c.shortcut.factor)
        # The kernel multiplies and adds with one rounding.
        total = numbers.astype(np.float64) * c.shortcut.own_factor + added
        numbers = cut_off(total.astype(np.float32), grid)
    return (numbers + grid.zero).astype(np.uint8)


def by_kernel(
    c: Convolution, codes: np.ndarray, threads: int = 1, other: np.ndarray | None = None
) -> np.ndarray:
    prepared = PreparedConvolution(c, kernel(threads))
    out = np.full(prepared.sides(codes.shape), 255, np.uint8)
    given_codes = codes
    if codes.shape[3] == 3:  # pictures come as planes
        given_codes = np.ascontiguousarray(codes.transpose(0, 3, 1, 2))
    shortcut = None if other is None else other.ctypes.data
    prepared(given_codes.ctypes.data, codes.shape, out.ctypes.data, shortcut)
    return out


@settings(deadline=None, max_examples=60)  # the machine may be busy
@given(
    st.tuples(st.integers(1, 3), st.integers(7, 13), st.integers(7, 13)),
    st.sampled_from([4, 12, 64, 128]),
    st.sampled_from([64, 192]),
    st.tuples(GRIDS, GRIDS),
    st.sampled_from([1, 3, 7]),
    st.integers(1, 3),
    st.integers(0, 6),
    st.booleans(),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_every_code_is_that_of_the_definition(
    sides: tuple[int, int, int],
    inputs: int,
    outputs: int,
    grids: tuple[Grid, Grid],
    size: int,
    stride: int,
    padding: int,
    with_shortcut: bool,
    threads: int,
    seed: int,
) -> None:
    window = size, stride, min(padding, size - 1)
    c = convolution(inputs, outputs, grids, seed, window, with_shortcut)
    codes = made_codes(c, sides, seed)
    wanted = PreparedConvolution(c, kernel(threads)).sides(codes.shape)
    other = np.random.default_rng(seed).integers(96, 160, wanted).astype(np.uint8) if with_shortcut else None
    np.testing.assert_array_equal(by_kernel(c, codes, threads, other), plain(c, codes, other))


@settings(deadline=None, max_examples=30)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11)),
    st.sampled_from([64, 128]),
    st.sampled_from([64, 192]),
    st.tuples(st.sampled_from([SIGNED, UNSIGNED]), GRIDS),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_every_code_by_winograd_is_that_of_the_definition(
    sides: tuple[int, int, int],
    inputs: int,
    outputs: int,
    grids: tuple[Grid, Grid],
    threads: int,
    seed: int,
) -> None:
    c = convolution(inputs, outputs, grids, seed)
    assert c.by_winograd
    codes = made_codes(c, sides, seed)
    np.testing.assert_array_equal(by_kernel(c, codes, threads), plain(c, codes))


@settings(deadline=None, max_examples=20)
@given(
    st.tuples(st.integers(1, 2), st.integers(7, 20), st.integers(7, 40)),
    st.integers(1, 2),
    st.integers(0, 3),
    st.sampled_from([BYTES, Grid(37, 5, 201)]),
    st.integers(0, 2**31),
)
def test_pictures_are_read_as_planes(
    sides: tuple[int, int, int], stride: int, padding: int, grid: Grid, seed: int
) -> None:
    c = convolution(3, 64, (grid, UNSIGNED), seed, (7, stride, padding))
    codes = made_codes(c, sides, seed)
    np.testing.assert_array_equal(by_kernel(c, codes, 2), plain(c, codes))


@pytest.mark.parametrize("grid", [SIGNED, UNSIGNED])
@pytest.mark.parametrize("weight", [-8, 7])
def test_the_largest_sums_fit(grid: Grid, weight: int) -> None:
    """Codes at both ends in every pattern that the transform adds up, all weights at one end."""
    c = convolution(512, 64, (grid, UNSIGNED), 0)
    signs = np.random.default_rng(0).choice([-1, 1], (3, 3)) if weight < 0 else np.ones((3, 3), np.int8)
    c = replace(c, weights=np.broadcast_to((weight * signs).clip(-8, 7), c.weights.shape).astype(np.int8))
    corners = (
        np.indices((4, 4)).sum(0) % 2,
        np.indices((4, 4))[0] // 2,
        np.ones((4, 4), int),
        np.zeros((4, 4), int),
    )
    codes = np.stack([np.where(corner, grid.high, grid.low) for corner in corners]).astype(np.uint8)
    codes = np.ascontiguousarray(np.repeat(codes[..., None], 512, axis=3))
    assert c.by_winograd
    np.testing.assert_array_equal(by_kernel(c, codes), plain(c, codes))


@pytest.mark.parametrize(
    ("sign", "code"), [(1, UNSIGNED.high), (-1, UNSIGNED.low)], ids=["far too high", "far too low"]
)
def test_numbers_beyond_all_integers_are_cut_off_as_any_other(sign: int, code: int) -> None:
    c = convolution(64, 64, (UNSIGNED, UNSIGNED), 0, (1, 1, 0))
    c = replace(c, bias=np.full_like(c.bias, sign * 2**20), factors=np.full_like(c.factors, 2.0**40))
    codes = np.zeros((1, 3, 3, 64), np.uint8)
    np.testing.assert_array_equal(by_kernel(c, codes), code)


@pytest.mark.parametrize(
    "odd",
    [
        {"stride": 2},
        {"padding": 0},
        {"source": BYTES},
        {"source": Grid(128, 0, 63)},
        {"source": Grid(32, 0, 63)},
        {"source": Grid(128, 128, 191)},
        {"weights": np.full((64, 64, 3, 3), 15, np.int8)},
        {"shortcut": Shortcut("other", 0, 1.0, 1.0, UNSIGNED)},
    ],
    ids=lambda odd: next(f"{key} {value}" if key == "source" else key for key, value in odd.items()),
)
def test_winograd_is_left_alone_where_it_would_not_be_exact_or_does_not_apply(odd: dict[str, Any]) -> None:
    c = convolution(64, 64, (UNSIGNED, UNSIGNED), 0)
    assert c.by_winograd
    assert not replace(c, **odd).by_winograd


@settings(deadline=None, max_examples=20)
@given(
    st.tuples(st.integers(1, 3), st.integers(3, 11), st.integers(3, 11)),
    st.integers(1, 3),
    st.integers(0, 1),
    st.integers(0, 2**31),
)
def test_a_pool_takes_the_largest_codes(
    sides: tuple[int, int, int], stride: int, padding: int, seed: int
) -> None:
    codes = np.random.default_rng(seed).integers(0, 256, (*sides, 64)).astype(np.uint8)
    pool = PreparedPool(MaxPool("codes", "result", 3, stride, padding), kernel(2))
    out = np.zeros(pool.sides(codes.shape), np.uint8)
    pool(codes.ctypes.data, codes.shape, out.ctypes.data)
    around = np.pad(codes, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(around, (3, 3), axis=(1, 2))
    np.testing.assert_array_equal(out, windows[:, ::stride, ::stride].max((-2, -1)))


@pytest.mark.parametrize(
    "odd",
    [
        {"weights": np.zeros((64, 64, 3, 2), np.int8)},
        {"weights": np.zeros((63, 64, 3, 3), np.int8)},
        {"weights": np.zeros((64, 6, 3, 3), np.int8)},
        {"weights": np.zeros((64, 64, 8, 8), np.int8)},
        {"weights": np.zeros((64, 64, 3, 3), np.int16)},
        {"bias": np.zeros(65, np.int32)},
        {"factors": np.zeros(1, np.float32)},
        {"stride": 0},
        {"padding": -1},
        {"padding": 3},
    ],
    ids=lambda odd: next(iter(odd)),
)
def test_the_kernel_is_never_given_what_it_would_read_beyond(odd: dict[str, Any]) -> None:
    with pytest.raises(PackageError, match=r"result: .* none of our kernel's"):
        replace(convolution(64, 64, (UNSIGNED, UNSIGNED), 0), **odd)


@pytest.mark.parametrize("odd", [{"size": 8}, {"size": 0}, {"stride": 0}, {"padding": 3}, {"padding": -1}])
def test_nor_is_the_pool(odd: dict[str, Any]) -> None:
    with pytest.raises(PackageError, match="none of our kernel's"):
        MaxPool(**{"codes": "codes", "output": "result", "size": 3, "stride": 1, "padding": 1} | odd)


def test_what_does_not_fit_is_refused() -> None:
    c = convolution(64, 64, (UNSIGNED, UNSIGNED), 0)
    with pytest.raises(EngineError, match="expected 64 channels"):
        by_kernel(c, np.zeros((1, 4, 4, 128), np.uint8))
    with pytest.raises(EngineError, match="7 pixels does not fit 4"):
        by_kernel(convolution(64, 64, (UNSIGNED, UNSIGNED), 0, (7, 1, 1)), np.zeros((1, 4, 4, 64), np.uint8))
    shortened = convolution(64, 64, (UNSIGNED, UNSIGNED), 0, with_shortcut=True)
    tensors = {
        name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, side, 4, 64), np.uint8))
        for name, side in (("codes", 4), ("other", 3))
    }
    with pytest.raises(EngineError, match="a shortcut of"):
        ConvolutionStep(PreparedConvolution(shortened, kernel(1)))(tensors, Buffers())


@pytest.mark.parametrize("name", ["codes", "other"])
@pytest.mark.parametrize(
    "wrong", [np.zeros((1, 4, 4, 64), np.int8), np.zeros((1, 4, 64), np.uint8)], ids=["int8", "flat"]
)
def test_anything_but_maps_of_bytes_is_refused(name: str, wrong: np.ndarray) -> None:
    c = convolution(64, 64, (UNSIGNED, UNSIGNED), 0, with_shortcut=True)
    arrays = dict.fromkeys(("codes", "other"), np.zeros((1, 4, 4, 64), np.uint8)) | {name: wrong}
    tensors = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    with pytest.raises(EngineError, match="maps of bytes alone"):
        ConvolutionStep(PreparedConvolution(c, kernel(1)))(tensors, Buffers())


def test_results_that_change_their_size_do_not_pile_up() -> None:
    buffers, random = Buffers(), np.random.default_rng(0)
    for rows in random.integers(1, 2000, 300):
        for name in ("a", "b"):
            buffers.take(name, [int(rows), 64], np.float32)
    assert buffers.size <= 2 * 2 * 2000 * 64 * 4


def test_room_is_used_again_once_it_was_given_back() -> None:
    buffers = Buffers()
    first = buffers.take("first", [10, 10], np.uint8).data_ptr()
    second = buffers.take("second", [10, 10], np.uint8).data_ptr()
    assert first != second, "both are in use"
    buffers.give("first")
    assert buffers.take("third", [20], np.float32).data_ptr() == first
    assert buffers.take("second", [10, 10], np.uint8).data_ptr() == second, "the next frame's"
    assert buffers.take("fourth", [3], np.uint8).data_ptr() not in (first, second)
