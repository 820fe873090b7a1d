# SPDX-License-Identifier: Apache-2.0
"""Core boxes as ROS messages: axes, sizes, headings, and markers that vanish."""

from __future__ import annotations

import numpy as np
import pytest
from std_msgs.msg import Header
from visualization_msgs.msg import Marker

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.ros.messages import (
    detection_array,
    marker_array,
    ns_to_stamp,
    pose_from_message,
    stamp_to_ns,
)


def boxes(count: int) -> Boxes:
    """Trucks 2.5 m wide, 10 m long and 3 m high that head along y at 5 m/s."""
    return Boxes(
        centers=np.tile([[4.0, 20.0, 0.5]], (count, 1)),
        sizes=np.tile([[2.5, 10.0, 3.0]], (count, 1)),
        yaws=np.full(count, np.pi / 2),
        velocities=np.tile([[0.0, 5.0]], (count, 1)),
        scores=np.full(count, 0.75),
        labels=np.ones(count, np.int64),
    )


def test_the_boxes_x_axis_is_its_length_and_points_forward() -> None:
    detection = detection_array(Header(frame_id="LIDAR_TOP"), boxes(1)).detections[0]
    size = detection.bbox.size
    assert (size.x, size.y, size.z) == (10.0, 2.5, 3.0)
    assert pose_from_message(detection.bbox.center).yaw() == pytest.approx(np.pi / 2)
    assert (detection.results[0].hypothesis.class_id, detection.results[0].hypothesis.score) == (
        "truck",
        0.75,
    )


def test_nothing_seen_is_an_empty_array_with_a_stamp() -> None:
    header = Header(stamp=ns_to_stamp(123_000_000_456), frame_id="LIDAR_TOP")
    message = detection_array(header, boxes(0))
    assert message.detections == []
    assert stamp_to_ns(message.header.stamp) == 123_000_000_456


def test_markers_that_are_no_longer_used_are_deleted() -> None:
    message = marker_array(Header(frame_id="LIDAR_TOP"), boxes(1), previous=3, lifetime_s=1.5)
    added = {(m.ns, m.id) for m in message.markers if m.action == Marker.ADD}
    deleted = {(m.ns, m.id) for m in message.markers if m.action == Marker.DELETE}
    names = ("body", "heading", "velocity", "label")
    assert added == {(name, 0) for name in names}
    assert deleted == {(name, i) for name in names for i in (1, 2)}


def test_velocity_arrows_span_one_second_of_motion() -> None:
    message = marker_array(Header(), boxes(1), previous=0, lifetime_s=1.0)
    start, end = next(m for m in message.markers if m.ns == "velocity").points
    assert (end.x - start.x, end.y - start.y) == (0.0, 5.0)
