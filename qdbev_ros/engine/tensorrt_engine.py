# SPDX-License-Identifier: Apache-2.0
"""A compiled TensorRT engine from the cache, or built into it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine.backends import Opened
from qdbev_ros.engine.cache import (
    PLAN,
    SEAL,
    EngineKey,
    discard,
    engine_folder,
    keep,
    read_json,
    sha256,
    timing_file,
)
from qdbev_ros.engine.package import Package
from qdbev_ros.engine.stage_outputs import with_stage_outputs
from qdbev_ros.engine.tensorrt_build import TableShapes, build_engine, device_graph, import_tensorrt, product

if TYPE_CHECKING:
    from qdbev_ros.engine.cuda import Cuda

LOG = logging.getLogger(__name__)


def open_tensorrt(package: Package, cuda: Cuda) -> Opened:
    """The package's engine for this GPU. Raises EngineError where it cannot be built or loaded."""
    from qdbev_ros.engine.tensorrt_runner import TensorRtRunner

    trt = import_tensorrt()
    key = tensorrt_key(package, trt, cuda.name)
    plan = compiled(package, trt, key)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(
            f"{product(trt)} cannot load the engine that it built for {cuda.name}{discard(key)}"
        )
    return Opened(TensorRtRunner(trt, runtime, engine, cuda, package.variant), key, sha256(plan))


def tensorrt_key(package: Package, trt: ModuleType, device: str) -> EngineKey:
    """Another package, TensorRT, GPU or code of ours: another engine."""
    return EngineKey(package.sha256, "tensorrt", product(trt), device)


def compiled(package: Package, trt: ModuleType, key: EngineKey, target: str | None = None) -> bytes:
    """The compiled engine under a key, built and kept where it is not there whole."""
    folder = engine_folder(key)
    kept = None if folder is None else _kept(folder)
    if kept is not None:
        return kept
    timing = b"" if folder is None else _read(timing_file(folder, key)) or b""
    LOG.info("building the engine of %s for %s, which takes minutes", package.path.name, key.device)
    model = device_graph(with_stage_outputs(package.model))
    plan, timing = build_engine(trt, model, TableShapes.of(package.variant), timing, target)
    if folder is not None:
        keep(folder / PLAN, plan)
        keep(folder / SEAL, json.dumps({"sha256": sha256(plan), "bytes": len(plan)}, indent=1).encode())
        if timing:
            keep(timing_file(folder, key), timing)
    return plan


def _kept(folder: Path) -> bytes | None:
    """The kept engine if it is the one that was written."""
    plan, seal = _read(folder / PLAN), read_json(folder / SEAL)
    whole = plan is not None and seal is not None and seal.get("sha256") == sha256(plan)
    return plan if whole else None


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
