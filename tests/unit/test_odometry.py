# SPDX-License-Identifier: Apache-2.0
"""Odometry of any frame of the vehicle tells how the vehicle moves, or says why it cannot."""

from __future__ import annotations

import numpy as np
import pytest

from qdbev_ros.core.geometry import Pose, yaw_quaternion
from qdbev_ros.core.odometry import OdometryMotion
from qdbev_ros.core.pose_buffer import TransformTree, TransformUnavailable

MS = 1_000_000
IMU = Pose(
    yaw_quaternion(np.pi / 2), np.array([1.5, 0.4, 0.6])
)  # turned to the left, ahead of the vehicle's frame


def ego(ms: int) -> Pose:
    """A left bend."""
    return Pose(yaw_quaternion(ms * 1e-3), np.array([ms * 5e-3, ms * 1e-3, 0.0]))


def motion(
    frame: str = "", mounting: Pose | None = None, tree: TransformTree | None = None
) -> OdometryMotion:
    """What a second of odometry of `frame` tells, which is at `mounting` in the vehicle."""
    made = OdometryMotion("/odom", "base_link", tree or TransformTree())
    for ms in range(0, 1001, 50):
        made.insert(frame, ms * MS, ego(ms) @ (mounting or Pose.identity()))
    return made


@pytest.mark.parametrize("frame", ["", "base_link"])
def test_odometry_of_the_vehicle_is_interpolated(frame: str) -> None:
    pose = motion(frame).lookup(475 * MS)
    np.testing.assert_allclose(pose.translation, ego(475).translation)
    assert pose.yaw() == pytest.approx(0.475)


def test_odometry_of_a_frame_below_or_above_the_vehicles_is_that_of_the_vehicle() -> None:
    below, above = TransformTree(), TransformTree()
    below.set_static("base_link", "imu_link", IMU)
    above.set_static("imu_link", "base_link", IMU.inverse())
    for tree in (below, above):
        pose = motion("imu_link", IMU, tree).lookup(500 * MS)
        np.testing.assert_allclose(pose.matrix(), ego(500).matrix(), atol=1e-9)


def test_a_mounting_that_is_told_after_the_odometry_is_in_time() -> None:
    tree = TransformTree()
    made = motion("imu_link", IMU, tree)
    with pytest.raises(
        TransformUnavailable, match="/odom is of frame 'imu_link', from which nothing"
    ) as told:
        made.lookup(500 * MS)
    assert told.value.wait
    tree.set_static("base_link", "imu_link", IMU)
    np.testing.assert_allclose(made.lookup(500 * MS).matrix(), ego(500).matrix(), atol=1e-9)


def test_nothing_is_extrapolated_and_the_topic_is_named() -> None:
    with pytest.raises(TransformUnavailable, match="no odometry on /odom"):
        OdometryMotion("/odom", "base_link", TransformTree()).lookup(0)
    with pytest.raises(TransformUnavailable, match=r"the newest odometry on /odom is 0\.200 s older") as told:
        motion().lookup(1200 * MS)
    assert told.value.late_s == pytest.approx(0.2)


def test_poses_of_another_frame_or_another_pass_are_never_mixed() -> None:
    made = motion()
    made.insert("imu_link", 1050 * MS, IMU)
    made.insert("", 1100 * MS, ego(1100))
    with pytest.raises(TransformUnavailable, match="younger than asked for"):
        made.lookup(500 * MS)
    again = motion()
    again.insert("", 0, ego(0))
    with pytest.raises(TransformUnavailable, match="older than asked for"):
        again.lookup(500 * MS)


def test_pictures_that_go_back_in_time_forget_the_pass_before() -> None:
    made = motion()
    made.forget_after(600 * MS)
    assert made.lookup(500 * MS).yaw() == pytest.approx(0.5)
    made.forget_after(400 * MS)
    with pytest.raises(TransformUnavailable, match="no odometry"):
        made.lookup(500 * MS)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_odometry_and_a_mounting_that_add_up_to_no_number_give_no_pose() -> None:
    tree = TransformTree()
    tree.set_static("base_link", "imu", Pose(yaw_quaternion(0.8), np.array([1.7e308, 1.7e308, 0.0])))
    with pytest.raises(TransformUnavailable, match=r"/odom .* 'imu' .* no pose"):
        motion("imu", tree=tree).lookup(475 * MS)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_odometry_far_away_and_a_good_mounting_add_up_to_no_number() -> None:
    tree = TransformTree()
    tree.set_static("base_link", "imu", Pose(yaw_quaternion(0.8), np.array([-9e307, -9e307, 0.0])))
    far = OdometryMotion("/odom", "base_link", tree)
    far.insert("imu", 0, Pose(yaw_quaternion(0.8), np.array([1.7e308, 1.7e308, 0.0])))
    with pytest.raises(TransformUnavailable, match=r"/odom.* no pose"):
        far.lookup(0)
