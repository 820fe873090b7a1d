# SPDX-License-Identifier: Apache-2.0
"""Between ROS messages and the core's types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration, Time
from geometry_msgs.msg import Point, Quaternion, Vector3
from geometry_msgs.msg import Pose as PoseMessage
from std_msgs.msg import ColorRGBA, Header
from vision_msgs.msg import Detection3D, Detection3DArray, ObjectHypothesisWithPose
from visualization_msgs.msg import Marker, MarkerArray

from qdbev_ros.core.boxes import Boxes, attribute_name
from qdbev_ros.core.drawing import COLORS
from qdbev_ros.core.geometry import Pose, yaw_quaternion
from qdbev_ros.core.memory import MemoryInput
from qdbev_ros.core.variant import CLASSES

MOVING_ARROW = 0.5  # m/s, below which no velocity arrow is drawn


def stamp_to_ns(stamp: Any) -> int:
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def ns_to_stamp(ns: int) -> Time:
    return Time(sec=ns // 1_000_000_000, nanosec=ns % 1_000_000_000)


def pose_from_transform(transform: Any) -> Pose:
    """A geometry_msgs/Transform as the pose of the child in the parent. Raises DataError where it is none."""
    r, t = transform.rotation, transform.translation
    return Pose(np.array([r.w, r.x, r.y, r.z]), np.array([t.x, t.y, t.z]))


def pose_from_message(pose: Any) -> Pose:
    """A geometry_msgs/Pose. Raises DataError where it is none."""
    r, t = pose.orientation, pose.position
    return Pose(np.array([r.w, r.x, r.y, r.z]), np.array([t.x, t.y, t.z]))


def box_pose(boxes: Boxes, index: int) -> PoseMessage:
    """Centre and heading of one box; its x axis points forward."""
    x, y, z = (float(v) for v in boxes.centers[index])
    w, qx, qy, qz = (float(v) for v in yaw_quaternion(float(boxes.yaws[index])))
    return PoseMessage(position=Point(x=x, y=y, z=z), orientation=Quaternion(x=qx, y=qy, z=qz, w=w))


def box_size(boxes: Boxes, index: int) -> Vector3:
    """x length, y width, z height in metres."""
    width, length, height = (float(v) for v in boxes.sizes[index])
    return Vector3(x=length, y=width, z=height)


def detection_array(header: Header, boxes: Boxes) -> Detection3DArray:
    """Boxes as vision_msgs; bbox.size is (x length, y width, z height) in the box's own frame."""
    message = Detection3DArray(header=header)
    for index in range(len(boxes)):
        detection = Detection3D(header=header)
        hypothesis = ObjectHypothesisWithPose()
        hypothesis.hypothesis.class_id = CLASSES[boxes.labels[index]]
        hypothesis.hypothesis.score = float(boxes.scores[index])
        hypothesis.pose.pose = box_pose(boxes, index)
        detection.results = [hypothesis]
        detection.bbox.center = hypothesis.pose.pose
        detection.bbox.size = box_size(boxes, index)
        message.detections.append(detection)
    return message


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


def object_array(kinds: Any, header: Header, boxes: Boxes, model: str, answer: Answer) -> Any:
    """`boxes`, chosen from the answer's, as qdbev_msgs/DetectedObjectArray; `kinds` is the module qdbev_msgs.msg."""
    kind, memory = kinds.DetectedObjectArray, answer.memory
    message = kind(
        header=header, model=model, cameras_used=list(answer.used), cameras_missing=list(answer.missing),
        missing_reasons=list(answer.missing.values()), set_spread=answer.spread_s,
        ego_motion=answer.ego_problem is None, memory_age=memory.age, memory_gap=float(memory.gap_s),
        memory_reset_reason=memory.reset or "",
    )  # fmt: skip
    message.state = kind.STATE_DEGRADED if answer.lacking() else kind.STATE_RUNNING
    remembered = kind.MEMORY_TRACKING if memory.age else kind.MEMORY_EMPTY
    message.memory_state = kind.MEMORY_RESET if memory.reset else remembered
    for index in range(len(boxes)):
        vx, vy = (float(v) for v in boxes.velocities[index])
        label = int(boxes.labels[index])
        message.objects.append(
            kinds.DetectedObject(
                class_name=CLASSES[label], score=float(boxes.scores[index]), pose=box_pose(boxes, index),
                size=box_size(boxes, index), velocity=Vector3(x=vx, y=vy, z=0.0),
                attribute=attribute_name(label, boxes.velocities[index]),
            )
        )  # fmt: skip
    return message


def marker_array(header: Header, boxes: Boxes, previous: int, lifetime_s: float) -> MarkerArray:
    """Boxes for RViz: body, heading, velocity and label of box i have id i; ids up to `previous` are deleted."""
    message = MarkerArray()
    lifetime = Duration(sec=int(lifetime_s), nanosec=int(lifetime_s % 1 * 1e9))
    for index in range(len(boxes)):
        blue, green, red = (c / 255 for c in COLORS[CLASSES[boxes.labels[index]]])
        color = ColorRGBA(r=red, g=green, b=blue, a=0.9)
        for marker in _markers_of(boxes, index, color):
            marker.header, marker.id, marker.lifetime = header, index, lifetime
            message.markers.append(marker)
    for index in range(len(boxes), previous):
        for name in ("body", "heading", "velocity", "label"):
            message.markers.append(Marker(header=header, ns=name, id=index, action=Marker.DELETE))
    return message


def _markers_of(boxes: Boxes, index: int, color: ColorRGBA) -> list[Marker]:
    pose, size = box_pose(boxes, index), box_size(boxes, index)
    pale = ColorRGBA(r=color.r, g=color.g, b=color.b, a=0.35)
    body = Marker(ns="body", type=Marker.CUBE, pose=pose, scale=size, color=pale)
    x, y, z = (float(v) for v in boxes.centers[index])
    cos, sin = float(np.cos(boxes.yaws[index])), float(np.sin(boxes.yaws[index]))
    center, nose = Point(x=x, y=y, z=z), size.x / 2 + 0.5
    front = Point(x=x + nose * cos, y=y + nose * sin, z=z)
    heading = Marker(
        ns="heading", type=Marker.LINE_STRIP, scale=Vector3(x=0.1), color=color, points=[center, front]
    )
    vx, vy = (float(v) for v in boxes.velocities[index])
    velocity = Marker(ns="velocity", type=Marker.ARROW, color=color, scale=Vector3(x=0.15, y=0.4, z=0.4))
    if np.hypot(vx, vy) < MOVING_ARROW:
        velocity.action = Marker.DELETE
    velocity.points = [center, Point(x=x + vx, y=y + vy, z=z)]
    label = Marker(ns="label", type=Marker.TEXT_VIEW_FACING, scale=Vector3(z=0.7), color=color)
    label.text = f"{CLASSES[boxes.labels[index]]} {boxes.scores[index]:.2f}"
    label.pose.position = Point(x=x, y=y, z=z + size.z / 2 + 0.5)
    for marker in (heading, velocity, label):
        marker.pose.orientation.w = 1.0
    return [body, heading, velocity, label]
