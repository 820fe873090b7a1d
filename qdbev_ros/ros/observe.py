# SPDX-License-Identifier: Apache-2.0
"""Turns messages, from a bag or from live topics, into what the doctor looks at. Works without a running ROS."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from qdbev_ros.core.doctor import CameraSeen, Drive, InfoSeen, Look, OdometrySeen, PictureSeen, TransformSeen
from qdbev_ros.core.encodings import encoding_problem, raw_picture
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.geometry import Pose
from qdbev_ros.core.preprocess import Picture, decode_bytes
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.calibration_file import RigCalibration
from qdbev_ros.ros.presets import TopicPreset, load_preset, preset_names

IMAGE_KINDS = {"compressed": "sensor_msgs/msg/CompressedImage", "raw": "sensor_msgs/msg/Image"}
LOOKS = 16  # pictures of each camera that are decoded
SMALL = (64, 36)  # what is left of a picture when its colours are looked at
GREY = 2.0  # largest mean difference of the colours, of 255, in a picture without colours


def best_preset(types: Mapping[str, str]) -> TopicPreset:
    """The preset of config/presets that fits the topics of a bag or graph best; nuscenes where several do."""

    def fit(preset: TopicPreset) -> tuple[int, int, bool]:
        kind = IMAGE_KINDS[preset.image_type]
        pictures = sum(types.get(topic) == kind for topic in preset.image_topics())
        others = [*preset.info_topics(), preset.odometry, preset.annotations]
        return pictures, sum(topic in types for topic in others if topic), preset.name == "nuscenes"

    return max((load_preset(name) for name in preset_names()), key=fit)


class Observer:
    """Collects what the doctor needs; of the pictures, decodes every `look_every`-th of a camera."""

    def __init__(
        self,
        preset: TopicPreset,
        types: Mapping[str, str],
        calibration: RigCalibration | None = None,
        look_every: int = 1,
    ) -> None:
        calibration = calibration or RigCalibration()
        cameras = {
            name: CameraSeen(
                name, preset.image_topic(name), preset.info_topic(name), preset.image_frame(name, ""),
                extrinsics=calibration.extrinsics.get(name),
            )
            for name in CAMERAS
        }  # fmt: skip
        for name, given in calibration.intrinsics.items():
            k = tuple(given.matrix.ravel().tolist())
            cameras[name].info_source = calibration.path
            cameras[name].infos.append(InfoSeen(given.width, given.height, k, p=(0.0,) * 12))
        kinds = set(IMAGE_KINDS.values())
        others = sorted(t for t, kind in types.items() if kind in kinds and t not in preset.image_topics())
        self.drive = Drive(
            cameras, fixed_frame=preset.fixed_frame, base_frame=preset.base_frame, model_frame=preset.model_frame,
            ego_motion=preset.ego_motion, odometry_topic=preset.odometry, calibration=calibration.path,
            model=calibration.model, other_picture_topics=tuple(others),
        )  # fmt: skip
        self._look_every = look_every
        self._images = {preset.image_topic(name): cameras[name] for name in CAMERAS}
        self._infos = {  # of what the file gives nothing else is taken, as in the node
            topic: cameras[name]
            for name in CAMERAS
            if (topic := preset.info_topic(name)) and name not in calibration.intrinsics
        }
        kind = IMAGE_KINDS[preset.image_type]
        wanted = dict.fromkeys(preset.image_topics(), kind)
        wanted |= dict.fromkeys(self._infos, "sensor_msgs/msg/CameraInfo")
        wanted |= dict.fromkeys(("/tf", "/tf_static"), "tf2_msgs/msg/TFMessage")
        if preset.odometry:
            wanted[preset.odometry] = "nav_msgs/msg/Odometry"
        self.topics = wanted  # topic -> message type

    def add(self, topic: str, received_ns: int, message: Any) -> None:
        if topic in self._images:
            self._add_picture(self._images[topic], received_ns, message)
        elif topic in self._infos:
            _add_info(self._infos[topic], message)
        elif topic in ("/tf", "/tf_static"):
            for transform in message.transforms:
                self.drive.transforms.append(_transform(transform, received_ns, topic == "/tf_static"))
        else:
            frame = message.child_frame_id.lstrip("/")
            self.drive.odometry.append(OdometrySeen(_stamp(message.header), received_ns, frame))

    def _add_picture(self, camera: CameraSeen, received_ns: int, message: Any) -> None:
        problem, look = "", None
        if hasattr(message, "encoding"):
            problem = encoding_problem(message.encoding) or ""
        if not problem and len(camera.pictures) % self._look_every == 0:
            try:
                look = look_at(decode(message))
            except DataError as error:
                problem = str(error)
        frame = message.header.frame_id.lstrip("/")
        camera.pictures.append(PictureSeen(_stamp(message.header), received_ns, frame, problem, look))


def observe_bag(
    path: Path, preset: TopicPreset | None, calibration: RigCalibration | None
) -> tuple[str, Drive]:
    """Reads a bag once; without a preset, with the one that fits. (the preset's name, what was seen)."""
    with BagReader(path) as bag:
        preset = preset or best_preset(bag.types)
        counts = bag.counts
        pictures = max((counts.get(topic, 0) for topic in preset.image_topics()), default=0)
        observer = Observer(preset, bag.types, calibration, look_every=max(1, pictures // LOOKS))
        for topic, kind in observer.topics.items():
            if bag.types.get(topic, kind) != kind:
                raise DataError(
                    f"bag {path}: {topic} holds {bag.types[topic]}, preset {preset.name} expects {kind}: "
                    "choose another preset or write a remapping file"
                )
        for topic, received, message in bag.messages([t for t in observer.topics if t in counts]):
            observer.add(topic, received, message)
    return preset.name, observer.drive


def look_at(picture: Picture) -> Look:
    """What a BGR picture (H, W, 3) shows: upper third against lower third."""
    height, width = picture.shape[:2]
    small = np.asarray(cv2.resize(picture, SMALL, interpolation=cv2.INTER_AREA), np.float32)
    third = SMALL[1] // 3
    grey = float(np.abs(small.max(-1) - small.min(-1)).mean()) < GREY
    small /= 255
    blue, bright = small[..., 0] - small[..., 2], small.mean(-1)
    return Look(
        width, height, float(bright.mean()), float(blue[:third].mean() - blue[-third:].mean()),
        float(bright[:third].mean() - bright[-third:].mean()), grey,
    )  # fmt: skip


def decode(message: Any) -> Picture:
    """BGR, as it lies in the node. Raises DataError where a compressed or raw picture is none."""
    if hasattr(message, "encoding"):
        raw = raw_picture(message.data, message.width, message.height, message.step, message.encoding)
        colours = raw.pixels[..., :3]
        return np.ascontiguousarray(colours[..., ::-1] if raw.red_first else colours)
    return decode_bytes(memoryview(message.data))


def _add_info(camera: CameraSeen, message: Any) -> None:
    numbers = (tuple(float(v) for v in values) for values in (message.k, message.p, message.d))
    info = InfoSeen(int(message.width), int(message.height), *numbers)
    # repr, as NaN is not equal to itself
    if not camera.infos or all(repr(info) != repr(known) for known in camera.infos):
        camera.infos.append(info)


def _transform(message: Any, received_ns: int, static: bool) -> TransformSeen:
    t, r = message.transform.translation, message.transform.rotation
    pose: Pose | None
    try:
        pose = Pose(np.array([r.w, r.x, r.y, r.z]), np.array([t.x, t.y, t.z]))
    except DataError:
        pose = None
    parent, child = message.header.frame_id.lstrip("/"), message.child_frame_id.lstrip("/")
    return TransformSeen(parent, child, _stamp(message.header), received_ns, pose, static)


def _stamp(header: Any) -> int:
    return int(header.stamp.sec) * 1_000_000_000 + int(header.stamp.nanosec)
