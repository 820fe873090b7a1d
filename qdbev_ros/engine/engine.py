# SPDX-License-Identifier: Apache-2.0
"""One network ready to run: geometry outside, tensors inside, whatever the backend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.ego_motion import CAN_BUS_SIZE, bev_shift, rotate_bev, rotation_sources
from qdbev_ros.core.errors import DataError, EngineError, install_hint
from qdbev_ros.core.preprocess import PictureGrid
from qdbev_ros.core.projection import VisibleCells, visible_cells
from qdbev_ros.core.variant import CAMERAS, Variant
from qdbev_ros.engine.backends import check_backend, open_runner
from qdbev_ros.engine.package import Package, read_package
from qdbev_ros.engine.runner import Floats, Runner


@dataclass(frozen=True)
class InferenceResult:
    """What the network says about one frame.

    class_logits (Q, 10), boxes (Q, 10) as `core.boxes.decode_boxes` takes them · bev (cells, C): hand it to the next
    frame as prev_bev
    """

    class_logits: Floats
    boxes: Floats
    bev: Floats


class Engine:
    """A package on a backend. Not for several threads at once: it keeps the projection of the last calibration."""

    def __init__(self, package: Package, runner: Runner) -> None:
        self.variant: Variant = package.variant
        self.name = f"{package.variant.name} ({package.path.name})"
        self.description = runner.description
        self.sha256 = package.sha256
        self.picture_grid: PictureGrid | None = getattr(runner, "picture_grid", None)
        self.runner = runner
        self._no_history = np.zeros((self.variant.bev.cells, self.variant.transformer.channels), np.float32)
        self._lidar2img: Floats | None = None
        self._tables: VisibleCells | None = None

    def infer(
        self,
        images: Floats | NDArray[np.uint8],
        lidar2img: Floats,
        can_bus: Floats,
        prev_bev: Floats | None,
    ) -> InferenceResult:
        """One frame.

        images (6, 3, H, W) normalised and padded, in the order of CAMERAS, or uint8 codes of `picture_grid` where that
        is not None · lidar2img (6, 4, 4) from the LIDAR_TOP frame to pixels of the input, all zeros for an absent
        camera · can_bus (18,), deltas applied · prev_bev (cells, C) as the last call returned it, or None.
        Raises DataError where a shape does not fit.
        """
        answer = self.runner.run(self.tensors(images, lidar2img, can_bus, prev_bev))
        return InferenceResult(answer["class_logits"], answer["boxes"], answer["bev"])

    def close(self) -> None:
        """Lets go of the runner, and with it of all memory on the device; there is no answer after this."""
        del self.runner

    def tensors(
        self,
        images: Floats | NDArray[np.uint8],
        lidar2img: Floats,
        can_bus: Floats,
        prev_bev: Floats | None,
    ) -> dict[str, NDArray[Any]]:
        """What `infer` hands to the runner, by name; its arguments are those of `infer`."""
        self._check(images, lidar2img, can_bus, prev_bev)
        bev, temporal = self.variant.bev, self.variant.temporal
        tables = self._visible(lidar2img)
        kind = np.uint8 if images.dtype == np.uint8 else np.float32
        tensors: dict[str, NDArray[Any]] = {
            "images": np.ascontiguousarray(images, kind)[None],
            "points": tables.points[None],
            "cells": tables.cells[None],
            "slots": tables.slots[None],
            "weights": tables.weights[None],
            "can_bus": np.asarray(can_bus, np.float32)[None],
            "shift": np.zeros((1, 2), np.float32) if prev_bev is None else bev_shift(can_bus, bev)[None],
            "use_prev": np.array([0.0 if prev_bev is None else 1.0], np.float32),
        }
        history = self._no_history if prev_bev is None else prev_bev
        degrees = 0.0 if prev_bev is None else float(can_bus[17])
        sources = rotation_sources(degrees, bev, temporal.rotate_center)
        if self.runner.turns_memory:
            return tensors | {"memory": history, "sources": sources[None]}
        return tensors | {"prev_bev": rotate_bev(history, sources)[None]}

    def _visible(self, lidar2img: Floats) -> VisibleCells:
        """Gather tables of the calibration, computed anew only when it changed."""
        if self._tables is None or self._lidar2img is None or not np.array_equal(lidar2img, self._lidar2img):
            self._tables = visible_cells(lidar2img, self.variant.bev, self.variant.image)
            self._lidar2img = np.array(lidar2img)
        return self._tables

    def _check(
        self, images: NDArray[Any], lidar2img: Floats, can_bus: Floats, prev_bev: Floats | None
    ) -> None:
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
        if images.dtype == np.uint8 and self.picture_grid is None:
            raise DataError("images are bytes, this engine takes normalised float32 pictures")


def load_package(path: str | Path, backend: str = "auto", threads: int | None = None) -> Engine:
    """Verifies a `.qdbev` file, makes it ready to run and checks that it computes what it should.

    backend: "auto" takes TensorRT where there is a GPU for it, else ONNX Runtime; or a name of BACKENDS · threads: of
    an engine on the CPU, None leaves it to the backend. The description says which it is and why. Raises PackageError
    for a bad file, EngineError where the backend is unknown, missing or computes something else than the package says.
    """
    check_backend(backend, threads)
    try:
        from qdbev_ros.engine.parity import ensure_parity  # and with it onnx
    except ImportError as error:
        raise EngineError(install_hint(error)) from error
    package = read_package(path)
    opened = open_runner(package, backend, threads)
    engine = Engine(package, opened.runner)
    verdict = ensure_parity(package, engine, opened.key, opened.artefact, threads)
    engine.description = f"{opened.runner.description}{opened.why}; {verdict.summary()}"
    return engine
