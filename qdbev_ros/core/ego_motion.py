# SPDX-License-Identifier: Apache-2.0
"""Ego motion between two frames: the can_bus vector, and how the previous BEV map is turned and shifted.

Everything here is planar and in the reference's own order (BEVFormer, get_bev_features): the whole map is first turned
about a fixed pixel by nearest-neighbour resampling, then a continuous shift is added to the reference points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.geometry import Array, Pose, wrap_angle
from qdbev_ros.core.variant import BevSpec, TemporalSpec

CAN_BUS_SIZE = 18
GRAVITY = 9.81


@dataclass(frozen=True)
class EgoState:
    """Where the vehicle is: ego2global pose at `stamp_ns`, and the nine dynamic entries can_bus[7:16] if known."""

    stamp_ns: int
    pose: Pose
    dynamics: Array  # (9,) acceleration m/s2, rotation rate rad/s, velocity m/s, all in the vehicle frame


def yaw_0_2pi(pose: Pose) -> float:
    """Absolute yaw in radians, [0, 2 pi): the reference adds 360 degrees where atan2 is negative."""
    yaw = pose.yaw()
    return yaw + 2 * np.pi if yaw < 0 else yaw


def dynamics_from_poses(previous: EgoState | None, stamp_ns: int, pose: Pose) -> Array:
    """can_bus[7:16] from two poses, for vehicles without a CAN bus; zeros where there is no previous frame.

    Speed goes to the vehicle's x axis, yaw rate to z, acceleration is (dv/dt, speed * yaw rate, gravity).
    """
    dynamics = np.zeros(9)
    if previous is None or stamp_ns <= previous.stamp_ns:
        return dynamics
    dt = (stamp_ns - previous.stamp_ns) * 1e-9
    speed = float(np.linalg.norm(pose.translation[:2] - previous.pose.translation[:2])) / dt
    yaw_rate = wrap_angle(pose.yaw() - previous.pose.yaw()) / dt
    # The speed of the very first frame is unknown, so its difference says nothing about acceleration.
    known = bool(previous.dynamics.any())
    dynamics[0:3] = ((speed - previous.dynamics[6]) / dt if known else 0.0, speed * yaw_rate, GRAVITY)
    dynamics[5] = yaw_rate
    dynamics[6] = speed
    return dynamics


def can_bus_vector(
    previous: EgoState | None, current: EgoState, temporal: TemporalSpec
) -> NDArray[np.float32]:
    """The 18 numbers of one frame, deltas applied (BEVFormer's can_bus).

    0:3 translation since the previous frame in global axes (m) · 3:7 ego2global quaternion w x y z · 7:10
    acceleration · 10:13 rotation rate · 13:16 velocity · 16 absolute yaw in radians, 0..2 pi · 17 yaw in degrees
    minus that of the previous frame. Entries 0:3 and 17 are 0 without a previous frame.
    """
    vector = np.zeros(CAN_BUS_SIZE)
    vector[3:7] = current.pose.rotation
    vector[7:16] = current.dynamics
    vector[16] = yaw_0_2pi(current.pose)
    if previous is not None:
        vector[0:3] = current.pose.translation - previous.pose.translation
        delta = np.degrees(vector[16] - yaw_0_2pi(previous.pose))
        vector[17] = np.degrees(wrap_angle(np.radians(delta))) if temporal.wrap_yaw_delta else delta
    return vector.astype(np.float32)


def bev_shift(can_bus: NDArray[np.floating[Any]], bev: BevSpec) -> NDArray[np.float32]:
    """(2,) shift (x, y) as a fraction of the map: the ego's displacement in its current axes, forward = +y.

    can_bus[0:2] is the displacement in global axes, can_bus[16] the absolute yaw; the LIDAR_TOP frame has x right and
    y forward, hence the sine for x and the cosine for y.
    """
    x0, y0, _, x1, y1, _ = bev.pc_range
    dx, dy = float(can_bus[0]), float(can_bus[1])
    length = np.hypot(dx, dy)
    phi = float(can_bus[16]) - np.arctan2(dy, dx)
    return np.array([length * np.sin(phi) / (x1 - x0), length * np.cos(phi) / (y1 - y0)], np.float32)


def rotation_sources(degrees: float, bev: BevSpec, center: tuple[float, float] | None) -> NDArray[np.int64]:
    """(cells,): for each cell of the turned map the cell of the old map it is taken from; -1 outside (zeros).

    The old map is turned by `degrees` counter-clockwise as seen with row 0 on top (clockwise in the x right, y forward
    frame): what stands still does so when the car turns left. `center` is an (x, y) pixel, None the map's centre.
    Float32 and the order of operations follow torchvision's `rotate`, so that ties fall the same way.
    """
    h, w = bev.height, bev.width
    cx, cy = (0.0, 0.0) if center is None else (center[0] - w * 0.5, center[1] - h * 0.5)
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    affine = np.array(
        [[cos, -sin, sin * cy - cos * cx + cx], [sin, cos, -sin * cx - cos * cy + cy]], np.float32
    )
    turn_x, turn_y, offset = affine.T / np.array([0.5 * w, 0.5 * h], np.float32)  # (2,) each
    x = np.arange(w, dtype=np.float32) + np.float32(0.5 - w * 0.5)
    y = np.arange(h, dtype=np.float32) + np.float32(0.5 - h * 0.5)
    # Written out: a matrix product would add in another order, and some cells would come from a neighbour.
    fraction = (x[None, :, None] * turn_x + y[:, None, None] * turn_y + offset).reshape(-1, 2)
    source = np.rint(((fraction + 1) * np.array([w, h], np.float32) - 1) / 2)
    inside = (source >= 0).all(-1) & (source < np.array([w, h])).all(-1)
    index = (source[:, 1] * w + source[:, 0]).astype(np.int64)
    return np.where(inside, index, -1)


def rotate_bev(bev_map: NDArray[np.float32], sources: NDArray[np.int64]) -> NDArray[np.float32]:
    """(cells, C) turned map from (cells, C) and `rotation_sources`; always a new array, the input is kept."""
    turned = bev_map[np.maximum(sources, 0)]
    turned[sources < 0] = 0.0
    return turned
