# SPDX-License-Identifier: Apache-2.0
"""The memory of past frames: keeps the last BEV map and decides when it must be forgotten."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.ego_motion import EgoState, can_bus_vector, dynamics_from_poses
from qdbev_ros.core.geometry import Array, Pose
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
        self._policy = policy or MemoryPolicy()
        self._previous: EgoState | None = None
        self._scene: str | None = None
        self._bev: NDArray[np.float32] | None = None
        self._age = 0
        self.resets: dict[str, int] = {}

    def reset(self, reason: str) -> None:
        """Forgets everything; `reason` is counted in `resets`. Forgetting nothing counts as well: it was asked for."""
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
        return MemoryInput(can_bus, history, self._age if has_history else 0, gap, reason)

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
        if gap > self._policy.max_gap_s:
            return "gap"
        distance = float(np.linalg.norm(pose.translation - self._previous.pose.translation))
        if distance > self._policy.max_speed * gap:
            return "ego_jump"
        return None
