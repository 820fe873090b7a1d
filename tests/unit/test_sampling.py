# SPDX-License-Identifier: Apache-2.0
"""Deformable sampling: the kernel computes what the GridSample form computes, and the graph is cut around it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from qdbev_ros.core.errors import EngineError, PackageError
from qdbev_ros.engine import native
from qdbev_ros.engine.deformable import DeformableKernel
from qdbev_ros.engine.graph import Graph
from qdbev_ros.engine.native import KernelError
from qdbev_ros.engine.sampling import DOMAIN, PREFIX, Sampling, define_functions, inline_samplings
from qdbev_ros.engine.stages import cut, split

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(c) for c in native.COMPILERS), reason="there is no C compiler"
)
SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)


def sampling_model(
    heads: int, depth: int, points: int, sizes: list[tuple[int, int]], layers: int = 1
) -> onnx.ModelProto:
    """value, locations and weights in, what was sampled out; with two layers the second one samples the first's."""
    flat = [side for size in sizes for side in size]
    nodes, value = [], "value"
    for layer in range(layers):
        nodes.append(
            helper.make_node(
                PREFIX,
                [value, "locations", "weights"],
                [f"sampled{layer}"],
                domain=DOMAIN,
                heads=heads,
                depth=depth,
                points=points,
                sizes=flat,
            )
        )
        shape = helper.make_node(
            "Constant", [], [f"shape{layer}"], value_ints=[0, -1, heads, depth], name=f"shape{layer}"
        )
        last = "output" if layer == layers - 1 else f"value{layer}"
        nodes += [shape, helper.make_node("Reshape", [f"sampled{layer}", f"shape{layer}"], [last])]
        value = last
    levels, tokens = len(sizes), sum(h * w for h, w in sizes)
    shapes = {
        "value": ["B", tokens, heads, depth],
        "locations": ["B", "Q", heads, levels, points, 2],
        "weights": ["B", "Q", heads, levels, points],
    }
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["B", None, heads, depth])
    bare = helper.make_model(helper.make_graph(nodes, "sampling", inputs, [output]))
    graph = Graph(bare)
    define_functions(graph)
    return graph.finish("test", 21)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def arrays(
    batch: int, queries: int, heads: int, depth: int, points: int, sizes: list[tuple[int, int]], seed: int
) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    levels = len(sizes)
    shape = (batch, queries, heads, levels, points)
    locations = random.uniform(-0.3, 1.3, (*shape, 2)).astype(np.float32)
    # Some exactly on a border, a corner or a pixel's centre.
    exact = random.choice(np.array([0.0, 0.5, 1.0], np.float32), locations.shape)
    locations = np.where(random.random(locations.shape) < 0.3, exact, locations)
    value = random.normal(size=(batch, sum(h * w for h, w in sizes), heads, depth)).astype(np.float32)
    return {"value": value, "locations": locations, "weights": random.random(shape).astype(np.float32)}


def by_kernel(
    kernel: DeformableKernel, feeds: dict[str, np.ndarray], sizes: list[tuple[int, int]]
) -> np.ndarray:
    value, locations, weights = (feeds[name] for name in ("value", "locations", "weights"))
    out = np.full((*weights.shape[:3], value.shape[3]), np.nan, np.float32)
    buffers = value.ctypes.data, locations.ctypes.data, weights.ctypes.data, out.ctypes.data
    kernel(buffers, value.shape, locations.shape, weights.shape, sizes)
    return out


@cache
def kernel(threads: int) -> DeformableKernel:
    return DeformableKernel(threads)


@needs_compiler
@settings(deadline=None, max_examples=30)  # the machine may be busy
@given(
    st.integers(1, 2),
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([1, 5, 16, 32]),
    st.integers(1, 4),
    SIZES,
    st.integers(0, 2**31),
)
def test_the_kernel_computes_what_grid_sample_computes(
    batch: int, queries: int, heads: int, depth: int, points: int, sizes: list[tuple[int, int]], seed: int
) -> None:
    feeds = arrays(batch, queries, heads, depth, points, sizes, seed)
    wanted = run(sampling_model(heads, depth, points, sizes), feeds)["output"]
    for threads in (1, 3):
        # Positions beside a border may differ by the last bit of a float32; a pixel's share then does by a few of them.
        np.testing.assert_allclose(by_kernel(kernel(threads), feeds, sizes), wanted, atol=2e-5)


@needs_compiler
def test_twice_the_same_samples_are_the_same_bits_on_any_number_of_threads() -> None:
    sizes = [(7, 5), (3, 4)]
    feeds = arrays(2, 53, 4, 16, 3, sizes, 1)
    first = by_kernel(kernel(1), feeds, sizes)
    for threads in (1, 2, 3):
        np.testing.assert_array_equal(by_kernel(kernel(threads), feeds, sizes), first)


@needs_compiler
@pytest.mark.parametrize("place", [np.nan, np.inf, -np.inf, 1e30, -1e30])
def test_places_that_are_nowhere_give_nothing(place: float) -> None:
    feeds = arrays(1, 2, 1, 16, 1, [(3, 3)], 0)
    feeds["locations"][0, 0] = place
    assert np.abs(by_kernel(kernel(1), feeds, [(3, 3)])[0, 0]).max() == 0.0


@needs_compiler
@pytest.mark.parametrize("sizes", [[(3, 4)], [(3, 3), (1, 1)], [(3, 3), (-3, 3)], [(0, 0)]])
def test_maps_of_another_size_than_the_values_are_refused(sizes: list[tuple[int, int]]) -> None:
    with pytest.raises(EngineError, match="do not fit"):
        by_kernel(kernel(1), arrays(1, 2, 1, 16, 1, [(3, 3)], 0), sizes)


@needs_compiler
def test_maps_whose_sizes_only_add_up_to_those_of_the_values_are_refused() -> None:
    feeds = arrays(1, 2, 1, 16, 1, [(3, 3), (1, 1)], 0)
    with pytest.raises(EngineError, match="do not fit"):
        by_kernel(kernel(1), feeds, [(20_000, 20_000), (10 - 20_000**2, 1)])


@needs_compiler
def test_fewer_places_than_weights_are_refused() -> None:
    feeds = arrays(1, 2, 1, 16, 2, [(3, 3)], 0)
    feeds["locations"] = feeds["locations"][:, :, :, :, :1]
    with pytest.raises(EngineError, match="do not fit"):
        by_kernel(kernel(1), feeds, [(3, 3)])


@needs_compiler
def test_a_graph_cut_at_its_samplings_computes_what_the_whole_one_computes() -> None:
    """Two layers: the second one's values are what the first one sampled."""
    sizes = [(3, 4)]
    model = sampling_model(2, 16, 2, sizes, layers=2)
    feeds = arrays(1, 12, 2, 16, 2, sizes, 4)
    stages = cut(model)
    assert [len(stage.behind) for stage in stages] == [1, 1, 0]
    tensors = dict(feeds)
    for stage in stages:
        if stage.model is not None:  # here nothing comes before the first sampling
            names = [value.name for value in stage.model.graph.input]
            tensors.update(run(stage.model, {name: tensors[name] for name in names}))
        for s in map(Sampling.of, stage.behind):
            wanted = {"value": s.value, "locations": s.locations, "weights": s.weights}
            sampled = by_kernel(kernel(1), {n: tensors[t] for n, t in wanted.items()}, list(s.sizes))
            tensors[s.output] = sampled.reshape(*sampled.shape[:2], -1)
    np.testing.assert_allclose(tensors["output"], run(model, feeds)["output"], atol=2e-5)
    np.testing.assert_allclose(tensors["output"], run(inline_samplings(model), feeds)["output"], atol=2e-5)


def test_a_graph_without_samplings_stays_whole() -> None:
    plain = inline_samplings(sampling_model(1, 4, 1, [(2, 2)]))
    assert not plain.functions
    (stage,) = cut(plain)
    assert not stage.behind


def test_a_graph_cannot_be_split_where_its_parts_share_what_is_before() -> None:
    model = inline_samplings(sampling_model(1, 4, 1, [(2, 2)]))
    inside = next(n.output[0] for n in model.graph.node if n.op_type == "Mul")
    front, rest = split(model, inside)
    assert [v.name for v in front.graph.output] == [inside]
    assert inside in {v.name for v in rest.graph.input}
    shared = onnx.ModelProto()
    shared.CopyFrom(model)
    shared.graph.node.append(helper.make_node("Neg", ["value"], ["negative"]))
    shared.graph.node.append(helper.make_node("Neg", ["negative"], ["twice"]))
    shared.graph.node.append(helper.make_node("Add", ["twice", "negative"], ["both"]))
    shared.graph.output.append(helper.make_tensor_value_info("both", TensorProto.FLOAT, None))
    with pytest.raises(PackageError, match="cannot be split at 'twice'"):
        split(shared, "twice")


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": None},
        {"heads": 0},
        {"heads": 1.0},
        {"points": [1, 2]},
        {"sizes": [2, -2]},
        {"sizes": [2, 2, 1]},
        {"sizes": "four"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_node_that_only_looks_like_a_sampling_is_refused(changes: dict[str, Any]) -> None:
    attributes = {"heads": 1, "depth": 4, "points": 1, "sizes": [2, 2]} | changes
    node = helper.make_node(PREFIX, ["v", "l", "w"], ["out"], domain=DOMAIN, **attributes)
    with pytest.raises(PackageError, match="no deformable sampling"):
        Sampling.of(node)


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QDBEV_CACHE", str(tmp_path))
    return tmp_path


@needs_compiler
def test_the_kernel_is_compiled_once_and_found_again(no_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = DeformableKernel(1)
    assert len(list(no_cache.glob("*.so"))) == 1

    def never(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(native, "_build", never)
    sizes = [(2, 3)]
    feeds = arrays(1, 4, 2, 16, 2, sizes, 3)
    np.testing.assert_array_equal(
        by_kernel(DeformableKernel(1), feeds, sizes), by_kernel(first, feeds, sizes)
    )


@needs_compiler
def test_a_cache_folder_that_cannot_be_written_costs_compiling_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("QDBEV_CACHE", str(tmp_path / "file" / "cache"))
    feeds = arrays(1, 4, 2, 16, 2, [(2, 3)], 3)
    assert np.isfinite(by_kernel(DeformableKernel(1), feeds, [(2, 3)])).all()


@needs_compiler
def test_a_kernel_that_was_cut_short_is_built_again_and_kept(no_cache: Path) -> None:
    DeformableKernel(1)
    (library,) = no_cache.glob("*.so")
    part = library.read_bytes()[:4096]  # enough for the loader, which then touches what is not there
    library.unlink()  # this process has it in its memory
    library.write_bytes(part)
    code = "from qdbev_ros.engine.deformable import DeformableKernel; DeformableKernel(1)"
    # A process of its own, which a damaged kernel ends without a word. It has $QDBEV_CACHE from this one.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (kept,) = no_cache.iterdir()
    assert kept.read_bytes() != part


@needs_compiler
def test_where_the_kept_kernel_cannot_be_loaded_another_one_is(
    no_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk from which nothing may be run."""
    load = ctypes.CDLL

    def outside(path: str) -> ctypes.CDLL:
        if Path(path).parent == no_cache:
            raise OSError("failed to map segment from shared object: Operation not permitted")
        return load(path)

    monkeypatch.setattr(native.ctypes, "CDLL", outside)
    for _ in range(2):
        DeformableKernel(1)


@needs_compiler
def test_a_compiler_with_arguments_is_taken_as_make_takes_it(
    no_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = next(c for c in native.COMPILERS if shutil.which(c))
    monkeypatch.setattr(native, "COMPILERS", ())
    monkeypatch.setenv("CC", f"env QDBEV_ANY=1 {compiler}")
    DeformableKernel(1)


@needs_compiler
@pytest.mark.parametrize("missing", ["no-such-compiler gcc", "false", "'open"])
def test_a_compiler_that_cannot_be_used_leaves_the_others(
    no_cache: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setenv("CC", missing)
    DeformableKernel(1)


def test_without_a_compiler_the_reason_is_said(no_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "")
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.raises(KernelError, match="no C compiler"):
        DeformableKernel(1)


def test_a_compiler_that_fails_is_quoted(no_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "COMPILERS", ())
    monkeypatch.setenv("CC", "false")
    with pytest.raises(KernelError, match="false cannot build it"):
        DeformableKernel(1)
