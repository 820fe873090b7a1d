# SPDX-License-Identifier: Apache-2.0
"""A bag as a drive without an end: in each pass the stamps and the vehicle's motion go on where the last one ended."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Any

from nav_msgs.msg import Odometry
from rclpy.serialization import deserialize_message, serialize_message
from tf2_msgs.msg import TFMessage

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.geometry import Pose
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.messages import ns_to_stamp, pose_from_message, pose_from_transform, stamp_to_ns
from qdbev_ros.ros.presets import TopicPreset

HEADER_FIRST = (
    "sensor_msgs/msg/CompressedImage",
    "sensor_msgs/msg/Image",
    "sensor_msgs/msg/CameraInfo",
)
SECOND = 1_000_000_000
STAMP, STAMP_AT = struct.Struct("<iI"), 4  # std_msgs/Header.stamp, behind CDR's own header


class Endless:
    """Moves messages of a later pass on in time and space; `period_ns` is the length of a pass.

    The messages are held in memory: looking into the bag anew at each pass would make the drive stumble.
    """

    def __init__(self, bag: BagReader, preset: TopicPreset) -> None:
        """Raises DataError where the bag has less than two pictures of the camera that comes first in it."""
        self._fixed, self._base = preset.fixed_frame, preset.base_frame
        self.period_ns = _period_ns(bag, preset)
        self._editors: dict[str, Callable[[bytes, int], bytes]] = {}
        for topic, kind in bag.types.items():
            if kind in HEADER_FIRST:
                self._editors[topic] = self._restamp
            elif kind == "tf2_msgs/msg/TFMessage" and topic != "/tf_static":
                self._editors[topic] = partial(self._move_transforms, self._ride(bag, topic))
            elif kind == "nav_msgs/msg/Odometry":
                messages = [deserialize_message(data, Odometry) for _, _, data in bag.raw([topic])]
                ride = _ride([pose_from_message(message.pose.pose) for message in messages])
                self._editors[topic] = partial(self._move_odometry, ride)
        self.topics = ["/tf_static", *self._editors]  # the others belong to their first pass
        self.messages = list(bag.raw(self.topics))  # (topic, log time in ns, CDR bytes)

    def message(self, topic: str, data: bytes, passes: int) -> bytes:
        """The message as it is after `passes` passes."""
        editor = self._editors.get(topic)
        return data if editor is None or not passes else editor(data, passes)

    def _restamp(self, data: bytes, passes: int) -> bytes:
        if len(data) < STAMP_AT + STAMP.size:  # cut off: whoever takes it can say so
            return data
        seconds, nanoseconds = STAMP.unpack_from(data, STAMP_AT)
        later = divmod(seconds * SECOND + nanoseconds + passes * self.period_ns, SECOND)
        return data[:STAMP_AT] + STAMP.pack(*later) + data[STAMP_AT + STAMP.size :]

    def _ride(self, bag: BagReader, topic: str) -> Pose:
        """Of the vehicle, from the first of its transforms to the last."""
        messages = [deserialize_message(data, TFMessage) for _, _, data in bag.raw([topic])]
        ego = [item for message in messages for item in message.transforms if self._is_ego(item)]
        ego.sort(key=lambda item: stamp_to_ns(item.header.stamp))
        return _ride([pose_from_transform(item.transform) for item in ego])

    def _is_ego(self, item: Any) -> bool:
        return bool(item.header.frame_id == self._fixed and item.child_frame_id == self._base)

    def _move_transforms(self, ride: Pose, data: bytes, passes: int) -> bytes:
        message = deserialize_message(data, TFMessage)
        for item in message.transforms:
            self._later(item.header, passes)
            if self._is_ego(item):
                moved = _times(ride, passes) @ pose_from_transform(item.transform)
                _set(item.transform.translation, item.transform.rotation, moved)
        return bytes(serialize_message(message))

    def _move_odometry(self, ride: Pose, data: bytes, passes: int) -> bytes:
        message = deserialize_message(data, Odometry)
        self._later(message.header, passes)
        pose = message.pose.pose
        _set(pose.position, pose.orientation, _times(ride, passes) @ pose_from_message(pose))
        return bytes(serialize_message(message))

    def _later(self, header: Any, passes: int) -> None:
        header.stamp = ns_to_stamp(stamp_to_ns(header.stamp) + passes * self.period_ns)


def _period_ns(bag: BagReader, preset: TopicPreset) -> int:
    """A whole number of the cameras' periods, and more than the bag's length."""
    topic = bag.first_topic(preset.image_topics())
    times = [time for _, time, _ in bag.raw([topic])]
    if len(times) < 2:
        raise DataError(
            f"bag {bag.path} has less than two pictures on {topic}: it cannot go on without an end"
        )
    step = (times[-1] - times[0]) // (len(times) - 1)
    return step * (1 + round(bag.duration_s * 1e9) // step)


def _ride(poses: list[Pose]) -> Pose:
    """From where the vehicle starts to where it ends, in the fixed frame."""
    return poses[-1] @ poses[0].inverse() if poses else Pose.identity()


def _times(step: Pose, count: int) -> Pose:
    """`step` again and again; squaring keeps an hour's passes quick and exact."""
    result, power = Pose.identity(), step
    while count:
        if count & 1:
            result = power @ result
        power, count = power @ power, count >> 1
    return result


def _set(position: Any, rotation: Any, pose: Pose) -> None:
    position.x, position.y, position.z = (float(v) for v in pose.translation)
    rotation.w, rotation.x, rotation.y, rotation.z = (float(v) for v in pose.rotation)
