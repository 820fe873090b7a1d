# SPDX-License-Identifier: Apache-2.0
"""The overview picture: boxes land where they project to, truth beside them, missing cameras said."""

from __future__ import annotations

import numpy as np
import pytest

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.drawing import (
    BEV_SIZE,
    COLORS,
    PANEL_HEIGHT,
    PANEL_WIDTH,
    View,
    draw_birds_eye,
    draw_camera,
    draw_overview,
)
from qdbev_ros.core.variant import CAMERAS, CLASSES

NOBODY = Boxes(*(np.zeros(s) for s in ((0, 3), (0, 3), 0, (0, 2), 0)), labels=np.zeros(0, np.int64))


def car(x: float, y: float, yaw: float = np.pi / 2, speed: float = 0.0) -> Boxes:
    """A car in the LIDAR_TOP frame."""
    velocity = speed * np.array([[np.cos(yaw), np.sin(yaw)]])
    return Boxes(
        np.array([[x, y, 0.0]]), np.array([[2.0, 4.5, 1.6]]), np.array([yaw]), velocity, np.array([0.8]),
        np.array([CLASSES.index("car")]),
    )  # fmt: skip


@pytest.fixture
def view() -> View:
    """A camera that looks along +y of the LIDAR_TOP frame, with a grey picture twice the panel's size."""
    width, height = 2 * PANEL_WIDTH, 2 * PANEL_HEIGHT
    k = np.array([[800.0, 0, width / 2, 0], [0, 800.0, height / 2, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    axes = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # right, down, forward
    return View(np.full((height, width, 3), 90, np.uint8), k @ axes)


def colored(picture: np.ndarray, name: str) -> np.ndarray:
    """(n, 2) rows and columns of pixels near the class's colour."""
    distance = np.abs(picture.astype(int) - np.array(COLORS[name])).max(-1)
    return np.argwhere(distance < 25)


def test_a_box_ahead_is_drawn_around_where_it_projects_to(view: View) -> None:
    pixels = colored(draw_camera(view, "CAM_FRONT", car(0.0, 15.0), NOBODY), "car")
    assert len(pixels) > 50
    rows, columns = pixels.T
    # 2 m wide at 12.75 m, its near face: +-31 pixels of a panel.
    assert columns.min() == pytest.approx(PANEL_WIDTH / 2 - 31, abs=3)
    assert columns.max() == pytest.approx(PANEL_WIDTH / 2 + 31, abs=3)
    assert rows.max() == pytest.approx(PANEL_HEIGHT / 2 + 25, abs=3)


@pytest.mark.parametrize("place", [(0.0, -15.0), (60.0, 5.0)])
def test_boxes_behind_or_beside_the_camera_leave_no_trace(view: View, place: tuple[float, float]) -> None:
    empty = draw_camera(view, "CAM_FRONT", NOBODY, NOBODY)
    np.testing.assert_array_equal(draw_camera(view, "CAM_FRONT", car(*place), car(*place)), empty)


def test_a_box_through_the_image_plane_is_cut_not_smeared(view: View) -> None:
    """The camera stands inside a box's shadow: corners behind it must not wrap around."""
    picture = draw_camera(view, "CAM_FRONT", car(1.5, 1.0), NOBODY)
    _rows, columns = colored(picture, "car").T
    assert columns.min() > PANEL_WIDTH / 2


def test_birds_eye_view_has_forward_up_and_right_right() -> None:
    rows, columns = colored(draw_birds_eye(car(20.0, 30.0), NOBODY, 512), "car").T
    assert columns.mean() == pytest.approx(256 + 20 * 5, abs=6)
    assert rows.mean() == pytest.approx(256 - 30 * 5, abs=6)


def test_the_velocity_arrow_is_as_long_as_a_second_of_motion() -> None:
    rows, _ = colored(draw_birds_eye(car(0.0, 10.0, speed=20.0), NOBODY, 512), "car").T
    assert rows.min() == pytest.approx(256 - 30 * 5, abs=3)


def test_a_missing_picture_is_said_and_the_whole_has_one_size(view: View) -> None:
    full = draw_overview(dict.fromkeys(CAMERAS, view), car(0.0, 15.0), car(0.5, 15.0), "title", "footer")
    partial = draw_overview({"CAM_FRONT": view}, NOBODY, NOBODY, "title")
    assert full.shape == partial.shape
    assert full.shape[1] > 3 * PANEL_WIDTH + BEV_SIZE
    assert (draw_camera(None, "CAM_BACK", NOBODY, NOBODY) > 200).any(), "the note is written"


def test_a_box_whose_front_is_outside_the_picture_is_drawn_as_far_as_it_is_inside(view: View) -> None:
    for x, yaw in ((-7.0, np.pi), (7.0, 0.0)):
        rows, columns = colored(draw_camera(view, "CAM_FRONT", car(x, 10.0, yaw), NOBODY), "car").T
        assert len(rows) > 20
        assert columns.max() < PANEL_WIDTH / 2 or columns.min() > PANEL_WIDTH / 2
