# SPDX-License-Identifier: Apache-2.0
"""From the packed master to what ONNX Runtime has int8 kernels for, without changing a number."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper, printer

from qdbev_ros.core.errors import EngineError, PackageError
from qdbev_ros.engine.graph import Graph, pack_int4, unpack_int4
from qdbev_ros.engine.lowering import fuse_linears, lower_u8, quantised_convolutions
from qdbev_ros.engine.onnxruntime_runner import OnnxRuntimeRunner
from qdbev_ros.engine.sessions import check_convolutions
from tests.small_master import CELLS, CHANNELS, small_master

GOLDEN = Path(__file__).with_name("golden_small_u8.txt")
CODES = hnp.arrays(np.int8, hnp.array_shapes(max_dims=4, max_side=7, min_side=0), elements=st.integers(-8, 7))


def plain_session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def inputs(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "images": random.normal(size=(1, 6, 3, 8, 8)).astype(np.float32),
        "prev_bev": random.normal(size=(1, CELLS, CHANNELS)).astype(np.float32),
    }


@settings(deadline=None)  # the machine may be busy
@given(CODES)
def test_packing_four_bits_and_back_changes_nothing(codes: np.ndarray) -> None:
    packed = pack_int4(codes)
    assert len(packed.raw_data) == (codes.size + 1) // 2
    np.testing.assert_array_equal(unpack_int4(packed), codes)


@settings(deadline=None)  # the machine may be busy
@given(CODES)
def test_packed_nibbles_are_what_onnx_itself_reads(codes: np.ndarray) -> None:
    packed = pack_int4(codes)
    np.testing.assert_array_equal(numpy_helper.to_array(packed).astype(np.int8), codes)


def test_a_code_outside_four_bits_is_not_packed() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        pack_int4(np.array([8], np.int8))


def test_a_packed_weight_of_the_wrong_length_is_refused() -> None:
    packed = pack_int4(np.zeros(10, np.int8))
    packed.raw_data = packed.raw_data[:-1]
    with pytest.raises(PackageError, match="4 bytes for 10 codes"):
        unpack_int4(packed)


@pytest.mark.parametrize("seed", range(3))
def test_the_lowered_graph_computes_what_the_master_computes(seed: int) -> None:
    """Without the runtime's own fusions every number is the same, to float rounding of the products' sums."""
    master = plain_session(small_master()).run(None, inputs(seed))
    u8 = lower_u8(small_master())
    onnx.checker.check_model(u8, full_check=True)
    for lowered in (u8, fuse_linears(u8)):
        for got, wanted in zip(
            plain_session(lowered.SerializeToString()).run(None, inputs(seed)), master, strict=True
        ):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_signed_codes_move_by_128_and_the_clip_stays_on_the_integers() -> None:
    graph = Graph(lower_u8(small_master()))
    bounds = set()
    for quantise in graph.nodes("QuantizeLinear"):
        zero = int(graph.constant(quantise.input[2]))
        assert graph.constant(quantise.input[2]).dtype == np.uint8
        (user,) = graph.users(quantise.output[0])
        if user.op_type == "Clip":
            bounds.add((zero, int(graph.constant(user.input[1])), int(graph.constant(user.input[2]))))
        else:
            assert zero == 128  # eight signed bits fill the container: nothing to clip
    assert bounds == {(128, 96, 159), (0, 0, 63)}


def test_a_rectifier_that_the_codes_repeat_is_dropped_and_any_other_is_kept() -> None:
    assert all(n.input[0] != "first" for n in Graph(lower_u8(small_master())).nodes("Clip"))
    model = onnx.load_from_string(small_master())
    step = next(t for t in model.graph.initializer if t.name == "stem.s")
    step.CopyFrom(numpy_helper.from_array(np.float32(0.2), "stem.s"))  # 63 steps of 0.2 reach beyond six
    kept = Graph(lower_u8(model.SerializeToString()))
    assert any(n.input[0] == "first" for n in kept.nodes("Clip"))


def master_with_offsets() -> bytes:
    """The small master as in front of a deformable convolution.

    Its first map lies on a second, finer grid as well, from which a convolution makes numbers that no grid waits for.
    """
    model = onnx.load_from_string(small_master())
    graph, random = model.graph, np.random.default_rng(5)
    bev = next(n for n in graph.node if "bev" in n.output)
    bev.output[0] = "old_bev"
    step, scale = np.float32(0.02), random.uniform(0.02, 0.05, CHANNELS).astype(np.float32)
    constants = {
        "fine.s": step,
        "fine.z": np.uint8(0),
        "third.w": random.integers(-64, 64, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8),
        "third.ws": scale,
        "third.b": random.integers(-200, 200, CHANNELS).astype(np.int32),
        "third.bs": (scale * step).astype(np.float32),
        "third.axes": np.array([0, 2, 3]),
    }
    graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items())
    graph.node.extend(
        [
            helper.make_node("QuantizeLinear", ["relu6", "fine.s", "fine.z"], ["fine.q"]),
            helper.make_node("DequantizeLinear", ["fine.q", "fine.s", "fine.z"], ["fine"]),
            helper.make_node("DequantizeLinear", ["third.w", "third.ws"], ["third.wd"], axis=0),
            helper.make_node("DequantizeLinear", ["third.b", "third.bs"], ["third.bd"], axis=0),
            helper.make_node("Conv", ["fine", "third.wd", "third.bd"], ["third"], name="third", pads=[1] * 4),
            helper.make_node("ReduceMean", ["third", "third.axes"], ["third.mean"], keepdims=0),
            helper.make_node("Add", ["old_bev", "third.mean"], ["bev"]),
        ]
    )
    return model.SerializeToString()


@pytest.mark.parametrize("seed", range(3))
def test_what_comes_before_a_deformable_convolution_stays_in_integers(seed: int) -> None:
    """One convolution for each grid, and integer sums where no grid follows; the numbers are the master's."""
    master = master_with_offsets()
    lowered = lower_u8(master)
    fused = fuse_linears(lowered)
    assert quantised_convolutions(lowered) == ["first", "second", "first_grid1", "third"]
    assert quantised_convolutions(fused) == ["first", "second", "first_grid1"]
    assert [n.name for n in fused.graph.node if n.op_type == "ConvInteger"] == ["third"]
    assert " 4 int8 convolutions" in OnnxRuntimeRunner(master, 1).description
    wanted = plain_session(master).run(None, inputs(seed))
    for model in (lowered, fused):
        for got, value in zip(
            plain_session(model.SerializeToString()).run(None, inputs(seed)), wanted, strict=True
        ):
            np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-5)


def linear_and_division(divisor: np.ndarray) -> onnx.ModelProto:
    """x (3, 4) -> a quantised linear layer with six columns -> (3, 3, 2) -> divided by a constant."""
    random = np.random.default_rng(1)
    constants = {
        "step": np.float32(0.05),
        "zero": np.uint8(128),
        "weight": random.integers(-8, 8, (4, 6)).astype(np.int8),
        "weight_step": random.uniform(0.02, 0.05, 6).astype(np.float32),
        "bias": random.normal(size=6).astype(np.float32),
        "shape": np.array([3, 3, 2]),
        "divisor": divisor,
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_step"], ["plain_weight"], axis=1),
        helper.make_node("MatMul", ["rounded", "plain_weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["linear"]),
        helper.make_node("Reshape", ["linear", "shape"], ["pairs"]),
        helper.make_node("Transpose", ["pairs"], ["turned"], perm=[1, 0, 2]),
        helper.make_node("Div", ["turned", "divisor"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy")
    tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    return helper.make_model(
        helper.make_graph(nodes, "linear", [x], [y], tensors), opset_imports=[helper.make_opsetid("", 21)]
    )


@pytest.mark.parametrize(("divisor", "divisions"), [([[25.0, 15.0]], 0), ([[[2.0]], [[3.0]], [[5.0]]], 1)])
def test_a_division_by_width_and_height_goes_into_the_linear_layer_and_any_other_stays(
    divisor: list[float], divisions: int
) -> None:
    model = linear_and_division(np.array(divisor, np.float32))
    model.ir_version = 10
    fused = fuse_linears(model)
    assert [n.op_type for n in fused.graph.node].count("Div") == divisions
    x = {"x": np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)}
    wanted, got = (plain_session(m.SerializeToString()).run(None, x)[0] for m in (model, fused))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_the_lowered_graph_is_the_golden_one() -> None:
    """Reviewed by eye; `QDBEV_WRITE_GOLDEN=1 pytest tests/unit/test_lowering.py` renews it after a wanted change."""
    text = printer.to_text(fuse_linears(lower_u8(small_master()))) + "\n"
    if os.environ.get("QDBEV_WRITE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_lowering_is_deterministic() -> None:
    twice = [fuse_linears(lower_u8(small_master())).SerializeToString(deterministic=True) for _ in range(2)]
    assert twice[0] == twice[1]


def test_what_is_no_onnx_file_is_refused() -> None:
    with pytest.raises(PackageError, match="no ONNX file"):
        lower_u8(b"\xff\xff\xff not protobuf")


def test_a_graph_that_points_to_other_files_is_refused() -> None:
    model = onnx.load_from_string(small_master())
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    with pytest.raises(PackageError, match="outside its own file"):
        lower_u8(model.SerializeToString())


def test_a_convolution_left_in_float_is_found_and_named() -> None:
    lowered = lower_u8(small_master())
    assert quantised_convolutions(lowered) == ["first", "second"]
    optimised = onnx.ModelProto()
    optimised.graph.node.extend(
        [
            helper.make_node("QLinearConv", ["a"] * 8, ["b"], name="first"),
            helper.make_node("FusedConv", ["b", "w"], ["c"], name="second"),
        ]
    )
    with pytest.raises(EngineError, match="1 of 2 quantised convolutions in float: second"):
        check_convolutions(lowered, optimised)
