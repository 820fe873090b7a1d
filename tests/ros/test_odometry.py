# SPDX-License-Identifier: Apache-2.0
"""Odometry instead of transforms for the ego motion, over DDS: of the vehicle's frame or of any bolted to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nav_msgs.msg import Odometry
from rclpy.qos import QoSProfile
from tf2_msgs.msg import TFMessage

from qdbev_ros.core.geometry import Pose, yaw_quaternion
from qdbev_ros.ros.messages import ns_to_stamp
from tests.ros.drive import OFFSETS_MS
from tests.ros.graph import Graph, Running
from tests.ros.rig import MS, TIMING, Rig, transform

IMU = Pose(yaw_quaternion(np.pi / 2), np.array([1.5, 0.4, 0.6]))


class OdometryRig(Rig):
    """The vehicle takes a left bend, of which /odom tells: of `frame`, which is at `mounting` in the vehicle."""

    frame, mounting, began_ns = "base_link", Pose.identity(), 0

    def __init__(self, graph: Graph, node: Running) -> None:
        super().__init__(graph, node)
        self._tf: Any = self.node.create_publisher(Odometry, "/odom", QoSProfile(depth=50))

    def move(self, stamp: int, jump_m: float = 0.0) -> None:
        for at in (stamp + offset * MS for offset in sorted(OFFSETS_MS.values())):  # each picture's own stamp
            t = (at - self.began_ns) * 1e-9
            ego = Pose(yaw_quaternion(0.3 * t), np.array([6 * t + jump_m, 0.9 * t * t, 0.0]))
            pose, message = ego @ self.mounting, Odometry(child_frame_id=self.frame)
            message.header.stamp, message.header.frame_id = ns_to_stamp(at), "odom"
            p, o = message.pose.pose.position, message.pose.pose.orientation
            p.x, p.y, p.z = (float(v) for v in pose.translation)
            o.w, o.x, o.y, o.z = (float(v) for v in pose.rotation)
            self._tf.publish(message)

    def drive(self, frame: str, mounting: Pose) -> list[Any]:
        """The answers to four sets of a new scene."""
        self.now_ns += 100_000_000_000
        self.frame, self.mounting, self.began_ns = frame, mounting, self.now_ns
        return [self.ask() for _ in range(4)]


@pytest.fixture(scope="module")
def rig(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OdometryRig]:
    pytest.importorskip("qdbev_msgs", reason="qdbev_msgs tells whether the ego motion was known")
    with Graph(tmp_path_factory.mktemp("odometry")) as graph:
        node = graph.node(
            "detector_node", model=package, image_reliability="reliable", ego_motion="odometry", **TIMING
        )
        node.wait_for("ready")
        with OdometryRig(graph, node) as rig:
            yield rig
        assert node.stop() == 0
        assert "Traceback" not in node.output


def difference(answers: list[Any], expected: list[Any]) -> float:
    """Of the scores, best first, of two drives. A motion that is rounded otherwise may be a step of quantisation."""
    scores = np.array([[o.score for o in answer.objects] for answer in [*answers, *expected]])
    return float(np.abs(scores[: len(answers)] - scores[len(answers) :]).max())


def test_odometry_of_a_turned_frame_is_the_vehicles_motion_once_it_is_known_where_that_frame_is(
    rig: OdometryRig,
) -> None:
    expected = rig.drive("base_link", Pose.identity())
    assert [a.memory_age for a in expected] == [0, 1, 2, 3]
    assert difference(rig.drive("/base_link", Pose.identity()), expected) == 0
    misled = difference(rig.drive("", IMU), expected)
    assert misled > 0.02, "the boxes do not depend on the motion"

    rig.now_ns += 100_000_000_000
    rig.frame = "imu_link"
    answer = rig.ask_in_vain("tf_timeout")
    assert (answer.ego_motion, answer.memory_age) == (False, 0)
    rig.until_state("degraded", "no ego motion: /odom is of frame 'imu_link', from which nothing leads")

    rig._tf_static.publish(TFMessage(transforms=[transform("base_link", "imu_link", 0, IMU)]))
    rig.until(lambda: rig.ask().ego_motion, "the static transform changed nothing")
    assert difference(rig.drive("imu_link", IMU), expected) < misled / 5
