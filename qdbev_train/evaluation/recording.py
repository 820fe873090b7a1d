# SPDX-License-Identifier: Apache-2.0
"""Detections out of a bag that was recorded from the running node, matched to the samples of a data set. No ROS."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.highlevel import AnyReader, AnyReaderError

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.geometry import Pose, quaternion_to_matrix
from qdbev_ros.core.pose_buffer import PoseTrack, TransformUnavailable
from qdbev_ros.core.variant import CLASSES
from qdbev_ros.ros.presets import load_preset, preset_names
from qdbev_train.bags.messages import ego_poses
from qdbev_train.data.frames import Frame
from qdbev_train.evaluation.results import Entry, result_entries

OBJECTS = "qdbev_msgs/msg/DetectedObjectArray"
DETECTIONS = "vision_msgs/msg/Detection3DArray"
# The node's reference time is its newest image, the data set's the lidar's: they differ by less than this.
MATCH_NS = 50_000_000


@dataclass(frozen=True)
class Answer:
    """What the node said: boxes in `frame_id` at `stamp_ns`; attributes (K,), or None without ~/objects."""

    stamp_ns: int
    frame_id: str
    boxes: Boxes
    attributes: tuple[str, ...] | None


@dataclass(frozen=True)
class Matched:
    """Result entries of every sample scored, and what did not fit: unanswered samples have no entries."""

    results: dict[str, list[Entry]]
    unanswered: list[Frame]
    repeated: int  # further answers for a sample: a looped bag, a detector faster than 10 Hz
    foreign: int  # answers at no sample's time


def read_answers(bag: Path) -> tuple[str, list[Answer]]:
    """(topic, answers in the order of the recording). Prefers DetectedObjectArray, which carries velocities.

    Raises DataError where the bag cannot be read or has neither type of message.
    """
    if not bag.exists():
        raise DataError(f"{bag}: no such bag")
    try:
        with AnyReader([bag]) as reader:
            for msgtype, convert in ((OBJECTS, _objects), (DETECTIONS, _detections)):
                found = [c for c in reader.connections if c.msgtype == msgtype and c.msgcount]
                topics = sorted({c.topic for c in found})
                if len(topics) > 1:
                    raise DataError(
                        f"{bag}: several topics of {msgtype}: {', '.join(topics)}; record one detector"
                    )
                if topics:
                    messages = (reader.deserialize(raw, msgtype) for _, _, raw in reader.messages(found))
                    return topics[0], [convert(message) for message in messages]
            present = ", ".join(sorted({c.topic for c in reader.connections})) or "nothing"
    except (AnyReaderError, OSError, ValueError, IndexError, TypeError, AssertionError) as error:
        # rosbags meets damage in many places and has many words for it.
        raise DataError(f"{bag}: not a whole ROS 2 bag: {' '.join(str(error).split())}") from error
    raise DataError(f"{bag}: no {OBJECTS} and no {DETECTIONS} messages; it holds {present}")


def match(
    answers: Sequence[Answer], scenes: Mapping[str, Sequence[Frame]], preset: str | None = None
) -> Matched:
    """The answers nearest in time as result entries of the samples, over the scenes that have any answer.

    Of answers that are equally near the first counts. `preset`, a name or a remapping file, says what a rig calls its
    frames. Raises DataError where no answer fits any sample, or one fits samples of two scenes.
    """
    kinds = _kinds_of_frames(preset)
    finders = {name: _SceneFinder(frames, kinds) for name, frames in scenes.items()}
    best: dict[str, tuple[int, Answer]] = {}  # nanoseconds from the sample, answer
    repeated = foreign = 0
    touched: set[str] = set()
    for answer in answers:
        hits = [
            (name, frame) for name, finder in finders.items() if (frame := finder.nearest(answer.stamp_ns))
        ]
        if not hits:
            foreign += 1
            continue
        if len(hits) > 1:
            names = ", ".join(name for name, _ in hits)
            raise DataError(
                f"stamp {answer.stamp_ns / 1e9:.3f} s fits scenes {names}; choose one with --scene"
            )
        name, frame = hits[0]
        touched.add(name)
        distance, token = abs(answer.stamp_ns - frame.stamp_ns), frame.sample_token
        repeated += token in best
        if token not in best or distance < best[token][0]:
            best[token] = distance, answer
    if not touched:
        raise DataError(
            f"none of the {len(answers)} answers is within {MATCH_NS / 1e6:.0f} ms of a sample of {', '.join(scenes)}"
        )
    frames = [(name, frame) for name in scenes if name in touched for frame in scenes[name]]
    results: dict[str, list[Entry]] = {frame.sample_token: [] for _, frame in frames}
    for name, frame in frames:
        if frame.sample_token in best:
            results[frame.sample_token] = finders[name].entries(best[frame.sample_token][1], frame)
    return Matched(results, [f for _, f in frames if f.sample_token not in best], repeated, foreign)


def _kinds_of_frames(preset: str | None) -> dict[str, str]:
    """frame -> "model", "base" or "fixed", of the frames that a shipped preset's convention or `preset` names so."""
    presets = [load_preset(name) for name in [*preset_names(), *([preset] if preset else [])]]
    kinds = {"model": "model_frame", "base": "base_frame", "fixed": "fixed_frame"}
    return {getattr(preset, key): kind for preset in presets for kind, key in kinds.items()}


class _SceneFinder:
    """Finds a scene's frames and ego poses by time."""

    def __init__(self, frames: Sequence[Frame], kinds: Mapping[str, str]) -> None:
        self._kinds = kinds
        self._frames = sorted(frames, key=lambda f: f.stamp_ns)
        self._stamps = [f.stamp_ns for f in self._frames]
        self._track = PoseTrack(keep_s=1e6)
        for ego in ego_poses(tuple(self._frames)):
            self._track.insert(ego.stamp_ns, ego.pose)

    def nearest(self, stamp_ns: int) -> Frame | None:
        index = bisect_left(self._stamps, stamp_ns)
        near = [
            f for f in self._frames[max(index - 1, 0) : index + 1] if abs(f.stamp_ns - stamp_ns) <= MATCH_NS
        ]
        return min(near, key=lambda f: abs(f.stamp_ns - stamp_ns), default=None)

    def entries(self, answer: Answer, frame: Frame) -> list[Entry]:
        """The answer in global coordinates, by the ego pose at the answer's own stamp."""
        try:
            ego2global = self._track.lookup(answer.stamp_ns, "ego pose")
        except TransformUnavailable:
            # Outside the poses of the tables, which end with the scene: the frame's own is at most MATCH_NS away.
            ego2global = frame.ego2global
        kind = self._kinds.get(answer.frame_id)
        if kind is None:
            known = ", ".join(self._kinds)
            raise DataError(
                f"boxes in frame {answer.frame_id!r}; score knows {known}; give the rig's remapping file with --preset"
            )
        poses = {"model": frame.lidar2ego, "base": Pose.identity(), "fixed": ego2global.inverse()}
        frame2ego = poses[kind]
        return result_entries(frame.sample_token, answer.boxes, frame2ego, ego2global, answer.attributes)


def _objects(message: Any) -> Answer:
    rows = [
        (o.class_name, o.score, o.pose, o.size, (o.velocity.x, o.velocity.y), o.attribute)
        for o in message.objects
    ]
    return _answer(message.header, rows, [row[5] for row in rows])


def _detections(message: Any) -> Answer:
    rows = []
    for detection in message.detections:
        best = max(detection.results, key=lambda r: r.hypothesis.score)
        name, score = best.hypothesis.class_id, best.hypothesis.score
        rows.append((name, score, detection.bbox.center, detection.bbox.size, (0.0, 0.0), ""))
    return _answer(message.header, rows, None)


def _answer(header: Any, rows: list[tuple[Any, ...]], attributes: list[str] | None) -> Answer:
    known = [i for i, row in enumerate(rows) if row[0] in CLASSES]
    rows = [rows[i] for i in known]
    boxes = Boxes(
        centers=_array(((p.position.x, p.position.y, p.position.z) for _, _, p, *_ in rows), 3),
        # ROS sizes run along the box's x, y, z (length, width, height), nuScenes' are width, length, height.
        sizes=_array(((s.y, s.x, s.z) for _, _, _, s, *_ in rows), 3),
        yaws=np.array([_yaw(p.orientation) for _, _, p, *_ in rows], np.float64),
        velocities=_array((row[4] for row in rows), 2),
        scores=np.array([row[1] for row in rows], np.float64),
        labels=np.array([CLASSES.index(row[0]) for row in rows], np.int64),
    )
    stamp = header.stamp.sec * 10**9 + header.stamp.nanosec
    return Answer(
        stamp, header.frame_id, boxes, None if attributes is None else tuple(attributes[i] for i in known)
    )


def _array(rows: Iterator[tuple[float, ...]], columns: int) -> Any:
    return np.array(list(rows), np.float64).reshape(-1, columns)


def _yaw(q: Any) -> float:
    x_axis = quaternion_to_matrix(np.array([q.w, q.x, q.y, q.z]))[:, 0]
    return float(np.arctan2(x_axis[1], x_axis[0]))
