# SPDX-License-Identifier: Apache-2.0
"""From the LIDAR_TOP frame to pixels, against the devkit's projection, and the gather tables against brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qdbev_ros.core.projection import (
    CELL_BLOCK,
    pillar_points,
    project_points,
    scale_to_input,
    stack_lidar2img,
    visible_cells,
)
from qdbev_ros.core.variant import CAMERAS, BevSpec, load_variant

NANO = load_variant("nano")


def input_matrices(frame: Any) -> Any:
    """(6, 4, 4) at the scale of nano's input."""
    return stack_lidar2img(
        [scale_to_input(frame.lidar2img(c), c.calibration, NANO.image) for c in frame.cameras]
    )


def test_boxes_land_on_the_pixels_where_the_devkit_puts_them(devkit: Any, real_frames: Any) -> None:
    """Through lidar and both ego poses we get the devkit's pixel of every box centre in every camera."""
    from nuscenes.utils.geometry_utils import view_points

    compared = 0
    for frame in real_frames[::8]:
        global2lidar = frame.lidar2global.inverse()
        sample = devkit.get("sample", frame.sample_token)
        for camera in frame.cameras:
            _, boxes, k = devkit.get_sample_data(sample["data"][camera.calibration.name])
            for box in boxes:
                center = np.array(devkit.get("sample_annotation", box.token)["translation"])
                in_lidar = (global2lidar.matrix() @ [*center, 1.0])[:3]
                pixel, depth = project_points(frame.lidar2img(camera), in_lidar)
                expected = view_points(box.center[:, None], np.array(k), normalize=True)[:2, 0]
                np.testing.assert_allclose(pixel, expected, atol=0.01)
                assert depth == pytest.approx(box.center[2], abs=1e-4)
                compared += 1
    assert compared > 100


def test_input_pixels_are_image_pixels_times_the_resize_factor(real_frames: Any) -> None:
    frame = real_frames[0]
    camera = frame.cameras[0]
    ahead = np.array([1.0, 20.0, -1.0])
    full, _ = project_points(frame.lidar2img(camera), ahead)
    small, depth = project_points(
        scale_to_input(frame.lidar2img(camera), camera.calibration, NANO.image), ahead
    )
    np.testing.assert_allclose(small, full * [256 / 1600, 144 / 900])
    assert 15 < depth < 20  # the camera sits in front of the lidar


@pytest.mark.parametrize(
    ("point", "camera"),
    [
        ((0, 20, 0), "CAM_FRONT"),
        ((0, -20, 0), "CAM_BACK"),
        ((-20, 8, 0), "CAM_FRONT_LEFT"),
        ((20, 8, 0), "CAM_FRONT_RIGHT"),
        ((-20, -8, 0), "CAM_BACK_LEFT"),
        ((20, -8, 0), "CAM_BACK_RIGHT"),
    ],
)
def test_each_camera_sees_its_side_of_the_map(
    real_frames: Any, point: tuple[float, ...], camera: str
) -> None:
    """x is right, y forward; rows of the map grow with y, columns with x."""
    cells = visible_cells(input_matrices(real_frames[0]), NANO.bev, NANO.image)
    column, row = (int((p + 51.2) / 2.56) for p in point[:2])
    seen = cells.mask[:, row * NANO.bev.width + column]
    assert camera in [name for name, s in zip(CAMERAS, seen) if s]


def test_pillars_stand_on_cell_centres_at_the_reference_heights() -> None:
    tiny = load_variant("tiny").bev
    points = pillar_points(tiny)
    assert points.shape == (2500, 4, 3)
    np.testing.assert_allclose(points[0, 0, :2], [-50.176, -50.176])
    np.testing.assert_allclose(points[1, 0, :2], [-48.128, -50.176])  # the next column is further right
    np.testing.assert_allclose(points[0, :, 2], [-4.5, -2.1667, 0.1667, 2.5], atol=1e-4)


def test_gather_tables_say_what_the_masks_say(real_frames: Any) -> None:
    """Averaging gathered rows by `slots` and `weights` equals averaging over the cameras that see the cell."""
    matrices = input_matrices(real_frames[0])
    tables = visible_cells(matrices, NANO.bev, NANO.image)
    n, m = tables.cells.shape
    assert m % CELL_BLOCK == 0
    value = np.random.default_rng(0).normal(size=(n, NANO.bev.cells))  # one number for each camera and cell
    padded = np.concatenate([value, np.zeros((n, 1))], axis=1)
    rows = np.append(np.take_along_axis(padded, tables.cells, axis=1).reshape(-1), 0.0)
    got = (rows[tables.slots] * tables.weights).sum(-1)
    seen = np.maximum(tables.mask.sum(0), 1)
    np.testing.assert_allclose(got, (value * tables.mask).sum(0) / seen, atol=1e-6)


def test_gathered_points_are_the_projected_pillars(real_frames: Any) -> None:
    matrices = input_matrices(real_frames[0])
    tables = visible_cells(matrices, NANO.bev, NANO.image)
    anchors = pillar_points(NANO.bev)
    for camera in range(6):
        cell = tables.cells[camera, 0]
        pixel, depth = project_points(matrices[camera].astype(np.float64), anchors[cell])
        visible = depth > 0.1
        np.testing.assert_allclose(
            tables.points[camera, 0][visible] * [256, 144], pixel[visible], rtol=1e-3, atol=0.05
        )


def test_an_absent_camera_sees_nothing_and_the_others_as_before(real_frames: Any) -> None:
    matrices = input_matrices(real_frames[0])
    everything = visible_cells(matrices, NANO.bev, NANO.image)
    without_front = matrices.copy()
    without_front[0] = 0.0
    tables = visible_cells(without_front, NANO.bev, NANO.image)
    assert not tables.mask[0].any()
    np.testing.assert_array_equal(tables.mask[1:], everything.mask[1:])


def test_no_camera_at_all_still_gives_tables() -> None:
    bev = BevSpec(4, 4, NANO.bev.pc_range, 4)
    tables = visible_cells(np.zeros((6, 4, 4), np.float32), bev, NANO.image)
    assert not tables.weights.any()
    assert (tables.cells == bev.cells).all()
