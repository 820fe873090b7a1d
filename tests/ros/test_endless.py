# SPDX-License-Identifier: Apache-2.0
"""A bag without an end: each pass goes on where the last one ended, in time and in space."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from nav_msgs.msg import Odometry
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CompressedImage
from tf2_msgs.msg import TFMessage

from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.diagnostics import PIPELINE
from qdbev_ros.ros.endless import Endless
from qdbev_ros.ros.messages import pose_from_transform, stamp_to_ns
from qdbev_ros.ros.presets import load_preset
from qdbev_ros.ros.recording import read_detections, read_status
from tests.ros.drive import PERIOD_NS, START_NS, edit_bag
from tests.ros.graph import Graph


@pytest.fixture(scope="module")
def endless(short_bag: Path) -> Endless:
    with BagReader(short_bag) as bag:
        return Endless(bag, load_preset("nuscenes"))


def test_a_bag_that_lacks_a_camera_has_a_period_all_the_same(
    endless: Endless, short_bag: Path, tmp_path: Path
) -> None:
    lost = f"/{CAMERAS[0]}/"
    five = edit_bag(short_bag, tmp_path / "five.mcap", lambda t, m: None if t.startswith(lost) else m)
    with BagReader(five) as bag:
        assert Endless(bag, load_preset("nuscenes")).period_ns == endless.period_ns


def test_stamps_go_on_with_the_cameras_period(endless: Endless) -> None:
    topic = f"/{CAMERAS[0]}/image_rect_compressed"
    pictures = [data for name, _, data in endless.messages if name == topic]
    stamps = [
        stamp_to_ns(deserialize_message(endless.message(topic, data, passes), CompressedImage).header.stamp)
        for passes in range(1000)
        for data in (pictures if passes < 3 else pictures[:1])
    ]
    assert set(np.diff(stamps[: 3 * len(pictures)])) == {PERIOD_NS}
    assert stamps[-1] - stamps[0] == 999 * len(pictures) * PERIOD_NS
    moved = deserialize_message(endless.message(topic, pictures[0], 7), CompressedImage)
    assert moved.data == deserialize_message(pictures[0], CompressedImage).data


def test_the_vehicle_goes_on_from_where_it_was(endless: Endless) -> None:
    poses = [
        pose_from_transform(item.transform)
        for passes in range(4)
        for topic, _, data in endless.messages
        if topic == "/tf"
        for item in deserialize_message(endless.message(topic, data, passes), TFMessage).transforms
    ]
    ways = [np.linalg.norm(b.translation - a.translation) for a, b in pairwise(poses)]
    turns = [abs(b.yaw() - a.yaw()) for a, b in pairwise(poses)]
    assert max(ways) < 4.0  # 6 m/s, half a second between sets
    assert max(turns) < 0.1
    assert np.linalg.norm(poses[-1].translation - poses[0].translation) > 3.5 * np.linalg.norm(
        poses[len(poses) // 4 - 1].translation - poses[0].translation
    )


def test_odometry_and_transforms_agree_in_every_pass(endless: Endless) -> None:
    last = {topic: data for topic, _, data in endless.messages}
    transform = deserialize_message(endless.message("/tf", last["/tf"], 5), TFMessage).transforms[-1]
    odometry = deserialize_message(endless.message("/odom", last["/odom"], 5), Odometry)
    assert odometry.header.stamp == transform.header.stamp
    position, translation = odometry.pose.pose.position, transform.transform.translation
    assert (position.x, position.y) == pytest.approx((translation.x, translation.y))


def test_the_memory_never_notices_the_end_of_a_pass(
    graph: Graph, package: Path, short_bag: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.mcap"
    words = (f"model:={package}", f"bag:={short_bag}", f"record:={out}", "queue_size:=4", "loop:=endless")
    run = graph.start("qdbev_ros.bringup", *words)
    run.wait_for("pass 4")
    assert run.stop() == 0, run.output
    with BagReader(out) as bag:
        stamps, status = sorted(read_detections(bag, "qdbev_detector")), read_status(bag, PIPELINE)
    assert len(stamps) >= 12
    assert stamps == [START_NS + i * PERIOD_NS for i in range(len(stamps))]
    assert int(status["memory_age"]) >= 11
    assert not [key for key in status if key.startswith(("memory_resets", "sync_resets"))]
