# SPDX-License-Identifier: Apache-2.0
"""What is kept is worth what was checked of it: another build is checked again, a bad one goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import onnx
import pytest

from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine import cuda, load_package, parity, read_package, tensorrt_engine
from qdbev_ros.engine.engine import Engine
from qdbev_ros.engine.package import Package
from qdbev_ros.engine.stage_outputs import with_stage_outputs
from qdbev_ros.engine.tensorrt_build import device_graph
from tests.host_cuda import HOST_TRT, HostCuda, HostEngine
from tests.small_master import write_small_package
from tests.unit.test_engine import frame
from tests.unit.test_finished_scenes import disk_of
from tests.unit.test_parity import lost_bias
from tests.unit.test_sampling import needs_compiler

Start = Callable[[], Engine]


@pytest.fixture
def package(tmp_path: Path) -> Package:
    write_small_package(tmp_path / "small.qdbev")
    return read_package(tmp_path / "small.qdbev")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QDBEV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def plan(package: Package, wrong: bool = False) -> bytes:
    """What the builder of host_cuda's TensorRT makes: a graph; TensorRT times its kernels, no two need be the same."""
    model = onnx.load_from_string(package.model)
    if wrong:
        lost_bias(model)
    return bytes(device_graph(with_stage_outputs(model.SerializeToString())).SerializeToString())


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The plans of the builds to come."""
    plans: list[bytes] = []
    monkeypatch.setattr(tensorrt_engine, "build_engine", lambda *_: (plans.pop(0), b"times"))
    return plans


@pytest.fixture
def device() -> HostCuda:
    return HostCuda()


@pytest.fixture
def start(package: Package, cache: Path, device: HostCuda, monkeypatch: pytest.MonkeyPatch) -> Start:
    """A start on TensorRT, played by host_cuda; a plan of zeros does not load."""

    def load(content: bytes) -> HostEngine | None:
        return HostEngine(onnx.load_from_string(content), device, 32) if any(content) else None

    runtime = SimpleNamespace(deserialize_cuda_engine=load)
    trt = SimpleNamespace(**vars(HOST_TRT), Logger=Mock(), Runtime=lambda _: runtime)
    monkeypatch.setattr(tensorrt_engine, "import_tensorrt", lambda: trt)
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "Cuda", lambda: device)
    return lambda: load_package(package.path, "tensorrt", 1)


def test_an_engine_that_is_built_again_is_checked_again(
    package: Package, cache: Path, builds: list[bytes], start: Start
) -> None:
    builds += [plan(package), plan(package, wrong=True)]
    start()
    (kept,) = cache.glob("*/engine.plan")
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(EngineError, match="does not compute what the package says"):
        start()
    assert not builds


def test_an_engine_that_is_kept_is_neither_built_nor_checked_again(
    package: Package, builds: list[bytes], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds.append(plan(package))
    start()
    monkeypatch.setattr(parity, "judge", lambda *_: pytest.fail("judged again"))
    start()


@needs_compiler
def test_a_cpu_engine_whose_kernel_another_compiler_built_is_checked_again(
    package: Package, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged, real = [], parity.judge
    monkeypatch.setattr(parity, "judge", lambda *a: judged.append(1) or real(*a))
    other = tmp_path / "other-cc"
    other.write_text('#!/bin/sh\nexec cc "$@" -g\n')
    other.chmod(0o700)
    for compiler in ("cc", "cc", str(other), str(other)):
        monkeypatch.setenv("CC", compiler)
        load_package(package.path, "onnxruntime", 1)
    assert len(judged) == 2


@pytest.mark.parametrize("bad", ["refused", "unloadable"])
def test_a_bad_engine_is_deleted_with_its_timings_and_the_next_start_builds_another(
    package: Package, cache: Path, builds: list[bytes], start: Start, bad: str
) -> None:
    builds += [plan(package, wrong=True) if bad == "refused" else b"\0", plan(package)]
    with pytest.raises(EngineError, match=rf"{cache}/tensorrt-\w+ is deleted, the next start builds"):
        start()
    assert not list(cache.iterdir())
    start()


def test_neither_a_refused_engine_nor_a_closed_one_holds_memory_of_the_device(
    package: Package, builds: list[bytes], start: Start, device: HostCuda
) -> None:
    builds += [plan(package, wrong=True), plan(package)]
    with pytest.raises(EngineError):
        start()
    assert not device.held
    engine = start()
    engine.infer(*frame(5), None)
    assert device.held
    engine.close()
    assert not device.held


def test_a_full_disk_does_not_stop_an_engine_that_is_ready_in_memory(
    package: Package, cache: Path, builds: list[bytes], start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    builds.append(plan(package))
    with disk_of(4):
        assert "TensorRT" in start().description
    assert "engine.plan: cannot be written: File too large" in caplog.text
    assert "parity.json: cannot be written: File too large" in caplog.text
    assert not [path for path in cache.rglob("*") if path.is_file()]
