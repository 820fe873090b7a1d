# SPDX-License-Identifier: Apache-2.0
"""When the past is used, and when it is forgotten."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qdbev_ros.core.geometry import CameraCalibration, Pose, yaw_quaternion
from qdbev_ros.core.memory import CalibrationWatch, TemporalMemory
from qdbev_ros.core.variant import load_variant

NANO, TINY = load_variant("nano"), load_variant("tiny")
SECOND = 1_000_000_000
MAP = np.ones((4, 2), np.float32)


def at(x: float) -> Pose:
    return Pose(np.array([1.0, 0, 0, 0]), np.array([x, 0.0, 0.0]))


def running(frames: int = 3) -> TemporalMemory:
    """A memory that has seen `frames` frames, half a second and a metre apart, the last at x = frames - 1."""
    memory = TemporalMemory(NANO.temporal)
    for i in range(frames):
        memory.step(i * SECOND // 2, at(float(i)), "drive")
        memory.store(MAP * i)
    return memory


def test_the_first_frame_has_no_past() -> None:
    step = TemporalMemory(NANO.temporal).step(0, at(0), "drive")
    assert (step.prev_bev, step.age, step.gap_s, step.reset) == (None, 0, 0.0, None)
    assert not step.can_bus[:3].any()


def test_the_next_frame_gets_the_last_map_and_the_way_since() -> None:
    step = running().step(3 * SECOND // 2, at(3.0), "drive")
    np.testing.assert_array_equal(step.prev_bev, MAP * 2)
    assert step.can_bus[0] == 1.0
    assert (step.age, step.gap_s, step.reset) == (3, 0.5, None)


@pytest.mark.parametrize(
    ("stamp_ns", "x", "scene", "reason"),
    [
        (3 * SECOND // 2, 3.0, "another drive", "scene_change"),
        (4 * SECOND, 3.0, "drive", "gap"),
        (SECOND, 3.0, "drive", "time_back"),
        (0, 0.0, "drive", "time_back"),
        (3 * SECOND // 2, 60.0, "drive", "ego_jump"),
    ],
)
def test_the_past_is_dropped_where_it_explains_nothing(
    stamp_ns: int, x: float, scene: str, reason: str
) -> None:
    memory = running()
    step = memory.step(stamp_ns, at(x), scene)
    assert step.reset == reason
    assert step.prev_bev is None
    assert not step.can_bus[:3].any()
    assert memory.resets == {reason: 1}


def test_a_frame_whose_result_never_came_leaves_no_map_and_no_deltas() -> None:
    memory = running()
    memory.step(3 * SECOND // 2, at(3.0), "drive")
    step = memory.step(2 * SECOND, at(4.0), "drive")
    assert step.prev_bev is None
    assert not step.can_bus[:3].any()


def test_a_reset_on_request_forgets_and_is_counted() -> None:
    memory = running()
    memory.reset("requested")
    step = memory.step(3 * SECOND // 2, at(3.0), "drive")
    assert step.prev_bev is None
    assert step.age == 0
    assert step.reset == "requested"
    assert memory.resets == {"requested": 1}
    memory.store(MAP)
    assert memory.step(2 * SECOND, at(4.0), "drive").reset is None


def test_a_reset_with_nothing_to_forget_is_counted_but_changes_no_answer() -> None:
    memory = TemporalMemory(NANO.temporal)
    memory.reset("requested")
    assert memory.step(0, at(0.0), "drive").reset is None
    assert memory.resets == {"requested": 1}


def rig(**changes: Any) -> dict[str, CameraCalibration]:
    """Two cameras; `changes` are for the second."""
    intrinsics = np.array([[1260.0, 0, 800], [0, 1260, 450], [0, 0, 1]])
    entry = {"intrinsics": intrinsics, "width": 1600, "height": 900, "sensor2ego": at(1.0)} | changes
    return {
        "CAM_FRONT": CameraCalibration("CAM_FRONT", intrinsics, 1600, 900, at(1.5)),
        "CAM_BACK": CameraCalibration("CAM_BACK", **entry),
    }


@pytest.mark.parametrize(
    "change",
    [
        {"sensor2ego": at(1.02)},
        {"sensor2ego": Pose(yaw_quaternion(np.radians(0.5)), np.array([1.0, 0, 0]))},
        {"intrinsics": np.array([[1300.0, 0, 800], [0, 1300, 450], [0, 0, 1]])},
    ],
)
def test_a_camera_that_was_moved_or_zoomed_is_noticed_once(change: dict[str, Any]) -> None:
    watch = CalibrationWatch()
    assert watch.changed(rig(), at(0)) is None
    assert watch.changed(rig(), at(0)) is None
    assert watch.changed(rig(**change), at(0)) == "CAM_BACK"
    assert watch.changed(rig(**change), at(0)) is None


def test_a_camera_that_comes_and_goes_is_no_change_but_a_creeping_one_is() -> None:
    watch = CalibrationWatch()
    assert watch.changed(rig(), at(0)) is None
    assert watch.changed({}, at(0)) is None
    assert watch.changed(rig(), at(0)) is None
    noticed = [watch.changed(rig(sensor2ego=at(1.0 + 0.004 * i)), at(0)) for i in range(1, 4)]
    assert noticed == [None, None, "CAM_BACK"]
    assert watch.changed(rig(sensor2ego=at(1.012)), at(0.1)) == "model frame"


def test_dynamics_come_from_poses_or_from_the_can_bus_as_the_variant_says() -> None:
    from_poses = running().step(3 * SECOND // 2, at(3.0), "drive", np.full(9, 7.0)).can_bus
    assert from_poses[13] == pytest.approx(2.0)  # a metre in half a second
    from_can = TemporalMemory(TINY.temporal).step(0, at(0), "drive", np.full(9, 7.0)).can_bus
    np.testing.assert_array_equal(from_can[7:16], 7.0)


def test_without_a_can_bus_the_dynamics_come_from_the_poses() -> None:
    memory = TemporalMemory(TINY.temporal)
    memory.step(0, at(0), "drive")
    memory.store(MAP)
    without_file = memory.step(SECOND // 2, at(1.0), "drive").can_bus
    assert without_file[13] == pytest.approx(2.0)
    assert without_file[9] == pytest.approx(9.81, abs=0.01)


def test_a_real_drive_is_one_piece(real_frames: Any) -> None:
    """41 key frames at about 2 Hz around corners: nothing of it looks like a jump or a gap."""
    memory = TemporalMemory(NANO.temporal)
    for i, frame in enumerate(real_frames):
        step = memory.step(frame.stamp_ns, frame.ego2global, frame.scene)
        memory.store(MAP)
        assert step.age == i
    assert memory.resets == {}
