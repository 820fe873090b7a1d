# SPDX-License-Identifier: Apache-2.0
"""The detector's answers as serialised messages, which Publisher.publish takes as bytes.

By rclpy's message objects the same takes up to 40 times as long (`python benchmarks/messages.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qdbev_ros.core.boxes import MOVING_SPEED, Boxes, attribute_name
from qdbev_ros.core.drawing import COLORS
from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.geometry import Array
from qdbev_ros.core.variant import CLASSES
from qdbev_ros.ros.cdr import LARGEST, CdrWriter, Fields, Fixed, Slot, strings
from qdbev_ros.ros.messages import Answer

MOVING_ARROW = 0.5  # m/s, below which no velocity arrow is drawn
STRONG, PALE = 0.9, 0.35  # opacity of lines and of bodies

# visualization_msgs/Marker
ARROW, CUBE, LINE_STRIP, TEXT = 0, 1, 4, 9
ADD, DELETE = 0, 2
MARKERS = ("body", "heading", "velocity", "label")

STAMP = Slot("i", 2)
NOTHING = Fixed("I", 0)  # a sequence without elements
# (class, moves) -> name and attribute, at 2 * class + moves
MOTIONS = [
    (name, attribute_name(i, np.array([v, 0.0]))) for i, name in enumerate(CLASSES) for v in (0.0, 1.0)
]
RGB = np.array([COLORS[name][::-1] for name in CLASSES]) / 255


def encode_detections(stamp_ns: int, frame: str, boxes: Boxes) -> bytes:
    """vision_msgs/Detection3DArray; bbox.size is (x length, y width, z height) in the box's own frame."""
    writer, stamp = CdrWriter(), _seconds(stamp_ns)
    writer.add((STAMP, frame, Fixed("I", len(boxes))), stamp)
    # Behind the class: score, pose with a covariance of zeros, centre and size.
    kinds = [(STAMP, frame, Fixed("I", 1), name, Slot("d", 1 + 7 + 36 + 7 + 3), "") for name in CLASSES]
    pose = boxes.poses()
    values = [boxes.scores[:, None], pose, np.zeros((len(boxes), 36)), pose, boxes.lengths_first()]
    writer.extend(kinds, boxes.labels.tolist(), stamp, np.hstack(values))
    return writer.finish()


def encode_objects(kind: Any, frame: str, boxes: Boxes, model: str, answer: Answer) -> bytes:
    """qdbev_msgs/DetectedObjectArray (`kind`) of `boxes`, chosen from the answer's."""
    memory, missing = answer.memory, answer.missing
    state = kind.STATE_DEGRADED if answer.lacking() else kind.STATE_RUNNING
    remembered = kind.MEMORY_TRACKING if memory.age else kind.MEMORY_EMPTY
    head: Fields = (
        STAMP, frame, model, state, *strings(answer.used), *strings(tuple(missing)),
        *strings(tuple(missing.values())), Slot("f", 1), Fixed("?", answer.ego_problem is None),
        kind.MEMORY_RESET if memory.reset else remembered, memory.reset or "", Slot("I", 1), Slot("f", 1),
        Fixed("I", len(boxes)),
    )  # fmt: skip
    writer = CdrWriter()
    writer.add(head, _seconds(answer.stamp_ns), answer.spread_s, memory.age, memory.gap_s)
    kinds = [(name, Slot("f", 1), Slot("d", 7 + 3 + 3), attribute) for name, attribute in MOTIONS]
    moves = np.hypot(*boxes.velocities.T) > MOVING_SPEED
    values = np.hstack([boxes.poses(), boxes.lengths_first(), _flat(boxes.velocities)])
    writer.extend(kinds, (2 * boxes.labels + moves).tolist(), boxes.scores[:, None], values)
    return writer.finish()


def encode_markers(stamp_ns: int, frame: str, boxes: Boxes, previous: int, lifetime_s: float) -> bytes:
    """visualization_msgs/MarkerArray for RViz: body, heading, velocity and label of box i have id i.

    A marker replaces the one of its name and id; ids from len(boxes) up to `previous`, the count before, are deleted.
    """
    markers = _Markers(stamp_ns, frame, boxes, lifetime_s)
    markers.writer.add((Fixed("I", len(MARKERS) * max(len(boxes), previous)),))
    center, ones = boxes.centers, np.ones(len(boxes))
    upright = np.column_stack([np.zeros((len(boxes), 6)), ones])
    markers.add("body", CUBE, np.hstack([boxes.poses(), boxes.lengths_first()]), PALE)
    pose = np.hstack([upright, np.outer(ones, (0.1, 0.0, 0.0))])
    markers.add("heading", LINE_STRIP, pose, STRONG, np.hstack([center, boxes.noses()]))
    ends = np.hstack([center, center + _flat(boxes.velocities)])
    pose = np.hstack([upright, np.outer(ones, (0.15, 0.4, 0.4))])
    markers.add("velocity", ARROW, pose, STRONG, ends, np.hypot(*boxes.velocities.T) < MOVING_ARROW)
    pose = np.hstack([upright, np.outer(ones, (0.0, 0.0, 0.7))])
    pose[:, :3] = center
    pose[:, 2] += boxes.sizes[:, 2] / 2 + 0.5
    markers.add("label", TEXT, pose, STRONG)
    markers.delete(range(len(boxes), previous))
    return markers.writer.finish()


class _Markers:
    """Writes markers, all of one name at a time."""

    def __init__(self, stamp_ns: int, frame: str, boxes: Boxes, lifetime_s: float) -> None:
        self.writer = CdrWriter()
        self._stamp, self._frame, self._boxes = _seconds(stamp_ns), frame, boxes
        self._lifetime = (int(lifetime_s), int(lifetime_s % 1 * 1e9))

    def add(
        self, name: str, kind: int, pose: Array, opacity: float, ends: Array | None = None, hidden: Any = None
    ) -> None:
        """A marker for each box: pose and scale (K, 10), ends of its line (K, 6) if any; `hidden` (K,) ones go."""
        boxes = self._boxes
        colors = np.column_stack([RGB[boxes.labels], np.full(len(boxes), opacity)])
        numbers = (self._stamp, np.arange(len(boxes))[:, None], pose, colors, self._lifetime)
        if ends is None:
            texts = [""] * len(boxes)
            if kind == TEXT:
                texts = [f"{CLASSES[label]} {score:.2f}" for label, score in zip(boxes.labels, boxes.scores)]
            kinds = {text: _marker(self._frame, name, kind, ADD, (NOTHING,), text) for text in texts}
            places = {text: place for place, text in enumerate(kinds)}
            self.writer.extend(list(kinds.values()), [places[text] for text in texts], *numbers)
        else:
            line: Fields = (Fixed("I", 2), Slot("d", 6))
            either = [_marker(self._frame, name, kind, action, line, "") for action in (ADD, DELETE)]
            which = [0] * len(boxes) if hidden is None else hidden.astype(int).tolist()
            self.writer.extend(either, which, *numbers, ends)

    def delete(self, ids: range) -> None:
        """All markers of these ids go."""
        for name in MARKERS:
            kind = _marker(self._frame, name, ARROW, DELETE, (NOTHING,), "")
            numbers = (np.array(ids)[:, None], [0.0] * 6 + [1.0] + [0.0] * 3, [0.0] * 4, (0, 0))
            self.writer.extend([kind], [0] * len(ids), self._stamp, *numbers)


def _marker(frame: str, name: str, kind: int, action: int, points: Fields, text: str) -> Fields:
    """visualization_msgs/Marker with slots for stamp, id, pose and scale, colour, lifetime and those of `points`."""
    no_picture: Fields = (Fixed("i", 0), Fixed("I", 0), "", "", NOTHING)
    head: Fields = (STAMP, frame, name, Slot("i", 1), Fixed("i", kind), Fixed("i", action))
    look: Fields = (Slot("d", 7 + 3), Slot("f", 4), Slot("i", 2), Fixed("?", False), *points, NOTHING)
    return (*head, *look, "", *no_picture, NOTHING, text, "", "", NOTHING, Fixed("?", False))


def check_definition(kind: Any, sample: bytes) -> None:
    """Raises ConfigError where the installed message `kind` is not laid out as the `sample` of it that was encoded."""
    from rclpy.serialization import deserialize_message, serialize_message

    try:
        again = serialize_message(deserialize_message(sample, kind))
        fits = len(sample) <= len(again) < len(sample) + LARGEST  # some middleware pads the end
    except Exception:  # the middleware's own
        fits = False
    if not fits:
        package, name = kind.__module__.split(".")[0], kind.__name__
        raise ConfigError(f"{package}/{name} as installed has other fields than in Humble, Jazzy and Kilted")


def _flat(xy: Array) -> Array:
    """(K, 3) of (K, 2), z is 0."""
    return np.column_stack([xy, np.zeros(len(xy))])


def _seconds(stamp_ns: int) -> tuple[int, int]:
    return stamp_ns // 1_000_000_000, stamp_ns % 1_000_000_000
