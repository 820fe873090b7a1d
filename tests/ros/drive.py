# SPDX-License-Identifier: Apache-2.0
"""A short drive as a bag: six cameras of a nuScenes-like rig, pictures of noise, a vehicle that moves and turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.geometry import CameraCalibration, Pose, quaternion_multiply, yaw_quaternion
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.bags import BagReader, BagWriter
from qdbev_train.bags.writer import write_bag
from qdbev_train.data.frames import Annotations, CameraFrame, Frame

WIDTH, HEIGHT = 400, 225
START_NS = 1_700_000_000_000_000_000
PERIOD_NS = 500_000_000
YAWS = dict(zip(CAMERAS, np.radians([0, -55, 55, 180, 110, -110]), strict=True))
OFFSETS_MS = dict(zip(CAMERAS, (-35, -27, -42, -10, 0, -19), strict=True))
OPTICAL = np.array([0.5, -0.5, 0.5, -0.5])  # camera axes (right, down, forward) in those of the vehicle
LIDAR2EGO = Pose(yaw_quaternion(-np.pi / 2), np.array([0.9, 0.0, 1.8]))


def ego_pose(stamp_ns: int) -> Pose:
    """Six metres a second along a gentle left bend."""
    t = (stamp_ns - START_NS) * 1e-9
    return Pose(yaw_quaternion(0.1 * t), np.array([600 + 6 * t, 1600 + 0.3 * t * t, 0.0]))


def drive(folder: Path, sets: int) -> list[Frame]:
    """Frames of a drive; their pictures are written to `folder`."""
    rng = np.random.default_rng(7)
    frames = []
    for index in range(sets):
        stamp = START_NS + index * PERIOD_NS
        cameras = []
        for name in CAMERAS:
            picture = cv2.resize(rng.integers(0, 255, (9, 16, 3), dtype=np.uint8), (WIDTH, HEIGHT))
            path = folder / f"{index}-{name}.jpg"
            cv2.imwrite(str(path), picture)
            k = np.array([[316.0, 0, 200], [0, 316.0, 120], [0, 0, 1]])
            rotation = quaternion_multiply(yaw_quaternion(float(YAWS[name])), OPTICAL)
            position = np.array([1.2 * np.cos(YAWS[name]), 0.5 * np.sin(YAWS[name]), 1.5])
            calibration = CameraCalibration(name, k, WIDTH, HEIGHT, Pose(rotation, position))
            taken = stamp + OFFSETS_MS[name] * 1_000_000
            cameras.append(CameraFrame(calibration, path, taken, ego_pose(taken)))
        frames.append(
            Frame(
                f"sample-{index}",
                "drive",
                stamp,
                LIDAR2EGO,
                ego_pose(stamp),
                tuple(cameras),
                _one_car(),
                None,
            )
        )
    return frames


def _one_car() -> Annotations:
    boxes = Boxes(
        np.array([[0.0, 12.0, -1.0]]), np.array([[1.9, 4.6, 1.7]]), np.array([np.pi / 2]), np.zeros((1, 2)),
        np.ones(1), np.zeros(1, np.int64),
    )  # fmt: skip
    return Annotations(boxes, ("car-1",), ("vehicle.parked",), np.array([9]), np.array([4]))


def write_drive(out: Path, sets: int) -> Path:
    """A bag of `sets` sets at two a second."""
    folder = out.with_suffix("")
    folder.mkdir()
    write_bag(drive(folder, sets), out)
    return out


def edit_bag(source: Path, out: Path, edit: Callable[[str, Any], Any | None]) -> Path:
    """A copy in which `edit(topic, message)` replaced each message, or dropped it with None."""
    with BagReader(source) as bag:
        store = bag._reader.typestore
        types = bag.types
        writer = BagWriter(out)
        declared: set[str] = set()
        for topic, stamp, message in bag.messages(list(types)):
            edited = edit(topic, message)
            if edited is None:
                continue
            msgtype = edited.__msgtype__
            if topic not in declared:
                writer.add_topic(topic, msgtype, latched=topic == "/tf_static")
                declared.add(topic)
            if msgtype not in store.fielddefs:
                from rosbags.typesys import Stores, get_typestore

                store = get_typestore(Stores.ROS2_JAZZY)
            writer.write(topic, stamp, bytes(store.serialize_cdr(edited, msgtype)))
        writer.close()
    return out
