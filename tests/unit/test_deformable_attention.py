# SPDX-License-Identifier: Apache-2.0
"""Deformable attention in one kernel: it computes what the chain of nodes computes that it is put in the place of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from benchmarks.attention_graph import Arrays, Shape, attention_graph, feeds
from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine import read_package
from qdbev_ros.engine.cut_graph import CutGraph
from qdbev_ros.engine.deformable import DeformableKernel
from qdbev_ros.engine.deformable_nodes import ATTENTION, Attention, take_attentions
from qdbev_ros.engine.kernel_steps import AttentionStep, Buffers
from qdbev_ros.engine.lowering import lower_u8
from qdbev_ros.engine.sampling import inline_samplings
from tests.unit.test_sampling import needs_compiler

DEMO = Path(__file__).resolve().parents[2] / "demo" / "nano.qdbev"
DECODER = Shape(1, 23, 3, 16, 4, ((5, 7),))
TEMPORAL = Shape(1, 35, 3, 16, 4, ((5, 7),), maps=2)
SPATIAL = Shape(3, 11, 2, 16, 8, ((6, 9), (3, 5)), pillar=4, outputs=21, most=2)
ALL = pytest.mark.parametrize("shape", [DECODER, TEMPORAL, SPATIAL], ids=["decoder", "temporal", "spatial"])
SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3).map(tuple)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """One map, the mean of several, or rows gathered from cameras, with one or several levels and places of a row."""
    counts = {"heads": draw(st.integers(1, 3)), "depth": draw(st.sampled_from([1, 5, 16, 32]))}
    counts |= {"queries": draw(st.integers(1, 9)), "points": draw(st.integers(1, 5))}
    if draw(st.booleans()):
        return Shape(1, sizes=draw(SIZES)[:1], maps=draw(st.integers(2, 3)), **counts)
    pillar, outputs = draw(st.integers(0, 3)), draw(st.integers(0, 6))
    counts["points"] *= max(pillar, 1)
    most = draw(st.integers(1, 3)) if outputs else 0
    return Shape(
        draw(st.integers(1, 3)), sizes=draw(SIZES), pillar=pillar, outputs=outputs, most=most, **counts
    )


@cache
def kernel(threads: int) -> DeformableKernel:
    return DeformableKernel(threads)


def taken(model: onnx.ModelProto) -> list[Attention]:
    return list(take_attentions(model)[1].values())


def by_kernel(shape: Shape, arrays: Arrays, threads: int = 1) -> np.ndarray:
    """(outputs, channels) by the step that stands for the one attention of the graph."""
    (attention,) = taken(attention_graph(shape))
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    buffers = Buffers()  # has the memory of the result
    made: np.ndarray = AttentionStep(attention, kernel(threads))(values, buffers).numpy()
    return made.reshape(-1, made.shape[-1]).copy()


def by_chain(model: onnx.ModelProto, arrays: Arrays) -> np.ndarray:
    """The same by ONNX Runtime alone."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    plain = inline_samplings(model).SerializeToString()
    made: np.ndarray = ort.InferenceSession(plain, options, providers=["CPUExecutionProvider"]).run(
        ["output"], arrays
    )[0]
    return made


def by_engine(model: onnx.ModelProto, arrays: Arrays) -> np.ndarray:
    """The same by ONNX Runtime's sessions and our kernels, whichever nodes those take."""
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    CutGraph(model, 1).run(values)
    made: np.ndarray = values["output"].numpy()
    return made


@needs_compiler
@settings(deadline=None, max_examples=40)  # the machine may be busy
@given(shapes(), st.integers(0, 2**31))
def test_the_kernel_computes_what_the_chain_computes(shape: Shape, seed: int) -> None:
    arrays = feeds(shape, seed)
    wanted = by_chain(attention_graph(shape), arrays)
    # A place beside a border may lie on its other side, and a pixel's share differ by some of a float32's last bits.
    np.testing.assert_allclose(by_kernel(shape, arrays), wanted, atol=5e-5)


@needs_compiler
def test_the_kernel_computes_what_is_written_down_here() -> None:
    """One head, one map, whole pixels: a sum over samples, weighted by a softmax in float64."""
    shape = Shape(1, 6, 1, 5, 4, ((5, 7),))
    arrays, random = feeds(shape), np.random.default_rng(1)
    offsets, pixels = random.integers(-3, 4, (6, 4, 2)), random.integers(-2, 9, (6, 2))
    arrays["offsets"] = offsets.reshape(1, 6, 8).astype(np.float32)
    arrays["references"] = ((pixels + 0.5) / (7, 5)).astype(np.float32)[None]
    exponentials = np.exp(arrays["logits"][0].astype(np.float64))
    weights = exponentials / exponentials.sum(-1, keepdims=True)
    wanted = np.zeros((6, 5))
    for query, point in np.ndindex(6, 4):
        x, y = pixels[query] + offsets[query, point]
        if 0 <= x < 7 and 0 <= y < 5:
            wanted[query] += weights[query, point] * arrays["value"][0, y * 7 + x]
    np.testing.assert_allclose(by_kernel(shape, arrays), wanted, atol=2e-5)


@needs_compiler
@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(-200.0, 200.0, width=32), min_size=4, max_size=4))
def test_weights_are_a_softmax_however_far_apart_logits_lie(logits: list[float]) -> None:
    shape = Shape(1, 1, 1, 1, 4, ((1, 4),))
    arrays = feeds(shape) | {"logits": np.array(logits, np.float32).reshape(1, 1, 4)}
    arrays["references"] = np.array([[[0.125, 0.5]]], np.float32)
    arrays["offsets"] = np.array([[[0, 0, 1, 0, 2, 0, 3, 0]]], np.float32)
    for point in range(4):
        arrays["value"] = (np.arange(4) == point).astype(np.float32).reshape(1, 4, 1)
        apart = np.exp((arrays["logits"] - arrays["logits"].max())[0, 0].astype(np.float64))
        np.testing.assert_allclose(
            by_kernel(shape, arrays), apart[point] / apart.sum(), rtol=1e-6, atol=1e-37
        )


@needs_compiler
@ALL
def test_twice_the_same_attention_is_the_same_bits_on_any_number_of_threads(shape: Shape) -> None:
    arrays = feeds(shape)
    first = by_kernel(shape, arrays)
    for threads in (1, 2, 3):
        np.testing.assert_array_equal(by_kernel(shape, arrays, threads), first)


@needs_compiler
@ALL
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 3e38, -3e38])
def test_any_numbers_at_all_leave_the_process_alive(shape: Shape, odd: float) -> None:
    random = np.random.default_rng(0)
    arrays = feeds(shape)
    for name in ("offsets", "logits", "references", "value"):
        arrays[name] = np.where(random.random(arrays[name].shape) < 0.3, np.float32(odd), arrays[name])
    assert by_kernel(shape, arrays).shape[-1] == shape.heads * shape.depth


@needs_compiler
@pytest.mark.parametrize("place", [np.nan, np.inf, -np.inf, 1e30])
def test_offsets_to_nowhere_give_nothing(place: float) -> None:
    arrays = feeds(DECODER)
    arrays["offsets"][0, 2] = place
    sampled = by_kernel(DECODER, arrays)
    assert np.abs(sampled[2]).max() == 0.0
    assert np.abs(sampled).max() > 0.0


@needs_compiler
@pytest.mark.parametrize("point", range(DECODER.points))
@pytest.mark.parametrize("odd", [np.nan, np.inf])
@pytest.mark.parametrize("beside", [False, True])
def test_logits_that_are_no_numbers_are_seen_in_the_result(point: int, odd: float, beside: bool) -> None:
    """Of their own row and head alone, and where the samples lie beside the map as well."""
    arrays = feeds(DECODER)
    arrays["references"][0, 2] = 9.0 if beside else 0.5
    arrays["logits"][0, 2, DECODER.points + point] = odd
    sampled = by_kernel(DECODER, arrays).reshape(DECODER.queries, DECODER.heads, DECODER.depth)
    assert np.isnan(sampled[2, 1]).all()
    sampled[2, 1] = 0.0
    assert np.isfinite(sampled).all()


@needs_compiler
def test_slots_that_are_no_rows_and_shares_of_zero_add_nothing() -> None:
    arrays = feeds(SPATIAL)
    rows = SPATIAL.batch * SPATIAL.queries
    slots, shares = arrays["slots"].reshape(-1, 2), arrays["shares"].reshape(-1, 2)
    slots[:, 0], shares[:] = np.arange(len(slots)), (0.5, 0.0)
    alone = by_kernel(SPATIAL, arrays)
    shares[:, 1] = 1.0
    for slot in (rows, rows + 1, -1, np.iinfo(np.int64).max, np.iinfo(np.int64).min):
        slots[:, 1] = slot
        np.testing.assert_array_equal(by_kernel(SPATIAL, arrays), alone)
    arrays["logits"][:] = np.nan
    shares[:] = 0.0
    assert np.abs(by_kernel(SPATIAL, arrays)).max() == 0.0


def narrower(name: str) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({name: np.ascontiguousarray(arrays[name][..., :-1])})


def shorter(name: str) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({name: np.ascontiguousarray(arrays[name][:, :-1])})


def of_type(name: str) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({name: arrays[name].astype(np.float64)})


def spoilt() -> Iterator[Any]:
    for kind, shape in (("decoder", DECODER), ("temporal", TEMPORAL), ("spatial", SPATIAL)):
        for name in shape.inputs:
            for spoil in (narrower, of_type) if name == "slots" else (narrower, shorter, of_type):
                yield pytest.param(shape, spoil(name), id=f"{kind}: {spoil.__name__} {name}")


@needs_compiler
@pytest.mark.parametrize(("shape", "spoil"), list(spoilt()))
def test_tensors_that_do_not_fit_each_other_are_refused(
    shape: Shape, spoil: Callable[[Arrays], None]
) -> None:
    arrays = feeds(shape)
    spoil(arrays)
    with pytest.raises(EngineError, match=r"do not fit|float32 alone"):
        by_kernel(shape, arrays)


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "other"),
    [
        (TEMPORAL, replace(TEMPORAL, batch=2)),  # two batch elements of two maps each
        (SPATIAL, replace(SPATIAL, pillar=3)),  # which eight points cannot have
        (SPATIAL, replace(SPATIAL, queries=0)),
        (DECODER, replace(DECODER, batch=0)),
    ],
    ids=["batch of maps", "points", "no rows", "no maps"],
)
def test_rows_that_the_kernel_has_no_order_for_are_refused(shape: Shape, other: Shape) -> None:
    with pytest.raises(EngineError, match="do not fit"):
        by_kernel(shape, feeds(other))


@needs_compiler
@pytest.mark.parametrize(
    "changes",
    [{"raw_rows": 0}, {"raw_rows": 3}, {"references": 0}, {"references": 12}, {"outputs": 5}, {"most": 0}, {"most": 3},
     {"points": 400}, {"sizes": [(2, 3)]}, {"value_shape": [0, 9, 3, 4]}],
    ids=str,
)  # fmt: skip
def test_the_kernel_refuses_counts_that_do_not_fit(changes: dict[str, object]) -> None:
    """Before it looks at any buffer: here there are none."""
    counts = {
        "value_shape": [2, 9, 3, 4],
        "raw_rows": 4,
        "references": 8,
        "outputs": 4,
        "most": 2,
        "points": 2,
    }
    buffers = (0, 0, 0, 0, None, None, 0)
    with pytest.raises(EngineError, match="do not fit"):
        kernel(1).attend(buffers, **(counts | {"sizes": [(3, 3)]} | changes))  # type: ignore[arg-type]


def test_all_attentions_of_the_demo_are_found() -> None:
    """Two encoder layers, each of the mean of two maps and of rows from cameras, and three decoder layers."""
    lowered, attentions = take_attentions(lower_u8(read_package(DEMO).model))
    kinds = [(attention.maps, bool(attention.slots)) for attention in attentions.values()]
    assert kinds == [(2, False), (1, True)] * 2 + [(1, False)] * 3
    left = {node.op_type for node in lowered.graph.node}
    assert ATTENTION in left
    assert left.isdisjoint({"ReduceMean", "ReduceSum"})  # of which the demo has no others
    assert not any(kind.startswith("DeformableSampling") for kind in left)


Change = Callable[[onnx.ModelProto], None]


def named(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def constant(name: str, value: object) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        kind = numpy_helper.to_array(tensor).dtype
        tensor.CopyFrom(numpy_helper.from_array(np.array(value, kind), name))

    return change


def attribute(name: str, value: object) -> Change:
    def change(model: onnx.ModelProto) -> None:
        (old,) = [a for a in named(model, name).attribute if a.name in ("axis", "perm")]
        old.CopyFrom(helper.make_attribute(old.name, value))

    return change


def renamed(name: str, op_type: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        named(model, name).op_type = op_type

    return change


def both(*changes: Change) -> Change:
    def change(model: onnx.ModelProto) -> None:
        for one in changes:
            one(model)

    return change


def maps_behind(name: str) -> Change:
    """Rows of (maps, heads, ...) instead of (heads, maps, ...)."""
    dimensions = [1, -1, 2, 2, 4] + [2] * (name == "pairs")
    perm = [0, 2, 1, 3, 4, 5][: len(dimensions)]
    turned = {"pairs": "pairs_by_map", "rows": "weights_by_map"}[name]
    return both(constant(f"{name}_by", dimensions), attribute(turned, perm))


def turned(model: onnx.ModelProto) -> None:
    """Columns of the offsets as (points, heads, 2)."""
    constant("pairs_by", [1, -1, 4, 3, 1, 2])(model)
    named(model, "pairs").output[0] = "other_order"
    at = [node.name for node in model.graph.node].index("pairs")
    node = helper.make_node("Transpose", ["other_order"], ["pairs"], name="turned", perm=[0, 1, 3, 4, 2, 5])
    model.graph.node.insert(at + 1, node)


def read_twice(name: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("Neg", [name], ["seen"], name="seen"))
        model.graph.output.append(helper.make_tensor_value_info("seen", TensorProto.FLOAT, None))

    return change


TWO_HEADS = replace(TEMPORAL, heads=2)
SQUARE = replace(DECODER, sizes=((6, 9), (3, 5)), points=2)
BY_LEVEL = replace(SPATIAL, pillar=2, points=2)


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "change", "found"),
    [
        (DECODER, constant("scale", [[7.0, 6.0]]), 0),
        (DECODER, attribute("softmax", 2), 0),
        (DECODER, turned, 0),
        (DECODER, renamed("places", "Sub"), 0),
        (DECODER, renamed("softmax", "LogSoftmax"), 0),
        (DECODER, read_twice("sampled"), 1),
        (DECODER, read_twice("softmax"), 1),
        (SQUARE, constant("scale", [[[9.0, 6.0], [5.0, 3.0]]]), 0),  # of the points instead of the levels
        (BY_LEVEL, both(constant("around1_by", 4), constant("around2_by", 4)), 0),  # a place for each level
        (TWO_HEADS, both(maps_behind("pairs"), maps_behind("rows")), 0),
        (TWO_HEADS, maps_behind("pairs"), 0),
        (TEMPORAL, read_twice("sampled"), 0),
        (TEMPORAL, read_twice("sampled_by_map"), 0),
        (TEMPORAL, renamed("mean", "ReduceMax"), 0),
        (SPATIAL, read_twice("flat"), 1),
        (SPATIAL, renamed("sum", "ReduceMax"), 1),
        (SPATIAL, renamed("product", "Add"), 1),
    ],
)
def test_an_attention_of_another_form_is_left_alone_or_still_right(
    shape: Shape, change: Change, found: int
) -> None:
    model, arrays = attention_graph(shape), feeds(shape)
    change(model)
    wanted = by_chain(model, arrays)
    assert len(taken(model)) == found
    np.testing.assert_allclose(by_engine(model, arrays), wanted, atol=5e-5)


@needs_compiler
@ALL
def test_a_graph_with_attentions_computes_what_the_whole_one_computes(shape: Shape) -> None:
    model, arrays = attention_graph(shape), feeds(shape)
    np.testing.assert_allclose(by_engine(model, arrays), by_chain(model, arrays), atol=5e-5)
