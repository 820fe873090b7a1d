# SPDX-License-Identifier: Apache-2.0
"""A compiled TensorRT engine from the cache, or built into it."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine.cache import EngineKey, engine_folder, read_json, write_atomically
from qdbev_ros.engine.package import Package
from qdbev_ros.engine.stage_outputs import with_stage_outputs
from qdbev_ros.engine.tensorrt_build import TableShapes, build_engine, device_graph, import_tensorrt, product

if TYPE_CHECKING:
    from qdbev_ros.engine.cuda import Cuda
    from qdbev_ros.engine.runner import Runner

LOG = logging.getLogger(__name__)
ENGINE, SEAL, TIMING = "engine.plan", "engine.json", "timing.cache"


def open_tensorrt(package: Package, cuda: Cuda) -> tuple[Runner, EngineKey]:
    """The package's engine for this GPU and the key that it is kept under."""
    from qdbev_ros.engine.tensorrt_runner import TensorRtRunner

    trt = import_tensorrt()
    key = tensorrt_key(package, trt, cuda.name)
    plan = compiled(package, trt, key)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"{product(trt)} cannot load the engine that it built for {cuda.name}")
    return TensorRtRunner(trt, runtime, engine, cuda, package.variant), key


def tensorrt_key(package: Package, trt: ModuleType, device: str) -> EngineKey:
    """Another package, TensorRT, GPU or code of ours: another engine."""
    return EngineKey(package.sha256, "tensorrt", product(trt), device)


def compiled(package: Package, trt: ModuleType, key: EngineKey, target: str | None = None) -> bytes:
    """The compiled engine under a key, built and kept where it is not there whole."""
    folder = engine_folder(key)
    kept = None if folder is None else _kept(folder)
    if kept is not None:
        return kept
    timing_file = None if folder is None else folder.parent / f"{_plain(key.version, key.device)}-{TIMING}"
    timing = timing_file.read_bytes() if timing_file is not None and timing_file.is_file() else b""
    LOG.info("building the engine of %s for %s; this is done once", package.path.name, key.device)
    model = device_graph(with_stage_outputs(package.model))
    plan, timing = build_engine(trt, model, TableShapes.of(package.variant), timing, target)
    if folder is not None:
        write_atomically(folder / ENGINE, plan)
        seal: dict[str, Any] = {"sha256": hashlib.sha256(plan).hexdigest(), "bytes": len(plan)}
        write_atomically(folder / SEAL, _json(seal))
        if timing_file is not None and timing:
            write_atomically(timing_file, timing)
    return plan


def _kept(folder: Path) -> bytes | None:
    """The kept engine if it is the one that was written."""
    seal = read_json(folder / SEAL)
    try:
        plan = (folder / ENGINE).read_bytes()
    except OSError:
        return None
    whole = seal is not None and seal.get("sha256") == hashlib.sha256(plan).hexdigest()
    return plan if whole else None


def _plain(*words: str) -> str:
    return "-".join("".join(c if c.isalnum() else "_" for c in word) for word in words)


def _json(content: dict[str, Any]) -> bytes:
    import json

    return json.dumps(content, indent=1).encode()
