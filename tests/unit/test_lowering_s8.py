# SPDX-License-Identifier: Apache-2.0
"""From the packed master to what TensorRT takes: signed codes, no zero-points, limits in float, sampling by gathers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, printer

from qdbev_ros.core.errors import PackageError
from qdbev_ros.engine.gather_sampling import gather_form, gather_grid_samples
from qdbev_ros.engine.graph import Graph
from qdbev_ros.engine.lowering_s8 import lower_s8
from qdbev_ros.engine.sampling import Sampling, grid_sample_form
from tests.small_master import small_master
from tests.unit.test_lowering import inputs, plain_session

GOLDEN = Path(__file__).with_name("golden_small_s8.txt")
SIZES = ((3, 5), (2, 4))


@pytest.mark.parametrize("seed", range(3))
def test_unoptimised_the_s8_graph_computes_the_masters_numbers_exactly(seed: int) -> None:
    s8 = lower_s8(small_master())
    onnx.checker.check_model(s8, full_check=True)
    wanted = plain_session(small_master()).run(None, inputs(seed))
    got = plain_session(s8.SerializeToString()).run(None, inputs(seed))
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_all_codes_are_signed_without_zero_points_and_their_limits_are_floats() -> None:
    graph = Graph(lower_s8(small_master()))
    limits = set()
    for quantise in graph.nodes("QuantizeLinear"):
        zero = graph.constant(quantise.input[2])
        assert (zero.dtype, int(zero)) == (np.int8, 0)
        (reader,) = graph.users(quantise.output[0])
        assert reader.op_type == "DequantizeLinear"
        clip = graph.producer(quantise.input[0])
        if clip is not None and clip.op_type == "Clip":
            step = float(graph.constant(quantise.input[1]))
            limits.add(tuple(round(float(graph.constant(name)) / step) for name in clip.input[1:]))
    assert limits == {(-32, 31), (0, 63)}


def test_weights_are_int8_and_biases_float() -> None:
    kinds = {t.name: t.data_type for t in lower_s8(small_master()).graph.initializer}
    assert kinds["first.w"] == kinds["linear.w"] == TensorProto.INT8
    assert TensorProto.INT32 not in kinds.values()
    assert TensorProto.UINT8 not in kinds.values()


def test_eight_unsigned_bits_are_rounded_in_float_to_the_same_numbers() -> None:
    model = onnx.load_from_string(small_master())
    zero = next(t for t in model.graph.initializer if t.name == "picture.z")
    zero.CopyFrom(numpy_helper.from_array(np.uint8(0), "picture.z"))
    master = model.SerializeToString()
    s8 = lower_s8(master)
    assert not any(n.name.startswith("picture.") and "Linear" in n.op_type for n in s8.graph.node)
    for seed in range(3):
        wanted = plain_session(master).run(None, inputs(seed))
        for one, other in zip(
            plain_session(s8.SerializeToString()).run(None, inputs(seed)), wanted, strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_a_zero_point_is_refused() -> None:
    model = onnx.load_from_string(small_master())
    zero = next(t for t in model.graph.initializer if t.name == "stem.z")
    zero.CopyFrom(numpy_helper.from_array(np.int8(3), "stem.z"))
    with pytest.raises(PackageError, match="zero-point"):
        lower_s8(model.SerializeToString())


def test_the_s8_graph_is_the_golden_one() -> None:
    """Reviewed by eye; `QDBEV_WRITE_GOLDEN=1 pytest tests/unit/test_lowering_s8.py` renews it after a wanted change."""
    text = printer.to_text(lower_s8(small_master())) + "\n"
    if os.environ.get("QDBEV_WRITE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_lowering_is_deterministic() -> None:
    one, two = (lower_s8(small_master()).SerializeToString(deterministic=True) for _ in range(2))
    assert one == two


def sampling_model(form: str) -> bytes:
    """Deformable sampling of two maps, two heads, three points a query, by GridSample or by gathers."""
    tokens = sum(height * width for height, width in SIZES)
    shapes = {"value": [2, tokens, 2, 4], "locations": [2, "Q", 2, 2, 3, 2], "weights": [2, "Q", 2, 2, 3]}
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    graph = Graph(helper.make_model(helper.make_graph([], "sampling", values, [out])))
    make = {"GridSample": grid_sample_form, "gathers": gather_form}[form]
    for node in make(Sampling("value", "locations", "weights", "out", 2, 4, 3, SIZES), graph.add_constant):
        graph.add(node)
    return graph.finish("test", 21).SerializeToString()


@pytest.mark.parametrize("spread", [0.3, 1.0, 1e9], ids=["inside", "over the border", "far away"])
def test_gathers_sample_what_grid_sample_samples(spread: float) -> None:
    random = np.random.default_rng(3)
    feeds = {
        "value": random.normal(size=(2, 23, 2, 4)),
        "locations": random.uniform(0.5 - spread, 0.5 + spread, size=(2, 9, 2, 2, 3, 2)),
        "weights": random.uniform(size=(2, 9, 2, 2, 3)),
    }
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    by_gathers, by_grid_sample = (
        plain_session(sampling_model(form)).run(None, feeds)[0] for form in ("gathers", "GridSample")
    )
    np.testing.assert_allclose(by_gathers, by_grid_sample, atol=1e-5)


def grid_sample_model(**attributes: object) -> onnx.ModelProto:
    """One GridSample, as a deformable convolution has it."""
    node = helper.make_node("GridSample", ["x", "grid"], ["out"], name="taps", **attributes)
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [2, 3, 4, 5]), ("grid", [2, 6, 7, 2]))
    ]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    model = helper.make_model(helper.make_graph([node], "taps", values, [out]))
    return Graph(model).finish("test", 21)


def test_a_deformable_convolutions_grid_sample_becomes_gathers_too() -> None:
    model = grid_sample_model(mode="linear", padding_mode="zeros", align_corners=0)
    graph = Graph(onnx.load_from_string(model.SerializeToString()))
    gather_grid_samples(graph)
    gathered = graph.finish("test", 21)
    assert not any(node.op_type == "GridSample" for node in gathered.graph.node)
    random = np.random.default_rng(4)
    feeds = {
        "x": random.normal(size=(2, 3, 4, 5)).astype(np.float32),
        "grid": random.uniform(-1.4, 1.4, size=(2, 6, 7, 2)).astype(np.float32),
    }
    got, wanted = (plain_session(m.SerializeToString()).run(None, feeds)[0] for m in (gathered, model))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_a_grid_sample_of_another_kind_is_refused_rather_than_changed() -> None:
    model = grid_sample_model(mode="linear", padding_mode="zeros", align_corners=1)
    with pytest.raises(PackageError, match=r"taps.*GridSample"):
        gather_grid_samples(Graph(model))
