# SPDX-License-Identifier: Apache-2.0
"""The detector without ROS: one set of pictures in, boxes out. The node and the offline evaluation both run this."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.boxes import Boxes, decode_boxes
from qdbev_ros.core.errors import DataError, EngineError
from qdbev_ros.core.geometry import Array, CameraCalibration, Pose
from qdbev_ros.core.memory import MemoryInput, MemoryPolicy, TemporalMemory
from qdbev_ros.core.preprocess import (
    Picture,
    PictureGrid,
    RawPicture,
    decode_picture,
    encode_picture,
    normalise_picture,
    resize_picture,
    shrink_raw,
)
from qdbev_ros.core.projection import lidar_to_image, scale_to_input, stack_lidar2img
from qdbev_ros.core.variant import CAMERAS, Variant

STAGES = ("decode", "preprocess", "engine", "postprocess")


class InferenceOutput(Protocol):
    """What an engine answers: the last decoder layer's class_logits (Q, 10) and boxes (Q, 10), and bev (cells, C)."""

    @property
    def class_logits(self) -> NDArray[np.float32]: ...
    @property
    def boxes(self) -> NDArray[np.float32]: ...
    @property
    def bev(self) -> NDArray[np.float32]: ...


class Engine(Protocol):
    """A loaded package, as `qdbev_ros.engine.load_package` gives it.

    One that takes pictures as codes, too, has a `picture_grid` that is not None.
    """

    @property
    def variant(self) -> Variant: ...

    def infer(
        self,
        images: NDArray[Any],  # (6, 3, H, W) padded; normalised float32, or uint8 codes
        lidar2img: NDArray[np.float32],  # (6, 4, 4) at the network's input scale; zeros for an absent camera
        can_bus: NDArray[np.float32],  # (18,) deltas applied
        prev_bev: NDArray[np.float32] | None,  # (cells, C) as the last call returned it
    ) -> InferenceOutput: ...


class PictureError(DataError):
    """A camera's picture cannot be used; `camera` names it."""

    def __init__(self, camera: str, text: str) -> None:
        super().__init__(f"camera {camera}: {text}")
        self.camera = camera


@dataclass(frozen=True)
class CameraFrame:
    """One camera's part: JPEG or PNG bytes, or raw pixels; ego2global at its stamp."""

    picture: bytes | memoryview | RawPicture
    calibration: CameraCalibration
    ego2global: Pose


@dataclass(frozen=True)
class Frame:
    """One moment. cameras: name -> part, absent cameras left out; ego2global at the reference time `stamp_ns`."""

    stamp_ns: int
    cameras: Mapping[str, CameraFrame]
    ego2global: Pose
    lidar2ego: Pose
    scene: str | None = None
    can_dynamics: Array | None = None


@dataclass(frozen=True)
class FrameResult:
    """boxes in the LIDAR_TOP frame at the reference time; memory as the model got it; stage -> milliseconds."""

    boxes: Boxes
    memory: MemoryInput
    milliseconds: dict[str, float] = field(default_factory=dict)


class Pipeline:
    """Runs frames in order through one engine with one memory. Not for two threads at a time.

    `workers` threads decode and prepare pictures side by side. Pictures that stay whole grey levels go to the engine as
    codes where it takes them: nothing is computed in float then, and the numbers are the same.
    """

    def __init__(self, engine: Engine, policy: MemoryPolicy | None = None, workers: int = 2) -> None:
        self.engine = engine
        self.variant = engine.variant
        self.memory = TemporalMemory(self.variant.temporal, policy)
        self._pool = ThreadPoolExecutor(workers, "picture")
        # OpenCV's own threads have nothing to add to these, and they wait in loops.
        cv2.setNumThreads(0)
        image = self.variant.image
        grid: PictureGrid | None = getattr(engine, "picture_grid", None)
        self._table = grid.table(image) if grid is not None and image.decode == "reduced" else None
        self._grey = 0 if self._table is None or grid is None else grid.zero
        kind = np.float32 if self._table is None else np.uint8
        shape = (len(CAMERAS), 3, image.padded_height, image.padded_width)
        self._images: NDArray[Any] = np.full(shape, self._grey, kind)

    def run(self, frame: Frame) -> FrameResult:
        """Boxes of one frame. Raises PictureError before the memory moves on, so a bad picture costs one frame, and
        EngineError for an answer that is not finite, of which nothing is remembered.
        """
        clock = [time.perf_counter()]
        pictures = self._decode(frame)
        clock.append(time.perf_counter())
        lidar2img = self._prepare(frame, pictures)
        memory = self.memory.step(frame.stamp_ns, frame.ego2global, frame.scene, frame.can_dynamics)
        clock.append(time.perf_counter())
        output = self.engine.infer(self._images, lidar2img, memory.can_bus, memory.prev_bev)
        _require_finite(output)
        self.memory.store(output.bev)
        clock.append(time.perf_counter())
        boxes = decode_boxes(output.class_logits, output.boxes)
        clock.append(time.perf_counter())
        milliseconds = {stage: (b - a) * 1e3 for stage, (a, b) in zip(STAGES, pairwise(clock))}
        return FrameResult(boxes, memory, milliseconds)

    def close(self) -> None:
        """Ends the decoding threads."""
        self._pool.shutdown(wait=True)

    def _decode(self, frame: Frame) -> dict[str, Picture]:
        jobs = {
            name: self._pool.submit(self._decode_one, name, camera) for name, camera in frame.cameras.items()
        }
        return {name: job.result() for name, job in jobs.items()}

    def _decode_one(self, name: str, camera: CameraFrame) -> Picture:
        """The camera's picture at the size of the network's input."""
        calibration, picture = camera.calibration, camera.picture
        try:
            if isinstance(picture, RawPicture):
                height, width = picture.pixels.shape[:2]
                if (width, height) != (calibration.width, calibration.height):
                    expected = f"{calibration.width}x{calibration.height}"
                    raise DataError(f"the picture is {width}x{height} pixels, its CameraInfo says {expected}")
                return shrink_raw(picture, self.variant.image)
            decoded = decode_picture(picture, calibration.width, calibration.height, self.variant.image)
        except DataError as error:
            raise PictureError(name, str(error)) from error
        return resize_picture(decoded, self.variant.image)

    def _prepare(self, frame: Frame, pictures: dict[str, Picture]) -> NDArray[np.float32]:
        """Fills the input images and returns lidar2img (6, 4, 4); the mean colour and zeros for absent cameras."""
        fills = [
            self._pool.submit(self._fill, index, pictures.get(name)) for index, name in enumerate(CAMERAS)
        ]
        matrices: list[Array | None] = []
        for name in CAMERAS:
            camera = frame.cameras.get(name)
            if camera is None:
                matrices.append(None)
                continue
            full = lidar_to_image(camera.calibration, frame.lidar2ego, camera.ego2global, frame.ego2global)
            matrices.append(scale_to_input(full, camera.calibration, self.variant.image))
        for fill in fills:
            fill.result()
        return stack_lidar2img(matrices)

    def _fill(self, index: int, picture: Picture | None) -> None:
        """Writes one camera's part of the input images."""
        if picture is None:
            self._images[index] = self._grey
        elif self._table is None:
            normalise_picture(picture, self.variant.image, self._images[index])
        else:
            encode_picture(picture, self.variant.image, self._table, self._images[index])


def _require_finite(output: InferenceOutput) -> None:
    """Raises EngineError that names what holds NaN or infinite numbers.

    The sum of such numbers is none either, and takes no mask of the map's size; finite ones that add up to more than
    a float32 are no answer.
    """
    parts = {"class_logits": output.class_logits, "boxes": output.boxes, "bev": output.bev}
    with np.errstate(invalid="ignore", over="ignore"):
        wrong = [name for name, part in parts.items() if not np.isfinite(part.sum())]
    if wrong:
        raise EngineError(f"the engine's answer is not finite: {', '.join(wrong)}")
