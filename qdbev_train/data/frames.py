# SPDX-License-Identifier: Apache-2.0
"""One key frame of a nuScenes-format data set as typed, frozen values, and its mirror image. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.geometry import Array, CameraCalibration, Pose, quaternion_multiply, yaw_quaternion
from qdbev_ros.core.projection import lidar_to_image
from qdbev_ros.core.variant import CAMERAS


@dataclass(frozen=True)
class CameraFrame:
    """One camera's picture of a key frame: file, time of exposure (ns) and ego2global at that time."""

    calibration: CameraCalibration
    image: Path
    stamp_ns: int
    ego2global: Pose

    def read(self) -> bytes:
        """The file's bytes (JPEG); DataError where it cannot be read."""
        try:
            return self.image.read_bytes()
        except OSError as error:
            raise DataError(f"{self.image}: {error.strerror or error}; is the data set complete?") from error


@dataclass(frozen=True)
class Annotations:
    """K annotated boxes of the ten detection classes in the LIDAR_TOP frame at the reference time.

    boxes: scores are 1, an unknown velocity is NaN · instances (K,) tokens, the same for an object in every frame ·
    attributes (K,) nuScenes attribute names, "" where there is none · points (K,) lidar plus radar points inside ·
    visibility (K,) nuScenes level 1 (0 to 40 % visible) to 4 (80 to 100 %), 0 where unknown
    """

    boxes: Boxes
    instances: tuple[str, ...]
    attributes: tuple[str, ...]
    points: NDArray[np.int64]
    visibility: NDArray[np.int64]


@dataclass(frozen=True)
class Frame:
    """One key frame ("sample"). The reference time is that of LIDAR_TOP; cameras are in CAMERAS order.

    can_dynamics (9,): acceleration m/s2, rotation rate rad/s, velocity m/s of the CAN bus, None without a CAN file.
    """

    sample_token: str
    scene: str
    stamp_ns: int
    lidar2ego: Pose
    ego2global: Pose
    cameras: tuple[CameraFrame, ...]
    annotations: Annotations
    can_dynamics: Array | None

    @property
    def lidar2global(self) -> Pose:
        return self.ego2global @ self.lidar2ego

    def lidar2img(self, camera: CameraFrame) -> Array:
        """(4, 4) LIDAR_TOP frame at the reference time -> pixels of the camera's own picture."""
        return lidar_to_image(camera.calibration, self.lidar2ego, camera.ego2global, self.ego2global)


def turned(frame: Frame, yaw: float) -> Frame:
    """The same frame in a global frame turned by `yaw` radians: what is seen stays, the absolute heading turns."""
    turn = Pose(yaw_quaternion(yaw), np.zeros(3))
    cameras = tuple(replace(c, ego2global=turn @ c.ego2global) for c in frame.cameras)
    return replace(frame, ego2global=turn @ frame.ego2global, cameras=cameras)


def mirrored(frame: Frame) -> Frame:
    """The frame of the mirrored world: left and right exchanged in everything, as if driven on the other side.

    Pictures have to be flipped left-right as they are read. Cameras exchange places (CAM_FRONT_LEFT's picture becomes
    CAM_FRONT_RIGHT's), the ego's y axis and the global y axis are mirrored, and so is x of the LIDAR_TOP frame.
    """
    by_name = {c.calibration.name: c for c in frame.cameras}
    cameras = tuple(_mirrored_camera(by_name[_other_side(name)], name) for name in CAMERAS)
    boxes = frame.annotations.boxes
    flip = np.array([-1.0, 1.0, 1.0])
    mirrored_boxes = replace(
        boxes, centers=boxes.centers * flip, yaws=np.pi - boxes.yaws, velocities=boxes.velocities * flip[:2]
    )
    dynamics = frame.can_dynamics
    if dynamics is not None:
        # The rotation rate is a pseudo-vector: its y entry stays where that of a plain vector turns round.
        dynamics = dynamics * np.array([1, -1, 1, -1, 1, -1, 1, -1, 1])
    return replace(
        frame,
        lidar2ego=_mirrored_sensor(frame.lidar2ego),
        ego2global=_mirrored_pose(frame.ego2global),
        cameras=cameras,
        annotations=replace(frame.annotations, boxes=mirrored_boxes),
        can_dynamics=dynamics,
    )


def _mirrored_pose(pose: Pose) -> Pose:
    """S pose S with S = diag(1, -1, 1): both frames have their y axis mirrored."""
    return Pose(pose.rotation * np.array([1, -1, 1, -1]), pose.translation * np.array([1, -1, 1]))


def _mirrored_sensor(pose: Pose) -> Pose:
    """S pose M with M = diag(-1, 1, 1): for sensors with x to the right. S M turns by pi about z."""
    half_turn = np.array([0.0, 0.0, 0.0, 1.0])
    mirror = _mirrored_pose(pose)
    return Pose(quaternion_multiply(mirror.rotation, half_turn), mirror.translation)


def _mirrored_camera(camera: CameraFrame, name: str) -> CameraFrame:
    old = camera.calibration
    k = old.intrinsics.copy()
    k[0, 2] = old.width - k[0, 2]
    calibration = CameraCalibration(name, k, old.width, old.height, _mirrored_sensor(old.sensor2ego))
    return replace(camera, calibration=calibration, ego2global=_mirrored_pose(camera.ego2global))


def _other_side(name: str) -> str:
    if name.endswith("_LEFT"):
        return name.replace("_LEFT", "_RIGHT")
    return name.replace("_RIGHT", "_LEFT")
