# SPDX-License-Identifier: Apache-2.0
"""The transform tree: interpolation between stamps, never extrapolation, and no pose of another pass."""

from __future__ import annotations

import numpy as np
import pytest

from qdbev_ros.core.geometry import Pose, yaw_quaternion
from qdbev_ros.core.pose_buffer import MAX_HZ, PoseTrack, TransformTree, TransformUnavailable

SECOND = 1_000_000_000


def at(x: float, y: float = 0.0, yaw: float = 0.0) -> Pose:
    return Pose(yaw_quaternion(yaw), np.array([x, y, 0.0]))


@pytest.fixture
def tree() -> TransformTree:
    """A vehicle that drives 2 m and turns by 0.2 rad in the first second, with a camera and a lidar."""
    tree = TransformTree()
    tree.set_static("base_link", "CAM", at(1.0))
    tree.set_static("base_link", "LIDAR", at(0.5, yaw=-np.pi / 2))
    tree.insert("map", "base_link", 0, at(10.0))
    tree.insert("map", "base_link", SECOND, at(12.0, yaw=0.2))
    return tree


def test_a_pose_between_two_stamps_is_interpolated(tree: TransformTree) -> None:
    pose = tree.lookup("map", "base_link", SECOND // 4)
    np.testing.assert_allclose(pose.translation, [10.5, 0, 0])
    assert pose.yaw() == pytest.approx(0.05)


def test_a_pose_at_a_stamp_is_exactly_the_one_received(tree: TransformTree) -> None:
    assert tree.lookup("map", "base_link", SECOND).yaw() == pytest.approx(0.2, abs=1e-15)


def test_static_frames_compose_upwards_downwards_and_sideways(tree: TransformTree) -> None:
    np.testing.assert_allclose(tree.lookup("base_link", "CAM", 5).translation, [1, 0, 0])
    np.testing.assert_allclose(tree.lookup("CAM", "base_link", 5).translation, [-1, 0, 0])
    np.testing.assert_allclose(tree.lookup("map", "CAM", 0).translation, [11, 0, 0])
    # The camera is half a metre before the lidar; the lidar's y axis points forward.
    np.testing.assert_allclose(tree.lookup("LIDAR", "CAM", 5).translation, [0, 0.5, 0], atol=1e-12)


def test_siblings_need_no_moving_transform(tree: TransformTree) -> None:
    """A camera relative to the lidar does not depend on where the vehicle is, or whether that is known."""
    tree.forget_moving()
    np.testing.assert_allclose(tree.lookup("LIDAR", "CAM", 99 * SECOND).translation, [0, 0.5, 0], atol=1e-12)


def test_a_chain_of_moving_frames_is_followed() -> None:
    tree = TransformTree()
    for stamp, x in ((0, 0.0), (SECOND, 1.0)):
        tree.insert("map", "odom", stamp, at(100.0))
        tree.insert("odom", "base_link", stamp, at(x))
    np.testing.assert_allclose(tree.lookup("map", "base_link", SECOND // 2).translation, [100.5, 0, 0])


def test_a_stamp_after_the_newest_pose_must_wait(tree: TransformTree) -> None:
    with pytest.raises(TransformUnavailable, match=r"map -> base_link is 0\.500 s older") as caught:
        tree.lookup("map", "base_link", SECOND * 3 // 2)
    assert caught.value.wait


def test_a_stamp_before_the_oldest_pose_is_not_extrapolated(tree: TransformTree) -> None:
    with pytest.raises(TransformUnavailable, match="younger"):
        tree.lookup("map", "base_link", -1)


def test_no_interpolation_across_a_hole(tree: TransformTree) -> None:
    tree.insert("map", "base_link", 4 * SECOND, at(50.0))
    with pytest.raises(TransformUnavailable, match=r"hole of 3\.000 s"):
        tree.lookup("map", "base_link", 2 * SECOND)


def test_unknown_and_unconnected_frames_are_named(tree: TransformTree) -> None:
    with pytest.raises(TransformUnavailable, match="'CAM_9'"):
        tree.lookup("base_link", "CAM_9", 0)
    tree.set_static("arm", "hand", at(0.0))
    with pytest.raises(TransformUnavailable, match="'map' and 'hand' are not connected"):
        tree.lookup("map", "hand", 0)


def test_poses_out_of_order_are_sorted_in(tree: TransformTree) -> None:
    tree.insert("map", "base_link", SECOND * 3 // 4, at(20.0))
    assert tree.lookup("map", "base_link", SECOND * 3 // 4).translation[0] == 20.0
    assert tree.resets == 0


def test_time_going_back_forgets_the_old_pass_but_not_the_calibration(tree: TransformTree) -> None:
    tree.insert("map", "base_link", 9 * SECOND, at(90.0))
    tree.insert("map", "base_link", 0, at(10.0))
    assert tree.resets == 1
    assert tree.lookup("base_link", "CAM", 0).translation[0] == 1.0
    with pytest.raises(TransformUnavailable):
        tree.lookup("map", "base_link", SECOND)


def test_a_jump_back_of_the_pictures_drops_poses_of_the_future_only(tree: TransformTree) -> None:
    tree.forget_after(SECOND // 2)
    assert tree.resets == 0
    tree.insert("map", "base_link", 5 * SECOND, at(0.0))
    tree.forget_after(SECOND // 2)
    assert tree.resets == 1


def test_memory_is_bounded_by_time_and_count() -> None:
    tree = TransformTree(keep_s=10.0)
    for i in range(9000):
        tree.insert("map", "base_link", i * SECOND // 1000, at(float(i)))
    assert len(tree._tracks["base_link"].stamps) == 10 * MAX_HZ
    tree.insert("map", "base_link", 100 * SECOND, at(0.0))
    assert len(tree._tracks["base_link"].stamps) == 1


def test_a_whole_recording_is_kept_where_that_is_asked_for() -> None:
    """A minute of 100 poses a second, for which somebody asks at its end."""
    tree = TransformTree(keep_s=1e9)
    for i in range(6000):
        tree.insert("map", "base_link", i * SECOND // 100, at(float(i)))
    np.testing.assert_allclose(tree.lookup("map", "base_link", SECOND // 200).translation, [0.5, 0, 0])


def test_the_nearest_pose_is_found_among_all() -> None:
    track = PoseTrack()
    for stamp in (10, 20, 40):
        track.insert(stamp, at(float(stamp)))
    found = [int(track.nearest(stamp).translation[0]) for stamp in (0, 14, 16, 29, 31, 99)]
    assert found == [10, 10, 20, 20, 40, 40]


def test_a_bolted_sensor_sent_on_tf_is_where_it_was_sent_last() -> None:
    """Some tools repeat the sensors' transforms on /tf. A picture need not wait for the next one."""
    tree = TransformTree()
    here, there = (Pose(np.array([1.0, 0, 0, 0]), np.array([x, 0.0, 0.0])) for x in (1.0, 2.0))
    tree.insert("base_link", "CAM_FRONT", 1_000_000_000, here)
    tree.insert("base_link", "CAM_FRONT", 1_400_000_000, there)
    with pytest.raises(TransformUnavailable):
        tree.lookup("base_link", "CAM_FRONT", 1_500_000_000)
    for stamp, pose in ((900_000_000, here), (1_100_000_000, here), (1_500_000_000, there)):
        found = tree.lookup("base_link", "CAM_FRONT", stamp, rigid=True)
        assert found.translation.tolist() == pose.translation.tolist()


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("rigid", [True, False])
def test_transforms_that_add_up_to_no_number_are_unavailable_with_the_frames_names(
    tree: TransformTree, rigid: bool
) -> None:
    """Each of them is finite."""
    tree.set_static("base_link", "CAM", at(1.7e308, 1.7e308, yaw=0.8))
    tree.set_static("CAM", "LENS", at(1.7e308, 1.7e308, yaw=0.8))
    for target, source in (("base_link", "LENS"), ("LENS", "base_link"), ("map", "LENS")):
        with pytest.raises(TransformUnavailable, match=f"'{target}' and '{source}'.* no pose") as caught:
            tree.lookup(target, source, SECOND // 2, rigid)
        assert not caught.value.wait
