# SPDX-License-Identifier: Apache-2.0
"""From a packed master to a compiled TensorRT engine, for TensorRT 10 and 11 and for TensorRT-RTX.

The network is strongly typed: TensorRT may not choose other types than the graph's, and int8 stands where the graph has
Q and DQ. Both products share this API; what differs is asked for by name.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import onnx
from onnx import TensorProto, helper
from tqdm import tqdm

from qdbev_ros.core.errors import EngineError
from qdbev_ros.core.projection import CELL_BLOCK
from qdbev_ros.core.variant import CAMERAS, Variant
from qdbev_ros.engine.cuda import TENSORRT
from qdbev_ros.engine.graph import Graph
from qdbev_ros.engine.lowering_s8 import lower_s8
from qdbev_ros.engine.master import OPSET

LOG = logging.getLogger(__name__)
OLDEST = 10  # the first with strongly typed networks that also know int64
_ROWS, _CAMERAS = ("points", "cells"), ("slots", "weights")


def import_tensorrt() -> ModuleType:
    """TensorRT 10 or later, or TensorRT-RTX. Raises EngineError with the reasons."""
    reasons = []
    for name in TENSORRT:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: of a library that is loaded by its name
            reasons.append(str(error))
            continue
        if name == "tensorrt" and int(module.__version__.split(".")[0]) < OLDEST:
            raise EngineError(f"TensorRT {module.__version__} is too old; {OLDEST} or later is needed")
        return module
    raise EngineError(f"neither {' nor '.join(TENSORRT)} can be imported: {'; '.join(reasons)}")


def is_rtx(trt: ModuleType) -> bool:
    return trt.__name__ == "tensorrt_rtx"


def product(trt: ModuleType) -> str:
    """Name and version, as in descriptions and keys."""
    return f"{'TensorRT-RTX' if is_rtx(trt) else 'TensorRT'} {trt.__version__}"


def device_graph(master: bytes) -> onnx.ModelProto:
    """The S8 form of a master that turns the last frame's map itself.

    In place of prev_bev it takes `memory` (cells, C), the map as it left the last frame, and `sources` (1, cells)
    int64, where each cell comes from, -1 for outside: so the map need not leave the device between two frames.
    """
    graph = Graph(lower_s8(master))
    model = graph.finish("qdbev-s8", OPSET)
    old = next((i for i in model.graph.input if i.name == "prev_bev"), None)
    if old is None:
        return model
    cells, channels = (d.dim_value for d in old.type.tensor_type.shape.dim[1:])
    inputs = [i for i in model.graph.input if i.name != "prev_bev"]
    inputs.append(helper.make_tensor_value_info("memory", TensorProto.FLOAT, [cells, channels]))
    inputs.append(helper.make_tensor_value_info("sources", TensorProto.INT64, [1, cells]))
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    zeros = helper.make_tensor("memory_outside", TensorProto.FLOAT, [1, channels], [0.0] * channels)
    model.graph.initializer.append(zeros)
    # The row of zeros stands last, which is where -1 points to.
    turn = [
        helper.make_node("Concat", ["memory", zeros.name], ["memory_padded"], name="memory_padded", axis=0),
        helper.make_node("Gather", ["memory_padded", "sources"], ["prev_bev"], name="prev_bev", axis=0),
    ]
    nodes = [*turn, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


@dataclass(frozen=True)
class TableShapes:
    """What a rig's gather tables may be: rows a camera and cameras a cell, least, usual, most."""

    rows: tuple[int, int, int]
    cameras: tuple[int, int, int]

    @classmethod
    def of(cls, variant: Variant) -> TableShapes:
        """Six cameras around a vehicle see about a third of the cells each, mostly one camera a cell, at times two."""
        block = row_block(variant)
        most = -(-variant.bev.cells // block) * block
        usual = min(most, -(-variant.bev.cells * 2 // 5 // block) * block)
        return cls((block, usual, most), (1, 2, len(CAMERAS)))


def row_block(variant: Variant) -> int:
    """Rows of the gather tables come in multiples of this: 16 shapes at most, each with a CUDA graph of its own."""
    return max(CELL_BLOCK, -(-variant.bev.cells // 16 // CELL_BLOCK) * CELL_BLOCK)


def build_engine(
    trt: ModuleType,
    model: onnx.ModelProto,
    shapes: TableShapes,
    timing: bytes = b"",
    target: str | None = None,
) -> tuple[bytes, bytes]:
    """(compiled engine, timing cache to keep). Shows progress; takes seconds to minutes.

    timing: what an earlier build left · target: compute capability to build for without a GPU ("SM86"; TensorRT-RTX
    alone can), None for that of this machine. Raises EngineError with TensorRT's own words.
    """
    logger = _logger(trt)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    # TensorRT 11 knows no other networks; the flag may be gone one day.
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        said = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise EngineError(f"{product(trt)} cannot read the graph: {' '.join(said.split())[:500]}")
    config = builder.create_builder_config()
    # TF32 keeps ten bits of a float's mantissa; codes behind it would fall otherwise than in training.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.add_optimization_profile(_profile(builder, network, shapes))
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    # TensorRT-RTX times nothing when it builds, it compiles kernels at the first run.
    cache = None if is_rtx(trt) else config.create_timing_cache(timing)
    if cache is not None:
        config.set_timing_cache(cache, False)
    with tqdm(desc=product(trt), unit=" steps", disable=None) as bar:
        config.progress_monitor = _progress(trt, bar)
        engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineError(f"{product(trt)} cannot build the engine: {logger.last or 'it does not say why'}")
    return bytes(engine), bytes(cache.serialize()) if cache is not None else b""


def _profile(builder: Any, network: Any, shapes: TableShapes) -> Any:
    """The range of every input whose shape depends on the rig."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 not in tuple(tensor.shape):
            continue
        sizes = shapes.rows if tensor.name in _ROWS else shapes.cameras
        profile.set_shape(tensor.name, *(_with_size(tuple(tensor.shape), size) for size in sizes))
    return profile


def _with_size(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    return tuple(size if side == -1 else side for side in shape)


def _logger(trt: ModuleType) -> Any:
    """A logger that keeps the last error for our own message and passes the rest to Python's logging."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.last = ""

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last = " ".join(text.split())[:500]
            LOG.debug("%s: %s", product(trt), text)

    return Logger()


def _progress(trt: ModuleType, bar: tqdm[Any]) -> Any:
    """TensorRT's phases on one bar: its total grows as TensorRT finds out what there is to do."""

    class Progress(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self._left: dict[str, int] = {}

        def phase_start(self, phase: str, _parent: str | None, steps: int) -> None:
            self._left[phase] = steps
            bar.total = (bar.total or 0) + steps
            bar.set_postfix_str(phase.lower(), refresh=False)

        def step_complete(self, phase: str, _step: int) -> bool:
            self._left[phase] = self._left.get(phase, 1) - 1
            bar.update()
            return True  # go on

        def phase_finish(self, phase: str) -> None:
            bar.update(max(self._left.pop(phase, 0), 0))

    return Progress()
