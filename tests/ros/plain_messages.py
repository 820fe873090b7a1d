# SPDX-License-Identifier: Apache-2.0
"""The detector's answers as rclpy's own messages, field by field: what the node's encoder must write, slowly."""

from __future__ import annotations

from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration
from geometry_msgs.msg import Point, Pose, Quaternion, Vector3
from std_msgs.msg import ColorRGBA, Header
from vision_msgs.msg import Detection3D, Detection3DArray, ObjectHypothesisWithPose
from visualization_msgs.msg import Marker, MarkerArray

from qdbev_ros.core.boxes import Boxes, attribute_name
from qdbev_ros.core.drawing import COLORS
from qdbev_ros.core.variant import CLASSES
from qdbev_ros.ros.messages import Answer

NAMES = ("body", "heading", "velocity", "label")


def box_pose(boxes: Boxes, index: int) -> Pose:
    """Centre and heading of one box; its x axis points forward."""
    x, y, z = (float(v) for v in boxes.centers[index])
    # Of all angles at once: numpy may give another last bit for one alone.
    sin, cos = float(np.sin(boxes.yaws / 2)[index]), float(np.cos(boxes.yaws / 2)[index])
    return Pose(position=Point(x=x, y=y, z=z), orientation=Quaternion(x=0.0, y=0.0, z=sin, w=cos))


def box_size(boxes: Boxes, index: int) -> Vector3:
    width, length, height = (float(v) for v in boxes.sizes[index])
    return Vector3(x=length, y=width, z=height)


def detection_array(header: Header, boxes: Boxes) -> Detection3DArray:
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


def object_array(kinds: Any, header: Header, boxes: Boxes, model: str, answer: Answer) -> Any:
    """`kinds` is the module qdbev_msgs.msg."""
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
    markers = [_markers_of(boxes, index) for index in range(len(boxes))]
    message = MarkerArray()
    for place in range(len(NAMES)):
        for index, of_box in enumerate(markers):
            marker = of_box[place]
            marker.header, marker.id = header, index
            marker.lifetime = Duration(sec=int(lifetime_s), nanosec=int(lifetime_s % 1 * 1e9))
            message.markers.append(marker)
    for name in NAMES:
        for index in range(len(boxes), previous):
            gone = Marker(header=header, ns=name, id=index, action=Marker.DELETE)
            gone.pose.orientation.w = 1.0
            message.markers.append(gone)
    return message


def _markers_of(boxes: Boxes, index: int) -> list[Marker]:
    blue, green, red = (c / 255 for c in COLORS[CLASSES[boxes.labels[index]]])
    strong, pale = (ColorRGBA(r=red, g=green, b=blue, a=a) for a in (0.9, 0.35))
    pose, size = box_pose(boxes, index), box_size(boxes, index)
    body = Marker(ns="body", type=Marker.CUBE, pose=pose, scale=size, color=pale)
    x, y, z = (float(v) for v in boxes.centers[index])
    cos, sin = float(np.cos(boxes.yaws)[index]), float(np.sin(boxes.yaws)[index])
    center, nose = Point(x=x, y=y, z=z), size.x / 2 + 0.5
    front = Point(x=x + nose * cos, y=y + nose * sin, z=z)
    heading = Marker(ns="heading", type=Marker.LINE_STRIP, scale=Vector3(x=0.1), color=strong)
    heading.points = [center, front]
    vx, vy = (float(v) for v in boxes.velocities[index])
    velocity = Marker(ns="velocity", type=Marker.ARROW, color=strong, scale=Vector3(x=0.15, y=0.4, z=0.4))
    if np.hypot(vx, vy) < 0.5:
        velocity.action = Marker.DELETE
    velocity.points = [center, Point(x=x + vx, y=y + vy, z=z)]
    label = Marker(ns="label", type=Marker.TEXT_VIEW_FACING, scale=Vector3(z=0.7), color=strong)
    label.text = f"{CLASSES[boxes.labels[index]]} {boxes.scores[index]:.2f}"
    label.pose.position = Point(x=x, y=y, z=z + (size.z / 2 + 0.5))
    for marker in (heading, velocity, label):
        marker.pose.orientation.w = 1.0
    return [body, heading, velocity, label]
