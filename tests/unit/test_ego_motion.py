# SPDX-License-Identifier: Apache-2.0
"""The can_bus vector and the alignment of the old map, against a real drive around corners."""

from __future__ import annotations

import zlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from qdbev_ros.core.ego_motion import (
    EgoState,
    bev_shift,
    can_bus_vector,
    dynamics_from_poses,
    rotate_bev,
    rotation_sources,
)
from qdbev_ros.core.geometry import Pose, yaw_quaternion
from qdbev_ros.core.variant import BevSpec, load_variant

NANO, TINY = load_variant("nano"), load_variant("tiny")
FINE = BevSpec(400, 400, (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0), 4)  # cells of 0.256 m


def state(
    yaw_degrees: float, x: float = 0.0, y: float = 0.0, stamp_ns: int = 0, speed: float = 0.0
) -> EgoState:
    dynamics = np.zeros(9)
    dynamics[6] = speed
    return EgoState(stamp_ns, Pose(yaw_quaternion(np.radians(yaw_degrees)), np.array([x, y, 0.0])), dynamics)


def test_entries_of_a_real_frame(real_frames: Any) -> None:
    before, now = real_frames[10], real_frames[11]
    previous = EgoState(before.stamp_ns, before.ego2global, np.zeros(9))
    current = EgoState(now.stamp_ns, now.ego2global, np.arange(9.0))
    vector = can_bus_vector(previous, current, NANO.temporal)
    moved = now.ego2global.translation - before.ego2global.translation
    np.testing.assert_allclose(vector[0:3], moved, rtol=1e-5)
    np.testing.assert_allclose(vector[3:7], now.ego2global.rotation, rtol=1e-6)
    np.testing.assert_array_equal(vector[7:16], np.arange(9.0))
    assert 0 <= vector[16] < 2 * np.pi
    assert np.cos(vector[16] - now.ego2global.yaw()) == pytest.approx(1.0)
    assert vector[17] == pytest.approx(np.degrees(now.ego2global.yaw() - before.ego2global.yaw()), abs=1e-3)


def test_the_first_frame_has_no_deltas_but_keeps_its_absolute_entries() -> None:
    vector = can_bus_vector(None, state(-90, 100, 50), NANO.temporal)
    np.testing.assert_array_equal(vector[0:3], 0.0)
    assert vector[17] == 0.0
    assert vector[16] == pytest.approx(1.5 * np.pi)


def test_released_weights_see_the_jump_of_yaw_at_north_and_nano_does_not() -> None:
    previous, current = state(-2), state(3)
    assert can_bus_vector(previous, current, TINY.temporal)[17] == pytest.approx(-355.0, abs=1e-3)
    assert can_bus_vector(previous, current, NANO.temporal)[17] == pytest.approx(5.0, abs=1e-3)


def test_dynamics_from_poses_hold_speed_yaw_rate_and_centripetal_acceleration() -> None:
    previous = state(90, 0, 0, stamp_ns=0, speed=8.0)
    dynamics = dynamics_from_poses(previous, 500_000_000, state(100, 0, 5).pose)
    speed, yaw_rate = 10.0, np.radians(20)
    np.testing.assert_allclose(
        dynamics, [4.0, speed * yaw_rate, 9.81, 0, 0, yaw_rate, speed, 0, 0], atol=1e-9
    )
    np.testing.assert_array_equal(dynamics_from_poses(None, 1, state(0).pose), 0.0)


def test_shift_is_the_displacement_along_the_cars_own_axes() -> None:
    """Driving forward by a tenth of the map is (0, 0.1) whatever the heading; to the right is +x."""
    for heading in (0.0, 37.0, 200.0):
        forward = np.radians(heading)
        start, end = state(heading), state(heading, 10.24 * np.cos(forward), 10.24 * np.sin(forward))
        shift = bev_shift(can_bus_vector(start, end, NANO.temporal), NANO.bev)
        np.testing.assert_allclose(shift, [0.0, 0.1], atol=1e-6)
        right = forward - np.pi / 2
        aside = state(heading, 10.24 * np.cos(right), 10.24 * np.sin(right))
        shift = bev_shift(can_bus_vector(start, aside, NANO.temporal), NANO.bev)
        np.testing.assert_allclose(shift, [0.1, 0.0], atol=1e-6)


def test_what_stands_still_is_found_where_it_was(real_frames: Any) -> None:
    """Parked cars while the ego turns: turned map and shift lead from where a car is now to where it was then.

    The map holds at each cell the cell's own place, so a look-up says which old place it leads to. This is the test of
    signs, axes and order; a wrong one is off by metres.
    """
    places = np.stack(np.meshgrid((np.arange(400) + 0.5) / 400, (np.arange(400) + 0.5) / 400), -1).reshape(
        -1, 2
    )
    turns, errors = [], []
    for before, now in pairwise(real_frames):
        previous = EgoState(before.stamp_ns, before.ego2global, np.zeros(9))
        vector = can_bus_vector(previous, EgoState(now.stamp_ns, now.ego2global, np.zeros(9)), NANO.temporal)
        turned = rotate_bev(places.astype(np.float32), rotation_sources(float(vector[17]), FINE, None))
        turns.append(abs(vector[17]))
        old = dict(zip(before.annotations.instances, before.annotations.boxes.centers))
        for i, instance in enumerate(now.annotations.instances):
            center = now.annotations.boxes.centers[i]
            parked = now.annotations.attributes[i] == "vehicle.parked"
            if not parked or instance not in old or np.abs(center[:2]).max() > 25:
                continue
            column, row = (((center[:2] + 51.2) / 102.4 + bev_shift(vector, FINE)) * 400).astype(int)
            led_to = turned[row * 400 + column] * 102.4 - 51.2
            errors.append(np.linalg.norm(led_to - old[instance][:2]))
    assert max(turns) > 10  # degrees between two frames: the drive does turn
    assert len(errors) > 100
    # half a cell, twice, plus the lidar's 0.94 m from the turning point, which the alignment ignores
    assert np.median(errors) < 0.3
    assert np.max(errors) < 0.8


def test_the_map_turns_clockwise_in_vehicle_axes_when_the_car_turns_left() -> None:
    """A left turn by 90 degrees: what was straight ahead (top rows) is now on the right (last columns)."""
    bev = BevSpec(5, 5, NANO.bev.pc_range, 4)
    ahead = np.zeros((25, 1), np.float32)
    ahead[4 * 5 + 2] = 1.0
    turned = rotate_bev(ahead, rotation_sources(90.0, bev, None))
    assert np.flatnonzero(turned).tolist() == [2 * 5 + 4]
    assert ahead[4 * 5 + 2] == 1.0  # the old map itself is not touched


def test_the_released_weights_centre_lies_outside_tinys_map() -> None:
    """(100, 100) on a 50 x 50 map: one degree moves the map's middle by about 1.85 cells, as they were trained."""
    places = np.stack(np.meshgrid(np.arange(50.0), np.arange(50.0)), -1).reshape(-1, 2).astype(np.float32)
    sources = rotation_sources(1.0, TINY.bev, TINY.temporal.rotate_center)
    moved = rotate_bev(places, sources)[25 * 50 + 25] - [25, 25]
    assert np.linalg.norm(moved) == pytest.approx(1.85, abs=0.6)
    true_centre = rotate_bev(places, rotation_sources(1.0, TINY.bev, None))[25 * 50 + 25]
    np.testing.assert_array_equal(true_centre, [25, 25])


@pytest.mark.parametrize(
    ("size", "degrees", "checksum"),
    [
        ((50, 50), 1.0, 2608581567),
        ((150, 150), 45.0, 3962298493),
        ((200, 200), -34.77836668709669, 4194708928),
    ],
)
def test_every_cell_comes_from_where_torchvisions_rotate_takes_it_ties_included(
    size: tuple[int, int], degrees: float, checksum: int
) -> None:
    """Checksums of what torchvision 0.28 does about (100, 100); other orders of float32 sums miss some cells."""
    sources = rotation_sources(degrees, BevSpec(*size, TINY.bev.pc_range, 4), (100.0, 100.0))
    assert zlib.crc32(sources.astype("<i4").tobytes()) == checksum
