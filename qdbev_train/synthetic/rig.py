# SPDX-License-Identifier: Apache-2.0
"""The sensor rig of a nuScenes vehicle: six cameras and the roof lidar.

Positions, orientations and intrinsics are those of a real nuScenes car, rounded. Frames: ego = rear axle on the
ground (x forward, y left, z up); camera = OpenCV (x right, y down, z forward); LIDAR_TOP = x right, y forward, z up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.geometry import quaternion_to_matrix
from qdbev_ros.core.variant import CAMERAS

FULL_SIZE = (1600, 900)  # the size that the intrinsics below belong to

# When a camera fires relative to the lidar sweep's stamp, in microseconds (the sweep passes CAM_BACK_LEFT last).
CAMERA_OFFSET_US = {
    "CAM_FRONT_LEFT": -42_000,
    "CAM_FRONT": -35_000,
    "CAM_FRONT_RIGHT": -27_000,
    "CAM_BACK_RIGHT": -19_000,
    "CAM_BACK": -10_000,
    "CAM_BACK_LEFT": 0,
}

# channel: translation in the ego frame (m), rotation sensor -> ego (w, x, y, z), (focal length, cx, cy) in pixels
_CAMERA_FACTS: dict[str, tuple[tuple[float, ...], tuple[float, ...], tuple[float, float, float]]] = {
    "CAM_FRONT": ((1.701, 0.016, 1.511), (0.4998, -0.5030, 0.4998, -0.4974), (1266.417, 816.267, 491.507)),
    "CAM_FRONT_RIGHT": (
        (1.551, -0.493, 1.496),
        (0.2060, -0.2027, 0.6825, -0.6714),
        (1260.847, 807.968, 495.334),
    ),
    "CAM_FRONT_LEFT": (
        (1.524, 0.495, 1.509),
        (0.6757, -0.6736, 0.2121, -0.2112),
        (1272.598, 826.615, 479.752),
    ),
    "CAM_BACK": ((0.028, 0.003, 1.579), (0.5038, -0.4974, -0.4942, 0.5045), (809.221, 829.220, 481.778)),
    "CAM_BACK_LEFT": (
        (1.036, 0.485, 1.591),
        (0.6924, -0.7032, -0.1165, 0.1120),
        (1256.741, 792.112, 492.776),
    ),
    "CAM_BACK_RIGHT": (
        (1.015, -0.481, 1.562),
        (0.1228, -0.1324, -0.7004, 0.6905),
        (1259.514, 807.253, 501.196),
    ),
}
LIDAR_TRANSLATION = (0.944, 0.0, 1.840)
LIDAR_ROTATION = (0.7078, -0.0065, 0.0106, -0.7063)


@dataclass(frozen=True)
class Camera:
    """One pinhole camera of the rig at the rendered size."""

    channel: str
    translation: NDArray[np.float64]  # (3,) in the ego frame
    quaternion: NDArray[np.float64]  # (4,) w, x, y, z, sensor -> ego, unit length
    rotation: NDArray[np.float64]  # (3, 3) the same as a matrix
    intrinsic: NDArray[np.float64]  # (3, 3); a pixel's centre has whole coordinates (OpenCV)
    offset_us: int  # stamp relative to the sample's


def unit_quaternion(values: tuple[float, ...]) -> NDArray[np.float64]:
    """(w, x, y, z) scaled to length one: the facts above are rounded."""
    quaternion = np.asarray(values, dtype=np.float64)
    return quaternion / np.linalg.norm(quaternion)


def scaled_intrinsic(focal: float, cx: float, cy: float, size: tuple[int, int]) -> NDArray[np.float64]:
    """(3, 3) intrinsics at size (width, height) of a camera given at FULL_SIZE.

    Pixel centres are whole numbers, so the image's left edge is -0.5: the edge, not the centre, is what scales.
    """
    sx, sy = size[0] / FULL_SIZE[0], size[1] / FULL_SIZE[1]
    return np.array(
        [[focal * sx, 0, (cx + 0.5) * sx - 0.5], [0, focal * sy, (cy + 0.5) * sy - 0.5], [0, 0, 1.0]]
    )


def cameras(size: tuple[int, int]) -> list[Camera]:
    """The six cameras in CAMERAS order for images of size (width, height)."""
    rig = []
    for channel in CAMERAS:
        translation, rotation, (focal, cx, cy) = _CAMERA_FACTS[channel]
        quaternion = unit_quaternion(rotation)
        rig.append(
            Camera(
                channel,
                np.asarray(translation),
                quaternion,
                quaternion_to_matrix(quaternion),
                scaled_intrinsic(focal, cx, cy, size),
                CAMERA_OFFSET_US[channel],
            )
        )
    return rig
