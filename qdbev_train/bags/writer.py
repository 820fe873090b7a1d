# SPDX-License-Identifier: Apache-2.0
"""Writes a scene as one CDR MCAP file that `ros2 bag play`, rosbags and Foxglove read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.mcap_file import McapFile
from qdbev_train.bags import messages
from qdbev_train.data.frames import CameraFrame, Frame

# Poses are received shortly before the pictures taken there, as localisation runs ahead of image transport.
TF_LEAD_NS = 2_000_000
SAMPLES_KEY = "qdbev_samples"  # the metadata record that keeps scene, stamps and sample tokens

_TYPES = {
    "image_rect_compressed": "sensor_msgs/msg/CompressedImage",
    "camera_info": "sensor_msgs/msg/CameraInfo",
    "tf": "tf2_msgs/msg/TFMessage",
    "tf_static": "tf2_msgs/msg/TFMessage",
    "odom": "nav_msgs/msg/Odometry",
    "annotations": "visualization_msgs/msg/MarkerArray",
}


@dataclass(frozen=True)
class _Planned:
    """A message to be written at `log_ns`; `make` builds it when its turn comes, so that one picture is in memory."""

    log_ns: int
    topic: str
    make: Callable[[], Any]


def write_bag(frames: Sequence[Frame], out: Path) -> int:
    """Writes one scene's frames to `out` (.mcap) and returns the number of messages.

    Raises DataError where a picture cannot be read or `out` not be written.
    """
    planned = sorted(_plan(tuple(frames)), key=lambda m: m.log_ns)
    bag = McapFile(out)
    try:
        samples = [{"token": f.sample_token, "stamp_ns": f.stamp_ns} for f in frames]
        bag.set_metadata(SAMPLES_KEY, json.dumps({"scene": frames[0].scene, "samples": samples}))
        for topic in sorted({m.topic for m in planned}):
            bag.add_topic(topic, _type(topic), messages.STORE, latched=topic == "/tf_static")
        for message in tqdm(planned, desc="bag", unit=" messages", disable=None):
            data = messages.STORE.serialize_cdr(message.make(), _type(message.topic))
            bag.write(message.topic, message.log_ns, bytes(data))
        bag.close()
    except BaseException:
        bag.discard()
        raise
    return len(planned)


def _type(topic: str) -> str:
    return _TYPES[topic.rsplit("/", 1)[1]]


def _plan(frames: tuple[Frame, ...]) -> Iterator[_Planned]:
    """Every message of the scene, in no order."""
    if not frames:
        raise DataError("a bag needs at least one frame")
    poses = messages.ego_poses(frames)
    start = poses[0].stamp_ns - TF_LEAD_NS
    yield _Planned(start, "/tf_static", lambda: _static_transforms(frames[0], start))
    for pose in poses:
        log = pose.stamp_ns - TF_LEAD_NS
        yield _Planned(log, "/tf", partial(_ego_transform, pose))
        yield _Planned(log, "/odom", partial(messages.odometry, pose))
    numbers: dict[str, int] = {}
    for frame in frames:
        for camera in frame.cameras:
            yield from _camera_messages(camera)
        yield _Planned(frame.stamp_ns, "/annotations", partial(messages.annotation_markers, frame, numbers))


def _camera_messages(camera: CameraFrame) -> Iterator[_Planned]:
    name, stamp = camera.calibration.name, camera.stamp_ns
    info = messages.camera_info(stamp, camera.calibration)
    yield _Planned(stamp, f"/{name}/camera_info", lambda: info)
    yield _Planned(
        stamp, f"/{name}/image_rect_compressed", lambda: messages.image(stamp, name, camera.read())
    )


def _ego_transform(ego: messages.EgoPose) -> Any:
    return messages.tf([messages.transform(ego.stamp_ns, messages.MAP, messages.BASE, ego.pose)])


def _static_transforms(frame: Frame, stamp_ns: int) -> Any:
    sensors = {c.calibration.name: c.calibration.sensor2ego for c in frame.cameras}
    sensors["LIDAR_TOP"] = frame.lidar2ego
    return messages.tf(
        [messages.transform(stamp_ns, messages.BASE, name, pose) for name, pose in sensors.items()]
    )
