# SPDX-License-Identifier: Apache-2.0
"""What a calibration file alone knows of frames, told on /tf_static: RViz cannot place the boxes otherwise."""

from __future__ import annotations

from typing import Any

from geometry_msgs.msg import Quaternion, TransformStamped, Vector3
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from tf2_msgs.msg import TFMessage

from qdbev_ros.core.geometry import Pose
from qdbev_ros.core.pose_buffer import TransformTree
from qdbev_ros.ros.assembly import Frames
from qdbev_ros.ros.calibration_file import RigCalibration
from qdbev_ros.ros.presets import TopicPreset


class Mountings:
    """Model frame and cameras of the calibration file. A frame that others tell of is left to them, right or wrong:
    with two parents or places it would be neither for anyone else on the vehicle.
    """

    def __init__(self, node: Node, preset: TopicPreset, calibration: RigCalibration, frames: Frames) -> None:
        self._node = node
        self._base = frames.base
        given = {preset.image_frame(camera, ""): pose for camera, pose in calibration.extrinsics.items()}
        if calibration.model is not None:
            given[frames.model] = calibration.model
        self._given = {child: pose for child, pose in given.items() if child not in ("", frames.base)}
        self._since_s: float | None = None
        self._publisher: Any = None

    def look(self, tree: TransformTree, now_s: float, patience_s: float) -> None:
        """Called again and again: tells, once, of what nobody has told `patience_s` after the first call."""
        if self._since_s is None:
            self._since_s = now_s
        if not self._given or now_s - self._since_s < patience_s:
            return
        unknown = {child: pose for child, pose in self._given.items() if not tree.has(child)}
        self._given = {}
        if unknown:
            latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
            self._publisher = self._node.create_publisher(TFMessage, "/tf_static", latched)
            transforms = [self._transform(child, pose) for child, pose in unknown.items()]
            self._publisher.publish(TFMessage(transforms=transforms))

    def close(self) -> None:
        if self._publisher is not None:
            self._node.destroy_publisher(self._publisher)

    def _transform(self, child: str, pose: Pose) -> TransformStamped:
        message = TransformStamped(child_frame_id=child)
        message.header.frame_id, message.header.stamp = self._base, self._node.get_clock().now().to_msg()
        x, y, z = (float(value) for value in pose.translation)
        message.transform.translation = Vector3(x=x, y=y, z=z)
        w, x, y, z = (float(value) for value in pose.rotation)
        message.transform.rotation = Quaternion(x=x, y=y, z=z, w=w)
        return message
