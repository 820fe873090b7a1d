# SPDX-License-Identifier: Apache-2.0
"""TensorRT without a GPU: the real builder (TensorRT-RTX), the engine cache, and the runner's logic on host memory."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdbev_ros.core.errors import EngineError
from qdbev_ros.core.projection import visible_cells
from qdbev_ros.core.variant import load_variant
from qdbev_ros.engine import cuda, tensorrt_build, tensorrt_engine, tensorrt_runner
from qdbev_ros.engine.engine import Engine
from qdbev_ros.engine.package import Package, read_package
from qdbev_ros.engine.parity import judge, make_reference
from qdbev_ros.engine.reference_runner import ReferenceRunner
from qdbev_ros.engine.stage_outputs import with_stage_outputs
from qdbev_ros.engine.tensorrt_build import TableShapes, build_engine, device_graph, row_block
from qdbev_ros.engine.tensorrt_engine import compiled, tensorrt_key
from qdbev_ros.engine.tensorrt_runner import TensorRtRunner, pad_tables
from tests.host_cuda import HOST_TRT, HostCuda, HostEngine
from tests.small_master import small_master, small_variant, write_small_package
from tests.unit.test_engine import frame

TARGET = "SM86"


@pytest.fixture
def package(tmp_path: Path) -> Package:
    write_small_package(tmp_path / "small.qdbev")
    return read_package(tmp_path / "small.qdbev")


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx isn't installed")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QDBEV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_real_builder_takes_the_s8_form_and_the_cache_keeps_it(
    package: Package, rtx: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    key = tensorrt_key(package, rtx, "none SM86")
    assert key.version == f"TensorRT-RTX {rtx.__version__}"
    plan = compiled(package, rtx, key, TARGET)
    assert len(plan) > 1000
    kept = cache / f"tensorrt-{key.digest}" / "engine.plan"
    assert kept.read_bytes() == plan
    real = tensorrt_engine.build_engine
    monkeypatch.setattr(tensorrt_engine, "build_engine", lambda *_: pytest.fail("built again"))
    assert compiled(package, rtx, key, TARGET) == plan
    built = []
    monkeypatch.setattr(tensorrt_engine, "build_engine", lambda *a: built.append(1) or real(*a))
    kept.write_bytes(plan[:-1])  # damaged: built again rather than handed to TensorRT
    assert len(compiled(package, rtx, key, TARGET)) > 1000
    compiled(package, rtx, replace(key, device="another GPU"), TARGET)
    assert len(built) == 2


def test_progress_of_the_build_is_shown(package: Package, rtx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar:
        def __init__(self, **settings: Any) -> None:
            self.total, self.steps, self.settings = None, 0, settings
            bars.append(self)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int = 1) -> None:
            self.steps += count

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            assert text

    monkeypatch.setattr(tensorrt_build, "tqdm", Bar)
    build_engine(rtx, device_graph(package.model), TableShapes.of(package.variant), target=TARGET)
    (bar,) = bars
    assert "TensorRT-RTX" in bar.settings["desc"]
    assert bar.steps == bar.total
    assert bar.steps > 10


def test_a_graph_that_tensorrt_cannot_take_is_refused_with_its_words(rtx: Any) -> None:
    u8 = onnx.load_from_string(small_master())
    for tensor in u8.graph.initializer:  # zero-points are what S8 does without
        if tensor.name == "stem.z":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.int8(3), tensor.name))
    with pytest.raises(
        EngineError, match=r"TensorRT-RTX .* cannot (read the graph|build the engine): ."
    ) as caught:
        build_engine(rtx, u8, TableShapes.of(small_variant()), target=TARGET)
    assert "\n" not in str(caught.value)


def test_a_tensorrt_of_before_strong_typing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(__name__="tensorrt", __version__="8.6.1")
    monkeypatch.setattr(tensorrt_build.importlib, "import_module", lambda _: old)
    with pytest.raises(EngineError, match=r"TensorRT 8\.6\.1 is too old; 10 or later is needed"):
        tensorrt_build.import_tensorrt()


def test_why_tensorrt_cannot_be_imported_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        if name == "tensorrt":
            raise ImportError("libnvinfer.so.10: cannot open shared object file")
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(tensorrt_build.importlib, "import_module", broken)
    with pytest.raises(
        EngineError, match=r"libnvinfer\.so\.10: cannot open .*; No module named 'tensorrt_rtx'"
    ):
        tensorrt_build.import_tensorrt()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 12))
def test_padded_tables_say_the_same(seed: int, block: int) -> None:
    """Cells gather the same rows and rows the same cells; only the number that means nowhere moves along."""
    random = np.random.default_rng(seed)
    variant = small_variant()
    cameras = np.stack([np.eye(4)] * 6).astype(np.float32)
    cameras[:, :2, 3] = random.uniform(0, 8, (6, 2))
    tables = visible_cells(cameras, variant.bev, variant.image)
    arrays = {name: getattr(tables, name)[None] for name in ("points", "cells", "slots", "weights")}
    padded = pad_tables(arrays, 32 + block, variant.bev.cells)
    rows, more = arrays["cells"].shape[2], padded["cells"].shape[2]
    assert more % (32 + block) == 0

    def seen(given: dict[str, np.ndarray]) -> np.ndarray:
        """For every cell and slot, the cell that the row behind it is about; the padding cell where none is."""
        flat = np.append(given["cells"].reshape(-1), variant.bev.cells)
        return flat[given["slots"][0]]

    np.testing.assert_array_equal(seen(padded), seen(arrays))
    np.testing.assert_array_equal(padded["points"][:, :, :rows], arrays["points"])
    assert (padded["cells"][:, :, rows:] == variant.bev.cells).all()


@pytest.mark.parametrize("name", ["nano", "tiny", "small", "base"])
def test_tables_of_every_rig_fit_into_few_shapes(name: str) -> None:
    variant = load_variant(name)
    least, usual, most = TableShapes.of(variant).rows
    assert least <= usual <= most
    assert most >= variant.bev.cells
    assert most // row_block(variant) <= 17


@pytest.fixture
def runner(package: Package) -> TensorRtRunner:
    return on_host(package, HostCuda())


def on_host(package: Package, cuda: HostCuda) -> TensorRtRunner:
    model = device_graph(with_stage_outputs(package.model))
    return TensorRtRunner(HOST_TRT, None, HostEngine(model, cuda, 32), cuda, package.variant)


def test_the_runner_computes_what_the_package_says(package: Package, runner: TensorRtRunner) -> None:
    verdict = judge(package, Engine(package, runner), make_reference(package, 1))
    assert verdict.passed
    assert {r.stage for r in verdict.results} >= {"image features", "BEV"}
    assert max(r.spread for r in verdict.results) < 0.1


def test_the_gate_sees_a_map_that_gets_lost_on_the_device(
    package: Package, runner: TensorRtRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner._cuda, "move", lambda *_: None)
    assert not judge(package, Engine(package, runner), make_reference(package, 1)).passed


def test_the_map_stays_on_the_device_between_frames(package: Package, runner: TensorRtRunner) -> None:
    """What comes back is the array that the runner gave out: nothing is uploaded for it, and the numbers are right."""
    engine = Engine(package, runner)
    plain = Engine(package, ReferenceRunner(package.model, 1))
    first = engine.infer(*frame(1), None)
    uploads = runner._cuda.said.count("upload")
    second = engine.infer(*frame(2), first.bev)
    inputs = len(runner._inputs)
    assert (uploads, runner._cuda.said.count("upload") - uploads) == (inputs, inputs - 1)
    assert runner._cuda.said.count("move") == 1
    wanted = plain.infer(*frame(2), first.bev)
    np.testing.assert_allclose(second.bev, wanted.bev, atol=0.02)
    third = engine.infer(*frame(2), first.bev)  # an older map than the last one: it has to be uploaded
    np.testing.assert_array_equal(third.bev, second.bev)


def test_after_two_frames_of_one_shape_a_recorded_graph_runs(
    package: Package, runner: TensorRtRunner
) -> None:
    engine = Engine(package, runner)
    answers = [engine.infer(*frame(5), None) for _ in range(4)]
    assert runner._cuda.said.count("execute") == 1
    assert runner._cuda.said.count("launch") == 3
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer.class_logits, answers[0].class_logits)
    assert not np.shares_memory(answers[0].bev, answers[1].bev)


def test_buffers_of_shapes_long_unused_are_let_go(
    package: Package, runner: TensorRtRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_runner, "MOST_SHAPES", 1)
    engine = Engine(package, runner)
    tensors = engine.tensors(*frame(5), None)
    runner.run(tensors)
    held = len(runner._cuda.held)
    (shapes,) = runner._bound
    runner._bound[("images", (0,)),] = runner._bound.pop(shapes)  # as if the rig had been another
    runner.run(tensors)
    assert list(runner._bound) == [shapes]
    assert len(runner._cuda.held) == held


def test_a_runner_that_goes_gives_back_all_memory_and_graphs(package: Package) -> None:
    cuda = HostCuda()
    engine = Engine(package, on_host(package, cuda))
    for _ in range(2):
        engine.infer(*frame(5), None)
    kinds = [type(held) for held in cuda.held.values()]
    assert (kinds.count(np.ndarray), kinds.count(list)) == (2 * len(engine.runner._names) - 1, 1)
    engine.close()
    assert not cuda.held


def test_shapes_for_which_there_is_no_room_leave_nothing_behind(
    package: Package, runner: TensorRtRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = runner._cuda
    room = iter(range(1))

    def pinned(shape: tuple[int, ...], kind: np.dtype[Any]) -> np.ndarray:
        if next(room, None) is None:
            raise EngineError("cudaHostAlloc: cudaErrorMemoryAllocation")
        return HostCuda.pinned(cuda, shape, kind)

    monkeypatch.setattr(cuda, "pinned", pinned)
    with pytest.raises(EngineError, match="cudaErrorMemoryAllocation"):
        Engine(package, runner).infer(*frame(5), None)
    assert not cuda.held


def test_every_look_for_a_gpu_gives_its_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[int] = []

    def destroy(stream: int) -> tuple[int]:
        streams.remove(stream)
        return (0,)

    properties = SimpleNamespace(name=b"Orin", major=8, minor=7)
    runtime = SimpleNamespace(
        cudaGetDeviceCount=lambda: (0, 1),
        cudaSetDevice=lambda _: (0,),
        cudaGetDeviceProperties=lambda _: (0, properties),
        cudaStreamCreate=lambda: (0, streams.append(7) or 7),
        cudaStreamDestroy=destroy,
        cudaMemcpyKind=Mock(),
    )
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(cuda, "DRIVER", "libc.so.6")  # there everywhere
    monkeypatch.setattr(cuda, "_installed", lambda _: True)
    assert cuda.missing() is None
    assert not streams
    opened = cuda.Cuda()
    assert (opened.name, streams) == ("Orin SM87", [7])
    del opened
    assert not streams


def test_stage_outputs_stay_on_the_device_unless_asked_for(package: Package, runner: TensorRtRunner) -> None:
    Engine(package, runner).infer(*frame(), None)
    assert runner._cuda.said.count("download") == 3


def test_an_engine_of_something_else_is_refused(package: Package) -> None:
    model = device_graph(package.model)
    del model.graph.output[2]
    cuda = HostCuda()
    with pytest.raises(EngineError, match="answers with"):
        TensorRtRunner(HOST_TRT, None, HostEngine(model, cuda, 32), cuda, package.variant)
