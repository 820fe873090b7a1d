# SPDX-License-Identifier: Apache-2.0
"""Answers as serialised messages: what rclpy writes, to the bit; and what they say: axes, sizes, vanishing markers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from geometry_msgs.msg import Pose as PoseMessage
from geometry_msgs.msg import Transform
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from rclpy.serialization import deserialize_message, serialize_message
from std_msgs.msg import Header
from vision_msgs.msg import Detection3DArray
from visualization_msgs.msg import Marker, MarkerArray

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.errors import ConfigError, DataError
from qdbev_ros.core.memory import MemoryInput
from qdbev_ros.core.variant import CAMERAS, CLASSES
from qdbev_ros.ros.encode import check_definition, encode_detections, encode_markers, encode_objects
from qdbev_ros.ros.messages import Answer, ns_to_stamp, pose_from_message, pose_from_transform, stamp_to_ns
from tests.ros import plain_messages

qdbev_msgs = pytest.importorskip("qdbev_msgs.msg")

STAMP = 1_700_000_000_123_456_789
METRES = st.floats(-1e3, 1e3)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9)


def trucks(count: int) -> Boxes:
    """Trucks 2.5 m wide, 10 m long and 3 m high that head along y at 5 m/s."""
    return Boxes(
        centers=np.tile([[4.0, 20.0, 0.5]], (count, 1)),
        sizes=np.tile([[2.5, 10.0, 3.0]], (count, 1)),
        yaws=np.full(count, np.pi / 2),
        velocities=np.tile([[0.0, 5.0]], (count, 1)),
        scores=np.full(count, 0.75),
        labels=np.ones(count, np.int64),
    )


@st.composite
def any_boxes(draw: st.DrawFn) -> Boxes:
    count = draw(st.integers(0, 5))

    def numbers(low: float, high: float, *columns: int) -> Any:
        return draw(arrays.arrays(np.float64, (count, *columns), elements=st.floats(low, high)))

    labels = draw(arrays.arrays(np.int64, count, elements=st.integers(0, len(CLASSES) - 1)))
    return Boxes(
        numbers(-61, 61, 3),
        numbers(0.01, 20, 3),
        numbers(-4, 4),
        numbers(-20, 20, 2),
        numbers(0, 1),
        labels,
    )


@st.composite
def any_answer(draw: st.DrawFn) -> Answer:
    used = draw(st.lists(st.sampled_from(CAMERAS), unique=True))
    missing = {camera: draw(TEXT) for camera in CAMERAS if camera not in used}
    reset, age = draw(st.sampled_from([None, "gap", "service"])), draw(st.integers(0, 2**32 - 1))
    memory = MemoryInput(np.zeros(18, np.float32), None, age, draw(st.floats(0, 99)), reset)
    return Answer(
        draw(st.integers(0, 2**31 * 10**9 - 1)), draw(st.floats(0, 1)), draw(any_boxes()), tuple(used), missing,
        draw(st.none() | TEXT), memory,
    )  # fmt: skip


def assert_rclpy_writes(message: Any, data: bytes) -> None:
    """`data` is what rclpy makes of `message`, but for padding, which rclpy leaves as its memory happens to be."""
    plain, kind = serialize_message(message), type(message)
    assert type(data) is bytes
    assert len(data) <= len(plain) < len(data) + 8, "some middleware pads the end"
    assert deserialize_message(data, kind) == deserialize_message(plain, kind)
    different = sum(a != b for a, b in zip(data, plain))
    # At most as among nothing but empty texts: four bytes of length, one of end, three of padding.
    assert different == sum(a != b and a == 0 for a, b in zip(data, plain)) <= len(data) * 3 / 8


@settings(derandomize=True, database=None, max_examples=60, deadline=None)
@given(any_answer(), TEXT, TEXT)
def test_the_encoder_writes_what_rclpy_writes(answer: Answer, frame: str, model: str) -> None:
    header = Header(stamp=ns_to_stamp(answer.stamp_ns), frame_id=frame)
    plain = plain_messages.detection_array(header, answer.boxes)
    assert_rclpy_writes(plain, encode_detections(answer.stamp_ns, frame, answer.boxes))
    array = plain_messages.object_array(qdbev_msgs, header, answer.boxes, model, answer)
    kind = qdbev_msgs.DetectedObjectArray
    assert_rclpy_writes(array, encode_objects(kind, frame, answer.boxes, model, answer))


@settings(derandomize=True, database=None, max_examples=40, deadline=None)
@given(any_boxes(), TEXT, st.integers(0, 6), st.floats(0.01, 100))
def test_the_encoder_writes_rclpys_markers(
    boxes: Boxes, frame: str, previous: int, lifetime_s: float
) -> None:
    plain = plain_messages.marker_array(
        Header(stamp=ns_to_stamp(STAMP), frame_id=frame), boxes, previous, lifetime_s
    )
    assert_rclpy_writes(plain, encode_markers(STAMP, frame, boxes, previous, lifetime_s))


def test_three_hundred_boxes_of_all_classes_are_what_rclpy_writes() -> None:
    rng = np.random.default_rng(4)
    boxes = Boxes(
        rng.normal(0, 20, (300, 3)), rng.uniform(0.5, 5, (300, 3)), rng.uniform(-3, 3, 300),
        rng.normal(0, 3, (300, 2)), rng.uniform(0, 1, 300), rng.integers(0, 10, 300),
    )  # fmt: skip
    header = Header(stamp=ns_to_stamp(STAMP), frame_id="LIDAR_TOP")
    plain = plain_messages.detection_array(header, boxes)
    assert_rclpy_writes(plain, encode_detections(STAMP, "LIDAR_TOP", boxes))


def test_padding_is_zero_so_that_equal_answers_are_equal_bytes() -> None:
    assert encode_detections(STAMP, "odd", trucks(3)) == encode_detections(STAMP, "odd", trucks(3))
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    data = encode_markers(STAMP, "odd", trucks(3), 5, 1.5)
    message = store.deserialize_cdr(data, "visualization_msgs/msg/MarkerArray")
    assert bytes(store.serialize_cdr(message, "visualization_msgs/msg/MarkerArray")) == data


def test_another_definition_of_a_message_is_refused_by_name() -> None:
    sample = encode_detections(STAMP, "LIDAR_TOP", trucks(1))
    check_definition(Detection3DArray, sample)
    with pytest.raises(ConfigError, match="visualization_msgs/MarkerArray as installed has other fields"):
        check_definition(MarkerArray, sample)
    with pytest.raises(ConfigError, match="builtin_interfaces/Time as installed has other fields"):
        check_definition(Time, sample)


def test_the_boxes_x_axis_is_its_length_and_points_forward() -> None:
    data = encode_detections(STAMP, "LIDAR_TOP", trucks(1))
    detection = deserialize_message(data, Detection3DArray).detections[0]
    size = detection.bbox.size
    assert (size.x, size.y, size.z) == (10.0, 2.5, 3.0)
    assert pose_from_message(detection.bbox.center).yaw() == pytest.approx(np.pi / 2)
    hypothesis = detection.results[0].hypothesis
    assert (hypothesis.class_id, hypothesis.score) == ("truck", 0.75)


def test_nothing_seen_is_an_empty_array_with_a_stamp() -> None:
    message = deserialize_message(
        encode_detections(123_000_000_456, "LIDAR_TOP", trucks(0)), Detection3DArray
    )
    assert message.detections == []
    assert stamp_to_ns(message.header.stamp) == 123_000_000_456


def markers(boxes: Boxes, previous: int) -> list[Marker]:
    return deserialize_message(encode_markers(STAMP, "LIDAR_TOP", boxes, previous, 1.5), MarkerArray).markers


def test_markers_that_are_no_longer_used_are_deleted() -> None:
    found = markers(trucks(1), previous=3)
    added = {(m.ns, m.id) for m in found if m.action == Marker.ADD}
    deleted = {(m.ns, m.id) for m in found if m.action == Marker.DELETE}
    names = ("body", "heading", "velocity", "label")
    assert added == {(name, 0) for name in names}
    assert deleted == {(name, i) for name in names for i in (1, 2)}


def test_velocity_arrows_span_one_second_of_motion() -> None:
    start, end = next(m for m in markers(trucks(1), previous=0) if m.ns == "velocity").points
    assert (end.x - start.x, end.y - start.y) == (0.0, 5.0)


@pytest.mark.parametrize("metres", [1.1e9, -1.7e308])
def test_a_translation_that_no_vehicle_has_is_refused(metres: float) -> None:
    transform, pose = Transform(), PoseMessage()
    transform.translation.y = pose.position.y = metres
    for read in (lambda: pose_from_transform(transform), lambda: pose_from_message(pose)):
        with pytest.raises(DataError, match="farther than"):
            read()
    transform.translation.y = pose.position.y = 6.4e6  # of an earth-centred frame
    assert pose_from_transform(transform).translation[1] == pose_from_message(pose).translation[1] == 6.4e6
