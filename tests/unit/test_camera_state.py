# SPDX-License-Identifier: Apache-2.0
"""What is said about a camera's input, and which CameraInfo is taken for one."""

from __future__ import annotations

import numpy as np
import pytest

from qdbev_ros.core.health import Level
from qdbev_ros.ros.camera_state import CameraState, Intrinsics, check_intrinsics

K = np.array([1266.0, 0, 800, 0, 1260, 450, 0, 0, 1])
P = np.array([1200.0, 0, 790, 0, 0, 1200, 440, 0, 0, 0, 1, 0])


def with_entry(matrix: np.ndarray, index: int, value: float) -> np.ndarray:
    changed = matrix.copy()
    changed[index] = value
    return changed


@pytest.fixture
def state() -> CameraState:
    return CameraState("CAM_FRONT", "/front/image", "/front/info")


def test_the_projection_of_the_rectified_picture_wins() -> None:
    assert check_intrinsics(K, P, 1600, 900).matrix[0].tolist() == [1200, 0, 790]


def test_without_a_projection_k_holds() -> None:
    assert check_intrinsics(K, np.zeros(12), 1600, 900).matrix[0].tolist() == [1266, 0, 800]


@pytest.mark.parametrize(
    ("k", "p", "size", "text"),
    [
        (np.zeros(9), P, (1600, 900), "fx = 0"),
        (np.full(9, np.nan), P, (1600, 900), "NaN"),
        (K, np.full(12, np.inf), (1600, 900), "infinite"),
        (with_entry(K, 8, 0.0), P, (1600, 900), r"K is no camera matrix, its last row is 0 0 0"),
        (with_entry(K, 6, 0.1), P, (1600, 900), r"K is no camera matrix, its last row is 0\.1 0 1"),
        (
            with_entry(K, 3, 5.0),
            P,
            (1600, 900),
            r"K is no camera matrix, the first number of its second row is 5",
        ),
        (K, with_entry(P, 10, 0.0), (1600, 900), r"P is no camera matrix, its last row is 0 0 0"),
        (
            K,
            with_entry(P, 4, -2.0),
            (1600, 900),
            r"P is no camera matrix, the first number of its second row is -2",
        ),
        (K, P, (0, 900), "0x900"),
    ],
)
def test_what_cannot_project_is_refused_with_the_reason(
    k: np.ndarray, p: np.ndarray, size: tuple[int, int], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        check_intrinsics(k, p, *size)


def test_topics_that_never_delivered_are_named(state: CameraState) -> None:
    assert state.status(0.0) == (Level.ERROR, "/front/image never delivered a picture")
    state.image_arrived(0.0)
    assert state.status(0.1) == (Level.ERROR, "/front/info never delivered a CameraInfo")


def test_a_camera_that_fell_silent_is_stale(state: CameraState) -> None:
    state.intrinsics = Intrinsics(np.eye(3), 10, 10)
    for i in range(20):
        state.image_arrived(i / 10)
    assert state.rate() == pytest.approx(10.0)
    assert state.status(2.0)[0] == Level.OK
    assert state.status(5.0) == (Level.STALE, "/front/image has been silent for 3.1 s")


def test_a_slow_camera_is_not_stale_between_its_pictures(state: CameraState) -> None:
    state.intrinsics = Intrinsics(np.eye(3), 10, 10)
    for i in range(5):
        state.image_arrived(i * 1.0)
    assert state.status(6.5)[0] == Level.OK


def test_a_damaged_picture_is_told_until_a_good_one(state: CameraState) -> None:
    state.intrinsics = Intrinsics(np.eye(3), 10, 10)
    state.image_arrived(0.0)
    state.picture_failed("no JPEG")
    assert state.status(0.1) == (Level.ERROR, "/front/image: no JPEG")
    assert state.picture_errors == 1


def test_a_camera_that_was_left_out_is_told_until_it_is_used_again(state: CameraState) -> None:
    state.intrinsics = Intrinsics(np.eye(3), 10, 10)
    state.image_arrived(0.0)
    state.answered("no picture in time")
    assert state.status(0.1) == (
        Level.WARN,
        "/front/image: left out of the last answer: no picture in time",
    )
    state.answered(None)
    assert state.status(0.1)[0] == Level.OK
    assert state.sets_without == 1
