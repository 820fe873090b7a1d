# SPDX-License-Identifier: Apache-2.0
"""A drive that is made up: a rig as nuScenes has it, pictures of its size and weight. For measuring times anywhere."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np

from qdbev_ros.core.geometry import CameraCalibration, Pose, quaternion_multiply, yaw_quaternion
from qdbev_ros.core.pipeline import CameraFrame, Frame
from qdbev_ros.core.variant import CAMERAS

WIDTH, HEIGHT = 1600, 900
# Where the cameras look, in degrees from straight ahead to the left, and their focal lengths in pixels.
_DIRECTIONS = dict(zip(CAMERAS, (0.0, -55.0, 55.0, 180.0, 110.0, -110.0), strict=True))
_FOCAL, _FOCAL_BACK = 1260.0, 810.0
_OPTICAL = np.array([0.5, -0.5, 0.5, -0.5])  # x right, y down, z ahead -> x ahead, y left, z up
_LIDAR2EGO = Pose(yaw_quaternion(-np.pi / 2), np.array([0.94, 0.0, 1.84]))
_STEP_NS = 500_000_000
_EXPOSURE_NS = 7_000_000  # one camera after the other, as a turning lidar triggers them
_SPEED, _TURN, _SWAY = 6.0, 0.05, 0.1  # metres and radians a second, radians
_GRAIN = 1.5  # grey levels
_PICTURES = 2  # of each camera, seen in turn


def made_frame(number: int) -> Frame:
    """Frame `number` of the drive, half a second after the one before; pictures are JPEG bytes of 1600x900."""
    stamp = (number + 1) * _STEP_NS
    cameras = {}
    for index, (name, calibration) in enumerate(_rig().items()):
        exposed = stamp - (len(CAMERAS) - index) * _EXPOSURE_NS
        picture = _picture(index + len(CAMERAS) * (number % _PICTURES))
        cameras[name] = CameraFrame(picture, calibration, _pose(exposed))
    return Frame(stamp, cameras, _pose(stamp), _LIDAR2EGO, "made")


def _pose(stamp_ns: int) -> Pose:
    """ego2global: on a circle, swaying, so that no two frames have the same projections."""
    seconds = stamp_ns * 1e-9
    angle, radius = _TURN * seconds, _SPEED / _TURN
    yaw = angle + _SWAY * np.sin(seconds)
    return Pose(yaw_quaternion(yaw), np.array([radius * np.sin(angle), radius * (1 - np.cos(angle)), 0.0]))


@cache
def _rig() -> dict[str, CameraCalibration]:
    rig = {}
    for name, degrees in _DIRECTIONS.items():
        yaw = np.radians(degrees)
        focal = _FOCAL_BACK if name == "CAM_BACK" else _FOCAL
        k = np.array([[focal, 0, WIDTH / 2], [0, focal, HEIGHT / 2], [0, 0, 1]])
        mount = np.array([0.9 + 0.8 * np.cos(yaw), 0.5 * np.sin(yaw), 1.5])
        pose = Pose(quaternion_multiply(yaw_quaternion(yaw), _OPTICAL), mount)
        rig[name] = CameraCalibration(name, k, WIDTH, HEIGHT, pose)
    return rig


@cache
def _picture(seed: int) -> bytes:
    """Areas, edges and grain: about 150 kB, as much as nuScenes' pictures have; decoding takes its time by bytes."""
    random = np.random.default_rng(seed)
    grey = np.full((HEIGHT, WIDTH, 3), 110.0, np.float32)
    smooth, sharp = cv2.INTER_LINEAR, cv2.INTER_NEAREST
    for columns, contrast, kind in ((8, 60.0, smooth), (40, 40.0, sharp), (200, 14.0, smooth)):
        coarse = random.uniform(-contrast, contrast, (columns * HEIGHT // WIDTH + 1, columns, 3))
        grey += cv2.resize(coarse.astype(np.float32), (WIDTH, HEIGHT), interpolation=kind)
    grey += np.tile(random.normal(0.0, _GRAIN, (HEIGHT // 4, WIDTH // 4, 1)).astype(np.float32), (4, 4, 1))
    picture = np.clip(grey, 0, 255).astype(np.uint8)
    return bytes(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 85])[1])
