# SPDX-License-Identifier: Apache-2.0
"""Between ROS messages and the core's types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.geometry import Pose
from qdbev_ros.core.memory import MemoryInput

FARTHEST_M = 1e9  # of a translation: beyond any map, and sums of such are numbers still


def stamp_to_ns(stamp: Any) -> int:
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def ns_to_stamp(ns: int) -> Time:
    return Time(sec=ns // 1_000_000_000, nanosec=ns % 1_000_000_000)


def pose_from_transform(transform: Any) -> Pose:
    """A geometry_msgs/Transform as the pose of the child in the parent. Raises DataError where it is none."""
    return _pose(transform.rotation, transform.translation)


def pose_from_message(pose: Any) -> Pose:
    """A geometry_msgs/Pose. Raises DataError where it is none."""
    return _pose(pose.orientation, pose.position)


def _pose(r: Any, t: Any) -> Pose:
    pose = Pose(np.array([r.w, r.x, r.y, r.z]), np.array([t.x, t.y, t.z]))
    if np.abs(pose.translation).max() > FARTHEST_M:
        raise DataError(f"the translation {pose.translation.tolist()} is farther than {FARTHEST_M:g} m")
    return pose


@dataclass(frozen=True)
class Answer:
    """What became of one set. missing: camera -> why it is left out; ego_problem: why motion is unknown, or None."""

    stamp_ns: int
    spread_s: float
    boxes: Boxes
    used: tuple[str, ...]
    missing: Mapping[str, str]
    ego_problem: str | None
    memory: MemoryInput

    def lacking(self) -> tuple[str, ...]:
        """All that it had to do without; empty: nothing."""
        cameras = tuple(f"camera {camera}: {reason}" for camera, reason in self.missing.items())
        return cameras if self.ego_problem is None else (*cameras, f"no ego motion: {self.ego_problem}")
