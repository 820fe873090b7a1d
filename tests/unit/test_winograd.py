# SPDX-License-Identifier: Apache-2.0
"""Winograd's convolution in int8: the plain convolution's codes, to the last one."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine.kernel_steps import ConvolutionStep
from qdbev_ros.engine.native import KernelError
from qdbev_ros.engine.onnxruntime_runner import session_options
from qdbev_ros.engine.stages import cut, split
from qdbev_ros.engine.winograd import Convolution, PreparedConvolution, WinogradKernel, take_convolutions

SIGNED, UNSIGNED = (96, 159, 128), (0, 63, 0)  # lowest and highest code, code of zero


@cache
def kernel(threads: int) -> WinogradKernel:
    try:
        return WinogradKernel(threads)
    except KernelError as error:
        pytest.skip(str(error))


def convolution(
    inputs: int, outputs: int, grids: tuple[tuple[int, int, int], tuple[int, int, int]], seed: int
) -> Convolution:
    random = np.random.default_rng(seed)
    (_, _, zero), (low, high, out_zero) = grids
    return Convolution(
        "codes",
        "result",
        random.integers(-8, 8, (outputs, inputs, 3, 3)).astype(np.int8),
        random.integers(-3000, 3000, outputs).astype(np.int32),
        (random.uniform(0.2, 2.0, outputs) * 0.003).astype(np.float32),
        zero,
        out_zero,
        low,
        high,
    )


def plain(c: Convolution, codes: np.ndarray) -> np.ndarray:
    """The definition, in numpy: sums over nine shifted pictures, then one rounding to even."""
    images, height, width, _ = codes.shape
    values = np.pad(codes.astype(np.int32) - c.zero, ((0, 0), (1, 1), (1, 1), (0, 0)))
    sums = np.zeros((images, height, width, len(c.bias)), np.int32)
    for i in range(3):
        for j in range(3):
            sums += values[:, i : i + height, j : j + width] @ c.weights[:, :, i, j].astype(np.int32).T
    scaled = (sums + c.bias).astype(np.float32) * c.factors
    return np.clip(np.rint(scaled) + c.out_zero, c.low, c.high).astype(np.uint8)


def by_kernel(c: Convolution, codes: np.ndarray, threads: int = 1) -> np.ndarray:
    out = np.full((*codes.shape[:3], len(c.bias)), 255, np.uint8)
    PreparedConvolution(c, kernel(threads))(codes.ctypes.data, codes.shape, out.ctypes.data)
    return out


@settings(deadline=None, max_examples=30)  # the machine may be busy
@given(
    st.integers(1, 3),
    st.integers(1, 11),
    st.integers(1, 11),
    st.sampled_from([64, 128]),
    st.sampled_from([64, 192]),
    st.sampled_from([SIGNED, UNSIGNED]),
    st.sampled_from([SIGNED, UNSIGNED]),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_every_code_is_that_of_the_plain_convolution(
    images: int,
    height: int,
    width: int,
    inputs: int,
    outputs: int,
    grid: tuple[int, int, int],
    out_grid: tuple[int, int, int],
    threads: int,
    seed: int,
) -> None:
    c = convolution(inputs, outputs, (grid, out_grid), seed)
    shape = (images, height, width, inputs)
    codes = np.random.default_rng(seed).integers(grid[0], grid[1] + 1, shape).astype(np.uint8)
    np.testing.assert_array_equal(by_kernel(c, codes, threads), plain(c, codes))


@pytest.mark.parametrize("grid", [SIGNED, UNSIGNED])
@pytest.mark.parametrize("weight", [-8, 7])
def test_the_largest_sums_fit(grid: tuple[int, int, int], weight: int) -> None:
    """Codes at both ends in every pattern that the transform adds up, all weights at one end."""
    c = convolution(512, 64, (grid, UNSIGNED), 0)
    signs = np.random.default_rng(0).choice([-1, 1], (3, 3)) if weight < 0 else np.ones((3, 3), np.int8)
    c = replace(c, weights=np.broadcast_to((weight * signs).clip(-8, 7), c.weights.shape).astype(np.int8))
    low, high, _ = grid
    corners = (
        np.indices((4, 4)).sum(0) % 2,
        np.indices((4, 4))[0] // 2,
        np.ones((4, 4), int),
        np.zeros((4, 4), int),
    )
    codes = np.stack([np.where(corner, high, low) for corner in corners]).astype(np.uint8)
    codes = np.ascontiguousarray(np.repeat(codes[..., None], 512, axis=3))
    c = replace(c, factors=(c.factors / 30).astype(np.float32))
    np.testing.assert_array_equal(by_kernel(c, codes), plain(c, codes))


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(EngineError, match="expected 64 channels"):
        by_kernel(convolution(64, 64, (UNSIGNED, UNSIGNED), 0), np.zeros((1, 4, 4, 128), np.uint8))


class Network:
    """Residual blocks 1x1, 3x3, 1x1 on codes, as `lower_u8` leaves them; the first reads the input x (2, C, 7, 10)."""

    def __init__(self, blocks: int, channels: int = 64, **odd: int) -> None:
        self._random, self._channels = np.random.default_rng(0), channels
        self._nodes: list[onnx.NodeProto] = []
        self._constants = {"x.step": np.float32(1.0), "x.zero": np.uint8(0)}
        last = "x"
        for i in range(blocks):
            first = self._layer(f"{i}.first", last, 1, (0, odd.get("high", 63), 0))
            second = self._layer(
                f"{i}.second", first, 3, UNSIGNED, odd.get("most", 8), odd.get("dilation", 1)
            )
            third = self._layer(f"{i}.third", second, 1, SIGNED)
            total = self._add("Add", [self._numbers(third), self._numbers(last)], f"{i}.sum")
            last = self._codes(total, UNSIGNED)
        if "strides" in odd:
            self._layer("strided", last, 3, UNSIGNED, strides=odd["strides"])
        graph = helper.make_graph(
            self._nodes,
            "blocks",
            [helper.make_tensor_value_info("x", TensorProto.UINT8, [2, channels, 7, 10])],
            [helper.make_tensor_value_info(self._numbers(last), TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(v), n) for n, v in self._constants.items()],
        )
        self.model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
        self.model.ir_version = 10

    def _add(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self._nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def _codes(self, value: str, grid: tuple[int, int, int]) -> str:
        low, high, zero = grid
        codes = f"{value}.codes"
        self._constants |= {f"{codes}.step": np.float32(1.0), f"{codes}.zero": np.uint8(zero)}
        self._constants |= {f"{codes}.low": np.uint8(low), f"{codes}.high": np.uint8(high)}
        wide = self._add("QuantizeLinear", [value, f"{codes}.step", f"{codes}.zero"], f"{codes}.wide")
        return self._add("Clip", [wide, f"{codes}.low", f"{codes}.high"], codes)

    def _numbers(self, codes: str) -> str:
        name = f"{codes}.number{len(self._nodes)}"
        return self._add("DequantizeLinear", [codes, f"{codes}.step", f"{codes}.zero"], name)

    def _layer(
        self,
        name: str,
        codes: str,
        size: int,
        grid: tuple[int, int, int],
        most: int = 8,
        dilation: int = 1,
        strides: int = 1,
    ) -> str:
        random, n = self._random, self._channels
        step = random.uniform(0.5, 1.5, n).astype(np.float32) * np.float32(0.02 / size)
        self._constants |= {
            f"{name}.w": random.integers(-most, most, (n, n, size, size)).astype(np.int8),
            f"{name}.b": random.integers(-99, 99, n).astype(np.int32),
            f"{name}.step": step,
        }
        weights, bias = (
            self._add("DequantizeLinear", [f"{name}.{part}", f"{name}.step"], f"{name}.{part}n", axis=0)
            for part in ("w", "b")
        )
        value = self._add(
            "Conv",
            [self._numbers(codes), weights, bias],
            name,
            kernel_shape=[size] * 2,
            pads=[size // 2 * dilation] * 4,
            strides=[strides] * 2,
            dilations=[dilation] * 2,
            group=1,
        )
        return self._codes(value, grid)


def run(model: onnx.ModelProto, feeds: dict[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
    session = ort.InferenceSession(
        model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    given = {i.name: feeds[i.name] for i in session.get_inputs()}
    return dict(zip(names, session.run_with_ort_values(names, given), strict=True))


def test_a_graph_cut_at_its_convolutions_computes_the_same_numbers() -> None:
    model = Network(blocks=3).model
    (output,) = (o.name for o in model.graph.output)
    codes = np.random.default_rng(1).integers(0, 64, (2, 64, 7, 10)).astype(np.uint8)
    tensors = {"x": ort.OrtValue.ortvalue_from_numpy(codes)}
    wanted = run(model, tensors)[output].numpy()
    assert len(np.unique(wanted)) > 32, "a picture of something"
    rest, found = take_convolutions(onnx.ModelProto.FromString(model.SerializeToString()))
    stages = cut(rest)
    assert [len(stage.behind) for stage in stages] == [1, 1, 1, 0]
    for stage in stages:
        handed_on = {v.type.tensor_type.elem_type for v in stage.model.graph.output if v.name != output}
        assert handed_on <= {TensorProto.UINT8}, "codes, not numbers, go from stage to stage"
        tensors |= run(stage.model, tensors)
        for node in stage.behind:
            step = ConvolutionStep(PreparedConvolution(found[node.output[0]], kernel(1)))
            tensors[step.output] = step(tensors)
    np.testing.assert_array_equal(tensors[output].numpy(), wanted)


def test_a_graph_that_was_split_can_still_be_cut() -> None:
    """As behind pictures that are given as codes: the types of what our nodes put out are still known."""
    model, _ = take_convolutions(Network(blocks=2).model)
    _, rest = split(model, "0.sum.codes")
    assert [len(stage.behind) for stage in cut(rest)] == [1, 0]


@pytest.mark.parametrize("odd", [{"dilation": 2}, {"most": 127}, {"high": 127}], ids=str)
def test_what_the_kernel_cannot_do_is_left_to_the_runtime(odd: dict[str, int]) -> None:
    assert take_convolutions(Network(1, **odd).model)[1] == {}
    assert len(take_convolutions(Network(1, strides=2).model)[1]) == 1, "only the one that takes every pixel"


def test_other_numbers_of_channels_are_left_to_the_runtime() -> None:
    assert len(take_convolutions(Network(2).model)[1]) == 2
    assert take_convolutions(Network(2, channels=48).model)[1] == {}
