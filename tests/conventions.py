# SPDX-License-Identifier: Apache-2.0
"""A bag of `qdbev bag` as the other nuScenes converters would have written it: their topics, frames and message types.

Example: python -m tests.conventions scene-0916.mcap chris7462 out/chris7462.mcap
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from qdbev_ros.core.mcap_file import McapFile
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.presets import TopicPreset, load_preset
from qdbev_train.bags.messages import STORE, TYPES

Entry = tuple[str, int, Any]  # topic, time of receipt in ns, message
CALIBRATED_BY_FILE = ("chris7462", "nuscenes2bag", "bevfusion_demo")  # that need a calibration file
SENSORS_ON_TF = ("watonomous", "nuscenes2bag", "dataset_bridge")


def as_convention(entries: list[Entry], name: str) -> list[Entry]:
    """The messages of one of our bags, in the convention of preset `name`."""
    preset = load_preset(name)
    sensors = next(message for topic, _, message in entries if topic == "/tf_static").transforms
    renamed = [_sensor(transform, preset) for transform in sensors]
    found: list[Entry] = []
    for topic, log, original in entries:
        camera = topic.split("/")[1]
        if topic.endswith("/image_rect_compressed"):
            found.append((preset.image_topic(camera), log, _picture(original, camera, preset)))
        elif topic.endswith("/camera_info") and preset.infos:
            message = copy.deepcopy(original)
            message.header.frame_id = preset.image_frame(camera, "")
            found.append((preset.info_topic(camera), log, message))
        elif topic == "/tf" and name != "chris7462":
            found.append((topic, log, _motion(original, preset, renamed if name in SENSORS_ON_TF else [])))
        elif topic == "/tf_static" and name in ("nuscenes", "raw", "nuscenes2mcap"):
            found.append((topic, log, TYPES["tf2_msgs/msg/TFMessage"](transforms=renamed)))
        elif topic == "/odom" and preset.odometry:
            found.append((preset.odometry, log, original))
    return found


def _sensor(transform: Any, preset: TopicPreset) -> Any:
    transform = copy.deepcopy(transform)
    child = transform.child_frame_id
    transform.child_frame_id = preset.image_frame(child, "") if child in CAMERAS else preset.model_frame
    return transform


def _motion(message: Any, preset: TopicPreset, sensors: list[Any]) -> Any:
    """map -> base_link in the convention's frames, with the sensors' transforms where it repeats them."""
    (moved,) = copy.deepcopy(message).transforms
    transforms = [moved]
    moved.header.frame_id = preset.fixed_frame
    if preset.name == "nuscenes2bag":
        moved.header.frame_id = "odom"
        identity = copy.deepcopy(moved)
        identity.header.frame_id, identity.child_frame_id = "map", "odom"
        for vector in (identity.transform.translation, identity.transform.rotation):
            vector.x = vector.y = vector.z = 0.0
        identity.transform.rotation.w = 1.0
        transforms.append(identity)
    for sensor in copy.deepcopy(sensors):
        sensor.header.stamp = moved.header.stamp
        transforms.append(sensor)
    return TYPES["tf2_msgs/msg/TFMessage"](transforms=transforms)


def _picture(message: Any, camera: str, preset: TopicPreset) -> Any:
    header = copy.deepcopy(message.header)
    header.frame_id = {"nuscenes2bag": "", "bevfusion_demo": "base_link"}.get(
        preset.name, preset.image_frame(camera, "")
    )
    if preset.image_type == "compressed":
        return TYPES["sensor_msgs/msg/CompressedImage"](header=header, format="jpeg", data=message.data)
    picture = np.asarray(cv2.imdecode(message.data, cv2.IMREAD_COLOR))
    height, width = picture.shape[:2]
    return TYPES["sensor_msgs/msg/Image"](
        header=header, height=height, width=width, encoding="bgr8", is_bigendian=0, step=3 * width,
        data=picture.reshape(-1),
    )  # fmt: skip


def convert(source: Path, name: str, out: Path) -> Path:
    """Writes the bag `source` in the convention of preset `name`."""
    with BagReader(source) as bag:
        types = [topic for topic in bag.types if topic != "/annotations"]
        entries = as_convention(list(bag.messages(types)), name)
    return write_bag(entries, out)


def write_bag(entries: list[Entry], out: Path) -> Path:
    bag = McapFile(out)
    for topic, kind in {topic: message.__msgtype__ for topic, _, message in entries}.items():
        bag.add_topic(topic, kind, STORE, latched=topic == "/tf_static")
    for topic, log, message in sorted(entries, key=lambda entry: entry[1]):
        bag.write(topic, log, bytes(STORE.serialize_cdr(message, message.__msgtype__)))
    bag.close()
    return out


if __name__ == "__main__":
    convert(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
