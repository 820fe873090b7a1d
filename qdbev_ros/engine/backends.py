# SPDX-License-Identifier: Apache-2.0
"""Which engine a package runs on. Each backend is imported only where it is wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from qdbev_ros.core.errors import EngineError, EngineMissing, install_hint
from qdbev_ros.engine.cache import EngineKey, cpu_name
from qdbev_ros.engine.package import Package
from qdbev_ros.engine.runner import Runner


@dataclass(frozen=True)
class Opened:
    """A runner, what its verdict is kept under, and why this one, for the description.

    artefact: SHA-256 of what was compiled for it, which no key tells: the verdict is that of these bytes
    """

    runner: Runner
    key: EngineKey
    artefact: str = ""
    why: str = ""


def check_backend(backend: str, threads: int | None) -> None:
    """Raises EngineError for a name that is none, or a number of threads that cannot run anything."""
    if backend not in BACKENDS:
        raise EngineError(f"unknown engine {backend!r}; use one of {', '.join(BACKENDS)}")
    if threads is not None and threads < 1:
        raise EngineError(f"{threads} threads cannot run anything; use 1 or more")


def open_runner(package: Package, backend: str, threads: int | None) -> Opened:
    """The package on a backend. "auto": TensorRT, then ONNX Runtime."""
    if backend != "auto":
        return _OPEN[backend](package, threads)
    from qdbev_ros.engine.cuda import missing

    # What is missing is a reason to take the next engine. What is there and does not work is none: on a vehicle with a
    # GPU nobody wants to find out by the frame rate.
    reason = missing()
    if reason is None:
        opened = _tensorrt(package, threads)
        why = ", taken because it is the fastest"
    else:
        opened = _onnxruntime(package, threads)
        why = f", because TensorRT is out: {reason}"
    return replace(opened, why=why)


def _onnxruntime(package: Package, threads: int | None) -> Opened:
    try:
        import onnxruntime

        from qdbev_ros.engine.onnxruntime_runner import OnnxRuntimeRunner
        from qdbev_ros.engine.stage_outputs import with_stage_outputs
    except ImportError as error:
        raise EngineMissing(f"the onnxruntime engine cannot run here: {install_hint(error)}") from error
    runner = OnnxRuntimeRunner(with_stage_outputs(package.model), threads)
    # The description tells the threads and whether the deformable kernel could be built.
    key = _cpu_key(package, "onnxruntime", onnxruntime.__version__, runner.description)
    return Opened(runner, key, runner.artefact)


def _openvino(package: Package, threads: int | None) -> Opened:
    try:
        import openvino

        from qdbev_ros.engine.openvino_runner import OpenVinoRunner
        from qdbev_ros.engine.stage_outputs import with_stage_outputs
    except ImportError as error:
        raise EngineMissing(
            f"the openvino engine needs OpenVINO (pip install -r requirements/openvino.txt): {error}"
        ) from error
    runner = OpenVinoRunner(with_stage_outputs(package.model), threads)
    return Opened(runner, _cpu_key(package, "openvino", openvino.__version__, runner.description))


def _tensorrt(package: Package, threads: int | None) -> Opened:
    from qdbev_ros.engine.cuda import Cuda, missing

    reason = missing()
    if reason is not None:
        raise EngineMissing(f"the tensorrt engine cannot run here: {reason}")
    from qdbev_ros.engine.tensorrt_engine import open_tensorrt

    return open_tensorrt(package, Cuda())


def _cpu_key(package: Package, backend: str, version: str, settings: str) -> EngineKey:
    return EngineKey(package.sha256, backend, version, cpu_name(), settings)


_OPEN: dict[str, Callable[[Package, int | None], Opened]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "tensorrt": _tensorrt,
}
BACKENDS = ("auto", *_OPEN)
