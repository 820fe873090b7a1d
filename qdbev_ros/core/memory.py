# SPDX-License-Identifier: Apache-2.0
"""The memory of past frames: keeps the last BEV map and decides when it must be forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.ego_motion import EgoState, can_bus_vector, dynamics_from_poses
from qdbev_ros.core.geometry import Array, CameraCalibration, Pose
from qdbev_ros.core.variant import TemporalSpec


@dataclass(frozen=True)
class MemoryPolicy:
    """When the past no longer explains the present."""

    max_gap_s: float = 2.0  # models train with 0.5 to 1 s between frames
    max_speed: float = 60.0  # metres per second; a faster ego has jumped


@dataclass(frozen=True)
class MemoryInput:
    """What the model gets for one frame, and what to tell about it.

    can_bus (18,) float32 · prev_bev (cells, C) float32 as the model returned it, or None · age frames remembered ·
    gap_s seconds since the previous frame · reset why the memory was dropped at this frame, or None
    """

    can_bus: NDArray[np.float32]
    prev_bev: NDArray[np.float32] | None
    age: int
    gap_s: float
    reset: str | None


class TemporalMemory:
    """One vehicle's memory. Call `step` before the model and `store` after it, once a frame."""

    def __init__(self, temporal: TemporalSpec, policy: MemoryPolicy | None = None) -> None:
        self._temporal = temporal
        self.policy = policy or MemoryPolicy()
        self._previous: EgoState | None = None
        self._scene: str | None = None
        self._bev: NDArray[np.float32] | None = None
        self._age = 0
        self._forgotten: str | None = None  # why something was forgotten since the last step
        self.resets: dict[str, int] = {}

    def reset(self, reason: str) -> None:
        """Forgets everything; `reason` is counted in `resets`, and told by the next step if there was a past.

        Forgetting nothing counts as well: it was asked for.
        """
        if self._previous is not None:
            self._forgotten = reason
        self._previous, self._bev, self._age = None, None, 0
        self.resets[reason] = self.resets.get(reason, 0) + 1

    def step(
        self, stamp_ns: int, pose: Pose, scene: str | None = None, can_dynamics: Array | None = None
    ) -> MemoryInput:
        """Moves on to the frame at `stamp_ns` with ego2global `pose`.

        scene names the recording where it is known (offline); can_dynamics (9,) are can_bus[7:16] from a CAN bus, used
        by variants whose `temporal.dynamics` is "can". Without one the poses say what they can.
        """
        reason = self._reason_to_forget(stamp_ns, pose, scene)
        if reason is not None:
            self.reset(reason)
        reset, self._forgotten = self._forgotten, None
        previous = self._previous
        gap = 0.0 if previous is None else (stamp_ns - previous.stamp_ns) * 1e-9
        if self._temporal.dynamics == "can" and can_dynamics is not None:
            dynamics = can_dynamics
        else:
            dynamics = dynamics_from_poses(previous, stamp_ns, pose)
        current = EgoState(stamp_ns, pose, dynamics)
        # A frame whose result never came back leaves no BEV; the deltas then belong to no map either.
        has_history = previous is not None and self._bev is not None
        can_bus = can_bus_vector(previous if has_history else None, current, self._temporal)
        self._previous, self._scene = current, scene
        history = self._bev if has_history else None
        self._bev = None
        return MemoryInput(can_bus, history, self._age if has_history else 0, gap, reset)

    def store(self, bev: NDArray[np.float32]) -> None:
        """Keeps the map (cells, C) of the frame that `step` announced."""
        self._bev = bev
        self._age += 1

    def _reason_to_forget(self, stamp_ns: int, pose: Pose, scene: str | None) -> str | None:
        if self._previous is None:
            return None
        if scene != self._scene:
            return "scene_change"
        gap = (stamp_ns - self._previous.stamp_ns) * 1e-9
        if gap <= 0:
            return "time_back"
        if gap > self.policy.max_gap_s:
            return "gap"
        distance = float(np.linalg.norm(pose.translation - self._previous.pose.translation))
        if distance > self.policy.max_speed * gap:
            return "ego_jump"
        return None


class CalibrationWatch:
    """Notices that the rig's calibration changed while driving: a map made with the old one fits no more."""

    max_shift = 0.01  # metres, and as a fraction of the focal length; less is a mount that shakes
    max_turn = 0.002  # of a rotation matrix' entries, about a tenth of a degree

    def __init__(self) -> None:
        self._known: dict[str, tuple[Array, Array]] = {}  # name -> pose (4, 4) and intrinsics (3, 3)

    def changed(self, cameras: Mapping[str, CameraCalibration], lidar2ego: Pose) -> str | None:
        """What differs from the last set that had it: a camera's name, or "model frame"; None where nothing does."""
        now = {
            name: (camera.sensor2ego.matrix(), camera.intrinsics / camera.width)
            for name, camera in cameras.items()
        }
        now["model frame"] = (lidar2ego.matrix(), np.eye(3))
        different = [
            name for name, entry in now.items() if name in self._known and self._differs(name, entry)
        ]
        # Kept as it was where nothing changed: otherwise a slow drift would never be noticed.
        for name, entry in now.items():
            if name not in self._known or different:
                self._known[name] = entry
        return different[0] if different else None

    def _differs(self, name: str, entry: tuple[Array, Array]) -> bool:
        (pose, k), (known_pose, known_k) = entry, self._known[name]
        shift = float(np.linalg.norm(pose[:3, 3] - known_pose[:3, 3]))
        turn = float(np.abs(pose[:3, :3] - known_pose[:3, :3]).max())
        focal = float(np.abs(k - known_k).max() / known_k[0, 0])
        return shift > self.max_shift or turn > self.max_turn or focal > self.max_shift
