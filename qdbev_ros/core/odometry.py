# SPDX-License-Identifier: Apache-2.0
"""The vehicle's motion from odometry, of whichever of its frames that is. No ROS in here."""

from __future__ import annotations

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.geometry import Pose
from qdbev_ros.core.pose_buffer import JUMP_BACK_NS, PoseTrack, TransformTree, TransformUnavailable


class OdometryMotion:
    """Poses of a frame of the vehicle (its own, an IMU's, a lidar's) where the odometry began.

    They stand apart from the transforms: only motion matters, so whatever the odometry calls its own frame is none of
    their parents, and a vehicle's frame that hangs below the odometry's stays where it is.
    """

    def __init__(self, topic: str, base: str, mountings: TransformTree, keep_s: float = 10.0) -> None:
        """topic: for the words. base: the vehicle's frame, to which `mountings` leads from the odometry's."""
        self._topic = topic
        self._base = base
        self._mountings = mountings
        self._frame = base
        self._keep_s = keep_s
        self._track = PoseTrack(keep_s)

    def insert(self, frame: str, stamp_ns: int, pose: Pose) -> None:
        """The pose of `frame`, empty for the vehicle's own. Another frame or time going back starts anew."""
        newest = self._track.stamps[-1:]
        if (frame or self._base) != self._frame or (newest and stamp_ns < newest[0] - JUMP_BACK_NS):
            self._frame, self._track = frame or self._base, PoseTrack(self._keep_s)
        self._track.insert(stamp_ns, pose)

    def forget_after(self, stamp_ns: int) -> None:
        """Time went back to `stamp_ns` elsewhere: poses well after it are of the pass before, and all go."""
        if self._track.stamps and self._track.stamps[-1] > stamp_ns + JUMP_BACK_NS:
            self._track = PoseTrack(self._keep_s)

    def lookup(self, stamp_ns: int) -> Pose:
        """The vehicle's pose at `stamp_ns`. Raises TransformUnavailable, which names topic and frame."""
        if not self._track.stamps:
            raise TransformUnavailable(f"no odometry on {self._topic}", wait=True)
        pose = self._track.lookup(stamp_ns, f"odometry on {self._topic}")
        if self._frame == self._base:
            return pose
        try:
            return pose @ self._mountings.lookup(self._frame, self._base, stamp_ns, rigid=True)
        except TransformUnavailable as error:
            text = f"{self._topic} is of frame {self._frame!r}, from which nothing leads to {self._base!r}: {error}"
            raise TransformUnavailable(text, error.wait) from error
        except DataError as error:
            text = f"odometry on {self._topic} and {self._frame!r} in {self._base!r} add up to no pose"
            raise TransformUnavailable(text, wait=False) from error
