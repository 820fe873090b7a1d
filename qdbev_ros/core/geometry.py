# SPDX-License-Identifier: Apache-2.0
"""Rigid transforms and camera calibration. Quaternions are (w, x, y, z) as in nuScenes; ROS has (x, y, z, w)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.errors import CalibrationError, DataError

Array = NDArray[np.float64]

EXACT = 1e-6  # a number of a camera matrix that must be 0 or 1 may be off by so much


def quaternion_to_matrix(q: Array) -> Array:
    """Rotation matrix (3, 3) of a unit quaternion (w, x, y, z)."""
    w, x, y, z = q
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def quaternion_multiply(a: Array, b: Array) -> Array:
    """Hamilton product: the rotation that applies `b` first, then `a`."""
    aw, ax, ay, az = a
    bw, bx, by, bz = b
    return np.array(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ]
    )


def yaw_quaternion(yaw: float) -> Array:
    """Quaternion of a rotation by `yaw` radians about +z."""
    return np.array([np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)])


def wrap_angle(angle: float) -> float:
    """The same angle in (-pi, pi]."""
    return float(-((-angle + np.pi) % (2 * np.pi) - np.pi))


@dataclass(frozen=True)
class Pose:
    """A rigid transform child -> parent: p_parent = R(rotation) p_child + translation (metres)."""

    rotation: Array  # (4,) unit quaternion w x y z
    translation: Array  # (3,)

    def __post_init__(self) -> None:
        rotation = np.asarray(self.rotation, dtype=np.float64)
        translation = np.asarray(self.translation, dtype=np.float64)
        norm = float(np.linalg.norm(rotation)) if rotation.shape == (4,) else float("nan")
        if not abs(norm - 1) < 1e-2 or translation.shape != (3,) or not np.isfinite(translation).all():
            raise DataError(f"not a pose: rotation {self.rotation!r}, translation {self.translation!r}")
        object.__setattr__(self, "rotation", rotation / norm)
        object.__setattr__(self, "translation", translation)

    @staticmethod
    def identity() -> Pose:
        return Pose(np.array([1.0, 0, 0, 0]), np.zeros(3))

    def matrix(self) -> Array:
        """(4, 4) homogeneous matrix child -> parent."""
        m = np.eye(4)
        m[:3, :3] = quaternion_to_matrix(self.rotation)
        m[:3, 3] = self.translation
        return m

    def inverse(self) -> Pose:
        """parent -> child."""
        conjugate = self.rotation * np.array([1.0, -1, -1, -1])
        return Pose(conjugate, -quaternion_to_matrix(conjugate) @ self.translation)

    def __matmul__(self, other: Pose) -> Pose:
        """self: b -> a, other: c -> b; the product is c -> a."""
        return Pose(
            quaternion_multiply(self.rotation, other.rotation),
            quaternion_to_matrix(self.rotation) @ other.translation + self.translation,
        )

    def yaw(self) -> float:
        """Angle in radians, (-pi, pi], of the rotated x axis in the parent's xy plane."""
        x_axis = quaternion_to_matrix(self.rotation)[:, 0]
        return float(np.arctan2(x_axis[1], x_axis[0]))


def interpolate(a: Pose, b: Pose, t: float) -> Pose:
    """The pose at fraction `t` in [0, 1] from `a` to `b`: slerp for the rotation, linear for the translation."""
    dot = float(a.rotation @ b.rotation)
    end = b.rotation if dot >= 0 else -b.rotation
    angle = np.arccos(min(1.0, abs(dot)))
    if angle < 1e-6:
        rotation = (1 - t) * a.rotation + t * end
    else:
        rotation = (np.sin((1 - t) * angle) * a.rotation + np.sin(t * angle) * end) / np.sin(angle)
    return Pose(rotation / np.linalg.norm(rotation), (1 - t) * a.translation + t * b.translation)


def camera_matrix_problem(name: str, matrix: Array) -> str | None:
    """Why the (3, 3) matrix `name` is none of a rectified pinhole camera; None where it is one, skewed or not."""
    if not np.isfinite(matrix).all():
        return f"{name} holds NaN or infinite numbers"
    no_matrix = f"{name} is no camera matrix"
    if matrix[0, 0] <= 0 or matrix[1, 1] <= 0:
        return f"{no_matrix}, fx = {matrix[0, 0]:g} and fy = {matrix[1, 1]:g} must be positive"
    if abs(matrix[1, 0]) > EXACT:
        return f"{no_matrix}, the first number of its second row is {matrix[1, 0]:g}, not 0"
    if np.abs(matrix[2] - (0, 0, 1)).max() > EXACT:
        return f"{no_matrix}, its last row is {' '.join(f'{v:g}' for v in matrix[2])}, not 0 0 1"
    return None


@dataclass(frozen=True)
class CameraCalibration:
    """A pinhole camera of a rectified picture.

    intrinsics: (3, 3) K in pixels of a picture of (width, height). sensor2ego: camera optical frame (x right,
    y down, z forward) -> vehicle frame base_link (x forward, y left, z up).
    """

    name: str
    intrinsics: Array
    width: int
    height: int
    sensor2ego: Pose

    def __post_init__(self) -> None:
        k = np.asarray(self.intrinsics, dtype=np.float64)
        problem = camera_matrix_problem("K", k) if k.shape == (3, 3) else f"K has the shape {k.shape}"
        if problem is not None:
            raise CalibrationError(f"camera {self.name}: {problem}: {k.tolist()}")
        if self.width < 1 or self.height < 1:
            raise CalibrationError(f"camera {self.name}: picture size {self.width}x{self.height} is empty")
        object.__setattr__(self, "intrinsics", k)
