# SPDX-License-Identifier: Apache-2.0
"""Writes a scene as one CDR MCAP file that `ros2 bag play`, rosbags and Foxglove read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer
from tqdm import tqdm

from qdbev_ros.core.errors import DataError
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
    if out.suffix != ".mcap":
        raise DataError(f"{out}: a bag is one .mcap file; give a name that ends in .mcap")
    planned = sorted(_plan(tuple(frames)), key=lambda m: m.log_ns)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror}") from error
    try:
        # rosbags writes a folder around its file; the file alone is complete, and names itself as the folder.
        _write(planned, frames, folder / out.stem)
        os.replace(folder / out.stem / out.name, out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return len(planned)


def _write(planned: list[_Planned], frames: Sequence[Frame], folder: Path) -> None:
    # Version 8 spells the offered QoS in numbers, which Humble and everything after it understands.
    with Writer(folder, version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        samples = [{"token": f.sample_token, "stamp_ns": f.stamp_ns} for f in frames]
        writer.set_custom_data(SAMPLES_KEY, json.dumps({"scene": frames[0].scene, "samples": samples}))
        connections = {}
        for topic in sorted({m.topic for m in planned}):
            connections[topic] = writer.add_connection(
                topic, _type(topic), typestore=messages.STORE, offered_qos_profiles=[_qos(topic)]
            )
        for message in tqdm(planned, desc="bag", unit=" messages", disable=None):
            data = messages.STORE.serialize_cdr(message.make(), _type(message.topic))
            writer.write(connections[message.topic], message.log_ns, data)


def _type(topic: str) -> str:
    return _TYPES[topic.rsplit("/", 1)[1]]


def _qos(topic: str) -> Qos:
    static = topic == "/tf_static"
    forever = QosTime(2147483647, 4294967295)
    return Qos(
        history=QosHistory.KEEP_LAST,
        depth=1 if static else 10,
        reliability=QosReliability.RELIABLE,
        durability=QosDurability.TRANSIENT_LOCAL if static else QosDurability.VOLATILE,
        deadline=forever,
        lifespan=forever,
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=forever,
        avoid_ros_namespace_conventions=False,
    )


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
