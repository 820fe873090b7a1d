# SPDX-License-Identifier: Apache-2.0
"""Runs a compiled TensorRT engine: pinned buffers, one stream, CUDA graphs, the BEV map kept on the device.

The rig decides how many rows the gather tables have. They are padded to a few lengths, and each length gets buffers and
a CUDA graph once: launching one graph in place of hundreds of kernels is what small networks gain most from.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.errors import EngineError
from qdbev_ros.core.preprocess import PictureGrid
from qdbev_ros.core.variant import Variant
from qdbev_ros.engine.cuda import Cuda
from qdbev_ros.engine.master import FEATURES, OUTPUTS
from qdbev_ros.engine.tensorrt_build import product, row_block

# Each set of shapes has an execution context with working memory of its own. A rig keeps to two or three.
MOST_SHAPES = 4
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def pad_tables(tensors: dict[str, NDArray[Any]], block: int, cells: int) -> dict[str, NDArray[Any]]:
    """The gather tables with rows up to a multiple of `block`; what they say stays the same.

    Padding rows point to the cell behind the last (zeros); slots are renumbered, since they count rows of all cameras.
    """
    rows = tensors["cells"].shape[2]
    extra = -rows % block
    if not extra:
        return tensors
    cameras = tensors["cells"].shape[1]
    slots = tensors["slots"]
    nowhere = slots == cameras * rows
    moved = np.where(nowhere, cameras * (rows + extra), slots + slots // rows * extra)
    ends = ((0, 0), (0, 0), (0, extra))
    return tensors | {
        "points": np.pad(tensors["points"], (*ends, (0, 0), (0, 0))),
        "cells": np.pad(tensors["cells"], ends, constant_values=cells),
        "slots": moved.astype(slots.dtype),
    }


@dataclass
class _Bound:
    """Buffers of one set of input shapes, and its graph once there is one."""

    host: dict[str, NDArray[Any]] = field(default_factory=dict)
    device: dict[str, int] = field(default_factory=dict)
    context: Any = None
    runs: int = 0
    graph: Any = None


class TensorRtRunner:
    """One engine on one GPU; its buffers go with it. `stage_outputs` gives the stage outputs as well."""

    turns_memory = True
    picture_grid: PictureGrid | None = None
    stage_outputs = False

    def __init__(self, trt: ModuleType, runtime: Any, engine: Any, cuda: Cuda, variant: Variant) -> None:
        self._trt, self._runtime, self._engine, self._cuda = trt, runtime, engine, cuda
        self._block, self._cells = row_block(variant), variant.bev.cells
        self._names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = trt.TensorIOMode.INPUT
        self._inputs = [n for n in self._names if engine.get_tensor_mode(n) == inputs]
        self._outputs = [n for n in self._names if engine.get_tensor_mode(n) != inputs]
        if set(OUTPUTS) - set(self._outputs):
            raise EngineError(
                f"the TensorRT engine answers with {self._outputs}, expected {list(OUTPUTS)} among them"
            )
        self._bound: dict[Shapes, _Bound] = {}
        # What CUDA handed out knows of no Python object. At the end of the process it goes by itself.
        weakref.finalize(self, _release_all, cuda, self._bound).atexit = False
        self._latest: _Bound | None = None
        self._last_bev: NDArray[np.float32] | None = None
        self.description = f"{product(trt)} on {cuda.name}, int8, memory on the device"

    def run(self, tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """One inference; see `runner.Runner`. The answer's arrays are the caller's."""
        given = pad_tables(tensors, self._block, self._cells)
        bound = self._bind({name: given[name] for name in self._inputs})
        for name in self._inputs:
            if name == "memory":
                self._remember(bound, given[name])
            else:
                np.copyto(bound.host[name], given[name])
                self._cuda.upload(bound.device[name], bound.host[name])
        self._execute(bound)
        wanted = [n for n in self._outputs if self.stage_outputs or not n.startswith(FEATURES)]
        for name in wanted:
            if name not in bound.host:
                bound.host[name] = self._cuda.pinned(*self._layout(bound, name))
            self._cuda.download(bound.host[name], bound.device[name])
        self._cuda.wait()
        self._latest = bound
        answer = {name: bound.host[name].copy() for name in wanted}
        self._last_bev = answer["bev"]
        return answer

    def _remember(self, bound: _Bound, memory: NDArray[np.float32]) -> None:
        """Puts the last frame's map in place: from where it lies on the device if it is the one we gave out last."""
        if memory is self._last_bev and self._latest is not None:
            self._cuda.move(bound.device["memory"], self._latest.device["bev"], memory.nbytes)
        else:
            np.copyto(bound.host["memory"], memory)
            self._cuda.upload(bound.device["memory"], bound.host["memory"])

    def _execute(self, bound: _Bound) -> None:
        """First run as it is (TensorRT sets things up in it), second one recorded, from then on the recording."""
        if bound.graph is not None:
            self._cuda.launch(bound.graph)
        elif bound.runs == 1 and self._may_record(bound):
            self._cuda.wait()
            self._cuda.begin_capture()
            started = bound.context.execute_async_v3(self._cuda.stream)
            bound.graph = self._cuda.end_capture()
            if not started:
                raise EngineError(f"{product(self._trt)} could not start the engine")
            self._cuda.launch(bound.graph)
        elif not bound.context.execute_async_v3(self._cuda.stream):
            raise EngineError(f"{product(self._trt)} could not start the engine")
        bound.runs += 1

    def _may_record(self, bound: _Bound) -> bool:
        ask = getattr(bound.context, "is_stream_capturable", None)  # TensorRT-RTX alone has an opinion
        return ask is None or bool(ask(self._cuda.stream))

    def _bind(self, given: dict[str, NDArray[Any]]) -> _Bound:
        """The buffers of these shapes, made at their first appearance; those not used for longest go for new ones."""
        shapes = tuple((name, array.shape) for name, array in given.items())
        bound = self._bound.pop(shapes, None)
        if bound is None:
            for old in list(self._bound)[: max(0, len(self._bound) - MOST_SHAPES + 1)]:
                _release(self._cuda, self._bound.pop(old))
            bound = self._make_bound(given)
        self._bound[shapes] = bound  # last in the dictionary: used last
        return bound

    def _make_bound(self, given: dict[str, NDArray[Any]]) -> _Bound:
        bound = _Bound(context=self._engine.create_execution_context())
        if bound.context is None:
            raise EngineError(f"{product(self._trt)} has no memory for the engine on {self._cuda.name}")
        for name, array in given.items():
            if not bound.context.set_input_shape(name, array.shape):
                raise EngineError(f"the TensorRT engine takes no {name!r} of shape {array.shape}")
        try:
            for name in self._names:
                shape, kind = self._layout(bound, name)
                bound.device[name] = self._cuda.allocate(int(np.prod(shape)) * kind.itemsize)
                bound.context.set_tensor_address(name, bound.device[name])
                if name in given:
                    bound.host[name] = self._cuda.pinned(shape, kind)
        except EngineError:  # no memory; each frame tries again, which must not add up
            _release(self._cuda, bound)
            raise
        return bound

    def _layout(self, bound: _Bound, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        kind = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
        return tuple(bound.context.get_tensor_shape(name)), kind


def _release_all(cuda: Cuda, bound: dict[Shapes, _Bound]) -> None:
    for each in bound.values():
        _release(cuda, each)


def _release(cuda: Cuda, bound: _Bound) -> None:
    if bound.graph is not None:
        cuda.release(bound.graph)
    for address in bound.device.values():
        cuda.free(address)
    for array in bound.host.values():
        cuda.free_pinned(array)
