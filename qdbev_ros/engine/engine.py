# SPDX-License-Identifier: Apache-2.0
"""One network ready to run: geometry outside, tensors inside, whatever the backend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.ego_motion import CAN_BUS_SIZE, bev_shift, rotate_bev, rotation_sources
from qdbev_ros.core.errors import DataError, EngineError
from qdbev_ros.core.projection import VisibleCells, visible_cells
from qdbev_ros.core.variant import CAMERAS, Variant
from qdbev_ros.engine.package import Package, read_package

BACKENDS = ("auto", "onnxruntime")
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class InferenceResult:
    """What the network says about one frame.

    class_logits (Q, 10), boxes (Q, 10) as `core.boxes.decode_boxes` takes them · bev (cells, C): hand it to the next
    frame as prev_bev
    """

    class_logits: Floats
    boxes: Floats
    bev: Floats


class Runner(Protocol):
    """What a backend has to offer."""

    description: str

    def run(self, tensors: dict[str, NDArray[Any]]) -> dict[str, Floats]: ...


class Engine:
    """A package on a backend. Not for several threads at once: it keeps the projection of the last calibration."""

    def __init__(self, package: Package, runner: Runner) -> None:
        self.variant: Variant = package.variant
        self.name = f"{package.variant.name} ({package.path.name})"
        self.description = runner.description
        self.sha256 = package.sha256
        self._runner = runner
        self._lidar2img: Floats | None = None
        self._tables: VisibleCells | None = None

    def infer(
        self, images: Floats, lidar2img: Floats, can_bus: Floats, prev_bev: Floats | None
    ) -> InferenceResult:
        """One frame.

        images (6, 3, H, W) normalised and padded, in the order of CAMERAS · lidar2img (6, 4, 4) from the LIDAR_TOP
        frame to pixels of the input, all zeros for an absent camera · can_bus (18,), deltas applied ·
        prev_bev (cells, C) as the last call returned it, or None. Raises DataError where a shape does not fit.
        """
        self._check(images, lidar2img, can_bus, prev_bev)
        bev, temporal = self.variant.bev, self.variant.temporal
        if prev_bev is None:
            history = np.zeros((bev.cells, self.variant.transformer.channels), np.float32)
            shift = np.zeros(2, np.float32)
        else:
            sources = rotation_sources(float(can_bus[17]), bev, temporal.rotate_center)
            history, shift = rotate_bev(prev_bev, sources), bev_shift(can_bus, bev)
        tables = self._visible(lidar2img)
        tensors: dict[str, NDArray[Any]] = {
            "images": np.ascontiguousarray(images, np.float32)[None],
            "points": tables.points[None],
            "cells": tables.cells[None],
            "slots": tables.slots[None],
            "weights": tables.weights[None],
            "can_bus": np.asarray(can_bus, np.float32)[None],
            "prev_bev": history[None],
            "shift": shift[None],
            "use_prev": np.array([0.0 if prev_bev is None else 1.0], np.float32),
        }
        return InferenceResult(**self._runner.run(tensors))

    def _visible(self, lidar2img: Floats) -> VisibleCells:
        """Gather tables of the calibration, computed anew only when it changed."""
        if self._tables is None or self._lidar2img is None or not np.array_equal(lidar2img, self._lidar2img):
            self._tables = visible_cells(lidar2img, self.variant.bev, self.variant.image)
            self._lidar2img = np.array(lidar2img)
        return self._tables

    def _check(self, images: Floats, lidar2img: Floats, can_bus: Floats, prev_bev: Floats | None) -> None:
        image, n = self.variant.image, len(CAMERAS)
        wanted = {
            "images": (images, (n, 3, image.padded_height, image.padded_width)),
            "lidar2img": (lidar2img, (n, 4, 4)),
            "can_bus": (can_bus, (CAN_BUS_SIZE,)),
            "prev_bev": (prev_bev, (self.variant.bev.cells, self.variant.transformer.channels)),
        }
        for name, (array, shape) in wanted.items():
            if array is not None and array.shape != shape:
                raise DataError(f"{name} has shape {array.shape}, {self.variant.name} takes {shape}")


def load_package(path: str | Path, backend: str = "auto", threads: int | None = None) -> Engine:
    """Verifies a `.qdbev` file and makes it ready to run.

    backend: "onnxruntime", or "auto" for the best one of this machine · threads: of the engine, None leaves it to the
    backend. Raises PackageError for a bad file, EngineError where the backend is unknown, missing or not up to it.
    """
    if backend not in BACKENDS:
        raise EngineError(f"unknown engine {backend!r}; use one of {', '.join(BACKENDS)}")
    if threads is not None and threads < 1:
        raise EngineError(f"{threads} threads cannot run anything; use 1 or more")
    package = read_package(path)
    try:
        from qdbev_ros.engine.onnxruntime_runner import OnnxRuntimeRunner
    except ImportError as error:
        raise EngineError(
            f"the onnxruntime engine needs onnxruntime and onnx (pip install): {error}"
        ) from error
    return Engine(package, OnnxRuntimeRunner(package.model, threads))
