# SPDX-License-Identifier: Apache-2.0
"""Rigid transforms, against the devkit's quaternions and the poses of a real drive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qdbev_ros.core.errors import CalibrationError, DataError
from qdbev_ros.core.geometry import (
    CameraCalibration,
    Pose,
    interpolate,
    quaternion_multiply,
    quaternion_to_matrix,
    wrap_angle,
    yaw_quaternion,
)


def random_pose(seed: int) -> Pose:
    rng = np.random.default_rng(seed)
    rotation = rng.normal(size=4)
    return Pose(rotation / np.linalg.norm(rotation), rng.normal(size=3) * 10)


def test_quaternions_are_those_of_nuscenes(devkit: Any) -> None:
    """w first, Hamilton product, active rotation: pyquaternion's convention, which nuScenes stores."""
    quaternion = pytest.importorskip("pyquaternion").Quaternion
    for record in devkit.calibrated_sensor:
        q = np.array(record["rotation"])
        np.testing.assert_allclose(quaternion_to_matrix(q), quaternion(q).rotation_matrix, atol=1e-9)
        np.testing.assert_allclose(
            quaternion_multiply(q, [0.5, 0.5, -0.5, 0.5]),
            (quaternion(q) * quaternion(0.5, 0.5, -0.5, 0.5)).elements,
        )


def test_pose_maps_child_to_parent_as_the_devkit(devkit: Any) -> None:
    """Pose.matrix() is the devkit's transform_matrix, its yaw the devkit's quaternion_yaw."""
    from nuscenes.eval.common.utils import quaternion_yaw
    from nuscenes.utils.geometry_utils import transform_matrix
    from pyquaternion import Quaternion

    for record in devkit.ego_pose[::20]:
        pose = Pose(np.array(record["rotation"]), np.array(record["translation"]))
        expected = transform_matrix(record["translation"], Quaternion(record["rotation"]))
        np.testing.assert_allclose(pose.matrix(), expected, atol=1e-9)
        assert pose.yaw() == pytest.approx(quaternion_yaw(Quaternion(record["rotation"])), abs=1e-9)


def test_composition_and_inverse_are_matrix_product_and_inverse() -> None:
    a, b = random_pose(1), random_pose(2)
    np.testing.assert_allclose((a @ b).matrix(), a.matrix() @ b.matrix(), atol=1e-12)
    np.testing.assert_allclose(a.inverse().matrix(), np.linalg.inv(a.matrix()), atol=1e-12)


def test_interpolation_takes_the_short_way_whatever_the_sign_of_a_quaternion() -> None:
    start = Pose(yaw_quaternion(np.radians(170)), np.zeros(3))
    end = Pose(-yaw_quaternion(np.radians(-170)), np.array([2.0, 0.0, 0.0]))
    middle = interpolate(start, end, 0.5)
    assert abs(middle.yaw()) == pytest.approx(np.pi)
    np.testing.assert_allclose(middle.translation, [1.0, 0.0, 0.0])
    assert np.degrees(interpolate(start, end, 0.25).yaw()) == pytest.approx(175.0)


def test_interpolation_predicts_the_measured_pose_between_two_cameras(real_frames: Any) -> None:
    """The vehicle's pose at CAM_FRONT's stamp, from the two cameras that fired before and after it."""
    for frame in real_frames:
        poses = sorted(((c.stamp_ns, c.ego2global) for c in frame.cameras), key=lambda item: item[0])
        (t0, before), (t1, now), (t2, after) = poses[1:4]
        guess = interpolate(before, after, (t1 - t0) / (t2 - t0))
        assert np.linalg.norm(guess.translation - now.translation) < 0.01
        assert abs(wrap_angle(guess.yaw() - now.yaw())) < 0.001


@pytest.mark.parametrize(
    ("angle", "wrapped"), [(np.pi, np.pi), (-np.pi, np.pi), (3.5 * np.pi, -0.5 * np.pi), (0, 0)]
)
def test_wrapped_angles_lie_in_the_half_open_turn(angle: float, wrapped: float) -> None:
    assert wrap_angle(angle) == pytest.approx(wrapped)


@pytest.mark.parametrize("rotation", [[0, 0, 0, 0], [1, 1, 0, 0], [np.nan, 0, 0, 1], [1, 0, 0]])
def test_what_is_no_rotation_is_refused(rotation: list[float]) -> None:
    with pytest.raises(DataError, match="not a pose"):
        Pose(np.array(rotation, np.float64), np.zeros(3))


@pytest.mark.parametrize(("row", "column", "value"), [(2, 2, 0.0), (2, 0, 0.1), (1, 0, 5.0)])
def test_a_matrix_of_another_shape_than_a_cameras_is_refused_by_name(
    row: int, column: int, value: float
) -> None:
    k = np.array([[900.0, 0.1, 800], [0, 900, 450], [0, 0, 1]])
    CameraCalibration("CAM_BACK", k, 1600, 900, Pose.identity())  # a skew is allowed
    k[row, column] = value
    with pytest.raises(CalibrationError, match=r"CAM_BACK: K is no camera matrix, .* row is"):
        CameraCalibration("CAM_BACK", k, 1600, 900, Pose.identity())


@pytest.mark.parametrize("focal", [0.0, -500.0, np.nan])
def test_a_camera_without_focal_length_is_refused_by_name(focal: float) -> None:
    k = np.array([[focal, 0, 800], [0, focal, 450], [0, 0, 1]])
    with pytest.raises(CalibrationError, match="CAM_BACK"):
        CameraCalibration("CAM_BACK", k, 1600, 900, Pose.identity())
