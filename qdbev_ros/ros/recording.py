# SPDX-License-Identifier: Apache-2.0
"""What is in a bag and in a recording of the node's answers to it. Works without a running ROS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qdbev_ros.core.boxes import Boxes, empty_boxes
from qdbev_ros.core.drawing import View, camera_view
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.geometry import CameraCalibration, Pose
from qdbev_ros.core.odometry import OdometryMotion
from qdbev_ros.core.pose_buffer import TransformTree
from qdbev_ros.core.projection import lidar_to_image
from qdbev_ros.core.synchroniser import FrameSet, Synchroniser, SyncSettings
from qdbev_ros.core.variant import CAMERAS, CLASSES
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.camera_state import Intrinsics, check_intrinsics
from qdbev_ros.ros.presets import TopicPreset

FOREVER_S = 1e9
REPLAY_DEADLINE_S = 0.8  # that a set's first picture waits for the others; a bag's log times may be uneven
CUBE, ADD = 1, 0  # visualization_msgs/Marker


def stamp_ns(header: Any) -> int:
    return int(header.stamp.sec) * 1_000_000_000 + int(header.stamp.nanosec)


def read_sets(bag: BagReader, preset: TopicPreset) -> list[FrameSet[None]]:
    """The complete sets that the bag holds, by the node's own synchroniser; payloads are left out."""
    cameras = {preset.image_topic(camera): camera for camera in CAMERAS}
    sync: Synchroniser[None] = Synchroniser(CAMERAS, SyncSettings(deadline_s=REPLAY_DEADLINE_S))
    sets: list[FrameSet[None]] = []
    for topic, logged_ns, message in bag.messages(list(cameras)):
        sets += sync.add(cameras[topic], stamp_ns(message.header), None, logged_ns * 1e-9)
    return [frame for frame in sets if not frame.missing]


def read_transforms(bag: BagReader) -> TransformTree:
    """Every transform of the bag."""
    tree = TransformTree(keep_s=FOREVER_S)
    for topic, _, message in bag.messages(["/tf", "/tf_static"]):
        for item in message.transforms:
            pose = _pose(item.transform.translation, item.transform.rotation)
            parent, child = item.header.frame_id.lstrip("/"), item.child_frame_id.lstrip("/")
            if topic == "/tf_static":
                tree.set_static(parent, child, pose)
            else:
                tree.insert(parent, child, stamp_ns(item.header), pose)
    return tree


def read_motion(bag: BagReader, preset: TopicPreset, tree: TransformTree) -> Callable[[int], Pose]:
    """Where the vehicle is at a stamp, from the bag's transforms (`tree`) or odometry, as the preset has it."""
    if preset.ego_motion == "tf":
        return partial(tree.lookup, preset.fixed_frame, preset.base_frame)
    motion = OdometryMotion(preset.odometry, preset.base_frame, tree, FOREVER_S)
    for _, _, message in bag.messages([preset.odometry]):
        pose = _pose(message.pose.pose.position, message.pose.pose.orientation)
        motion.insert(message.child_frame_id.lstrip("/"), stamp_ns(message.header), pose)
    return motion.lookup


def read_intrinsics(
    bag: BagReader, preset: TopicPreset, given: Mapping[str, Intrinsics]
) -> tuple[dict[str, Intrinsics], dict[str, str]]:
    """Each camera's intrinsics, `given` ones before those of its last CameraInfo; camera -> why it has none."""
    known, lacking = dict(given), {}
    infos = {topic: message for topic, _, message in bag.messages(preset.info_topics())}
    for camera in (camera for camera in CAMERAS if camera not in given):
        topic = preset.info_topic(camera)
        if topic not in infos:
            lacking[camera] = f"nothing on {topic}" if topic else f"preset {preset.name} has no CameraInfo"
            continue
        info = infos[topic]
        try:
            known[camera] = check_intrinsics(np.asarray(info.k), np.asarray(info.p), info.width, info.height)
        except ValueError as error:
            lacking[camera] = f"{topic}: {error}"
    return known, lacking


def read_detections(recording: BagReader, node: str) -> dict[int, Boxes]:
    """stamp -> boxes in the model frame, from ~/detections; velocities from ~/objects where that was recorded."""
    objects = {
        stamp_ns(message.header): message for _, _, message in recording.messages([f"/{node}/objects"])
    }
    found = {}
    for _, _, message in recording.messages([f"/{node}/detections"]):
        stamp = stamp_ns(message.header)
        poses = [_pose(d.bbox.center.position, d.bbox.center.orientation) for d in message.detections]
        sizes = [(d.bbox.size.y, d.bbox.size.x, d.bbox.size.z) for d in message.detections]
        best = [d.results[0].hypothesis for d in message.detections]
        velocities = (
            [(o.velocity.x, o.velocity.y) for o in objects[stamp].objects] if stamp in objects else []
        )
        if len(velocities) != len(best):
            velocities = [(0.0, 0.0)] * len(best)
        scores = [h.score for h in best]
        found[stamp] = _boxes(poses, sizes, [h.class_id for h in best], scores, velocities)
    return found


def read_truth(bag: BagReader, topic: str) -> dict[int, Boxes]:
    """stamp -> annotated boxes in the fixed frame; empty without annotations."""
    found = {}
    for _, _, message in bag.messages([topic]):
        cubes = [m for m in message.markers if m.type == CUBE and m.action == ADD and m.ns in CLASSES]
        if not message.markers:
            continue
        poses = [_pose(m.pose.position, m.pose.orientation) for m in cubes]
        sizes = [(m.scale.y, m.scale.x, m.scale.z) for m in cubes]
        names = [m.ns for m in cubes]
        stamp = stamp_ns(message.markers[0].header)
        found[stamp] = _boxes(poses, sizes, names, [1.0] * len(cubes), [(0.0, 0.0)] * len(cubes))
    return found


def read_status(recording: BagReader, name: str) -> dict[str, str]:
    """key -> value of the last status `name` on /diagnostics."""
    last: dict[str, str] = {}
    for _, _, message in recording.messages(["/diagnostics"]):
        for status in message.status:
            if status.name == name:
                last = {pair.key: pair.value for pair in status.values}
    return last


def read_views(
    bag: BagReader,
    preset: TopicPreset,
    frame: FrameSet[None],
    tree: TransformTree,
    frames: tuple[str, str, str],
) -> dict[str, View]:
    """The pictures of one set with their projections, of cameras with intrinsics. frames: fixed, vehicle, model."""
    fixed, base, model = frames
    reference = tree.lookup(fixed, base, frame.stamp_ns)
    lidar2ego = tree.lookup(base, model, frame.stamp_ns)
    intrinsics, _ = read_intrinsics(bag, preset, {})
    cameras = {preset.image_topic(camera): camera for camera in intrinsics}
    views = {}
    for topic, _, message in bag.messages(list(cameras)):
        camera = cameras[topic]
        stamp = stamp_ns(message.header)
        if stamp != frame.images[camera].stamp_ns or preset.image_type != "compressed":
            continue
        known = intrinsics[camera]
        sensor2ego = tree.lookup(base, message.header.frame_id, stamp)
        calibration = CameraCalibration(camera, known.matrix, known.width, known.height, sensor2ego)
        matrix = lidar_to_image(calibration, lidar2ego, tree.lookup(fixed, base, stamp), reference)
        views[camera] = camera_view(np.ascontiguousarray(message.data).data, calibration, matrix)
    return views


def open_recording(path: Path, topic: str) -> BagReader:
    """A recording that holds `topic`. Raises DataError where it does not."""
    recording = BagReader(path)
    if topic not in recording.types:
        recording.close()
        raise DataError(f"recording {path} holds nothing on {topic}")
    return recording


def _pose(position: Any, orientation: Any) -> Pose:
    o, p = orientation, position
    return Pose(np.array([o.w, o.x, o.y, o.z]), np.array([p.x, p.y, p.z]))


def _boxes(
    poses: list[Pose],
    sizes: list[tuple[float, float, float]],
    names: list[str],
    scores: list[float],
    velocities: list[tuple[float, float]],
) -> Boxes:
    if not poses:
        return empty_boxes()
    return Boxes(
        np.array([pose.translation for pose in poses]),
        np.array(sizes),
        np.array([pose.yaw() for pose in poses]),
        np.array(velocities),
        np.array(scores),
        np.array([CLASSES.index(name) for name in names], np.int64),
    )
