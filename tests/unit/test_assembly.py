# SPDX-License-Identifier: Apache-2.0
"""From pictures to a job: what is waited for, for how long, and what is left out with which words."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qdbev_ros.core.geometry import Pose
from qdbev_ros.core.pose_buffer import TransformTree, TransformUnavailable
from qdbev_ros.core.synchroniser import FrameSet, Stamped
from qdbev_ros.ros.assembly import Assembler, Frames, Job
from qdbev_ros.ros.calibration_file import RigCalibration
from qdbev_ros.ros.camera_state import CameraState, Intrinsics

MS = 1_000_000
TIMEOUT_S = 0.5


def at(x: float) -> Pose:
    return Pose(np.array([1.0, 0, 0, 0]), np.array([x, 0.0, 0.0]))


class Rig:
    """Two cameras, A 10 ms before B, on a vehicle that moves a metre a second."""

    def __init__(self) -> None:
        self.tree = TransformTree()
        for child in ("LIDAR_TOP", "A", "B"):
            self.tree.set_static("base_link", child, at(1.0))
        for ms in range(0, 1001, 50):
            self.tree.insert("map", "base_link", ms * MS, at(ms * 1e-3))
        intrinsics = Intrinsics(np.eye(3), 10, 10)
        self.cameras = {c: CameraState(c, f"/{c}/image", f"/{c}/info", intrinsics) for c in "AB"}
        self.assembler = self.assembler_of("LIDAR_TOP")

    def assembler_of(self, model_frame: str) -> Assembler:
        return Assembler(
            self.tree, self.cameras, Frames("base_link", model_frame), RigCalibration(), lambda _, m: m.frame,
            partial(self.tree.lookup, "map", "base_link"), TIMEOUT_S,
        )  # fmt: skip

    def assemble(self, stamp_ms: int = 500, waited_s: float = 0.0, **frames: str) -> Job | None:
        """The set of `stamp_ms`; `frames` names other frames of pictures."""
        images: dict[str, Stamped[Any]] = {
            c: Stamped(stamp_ms * MS - early * MS, SimpleNamespace(frame=frames.get(c, c)), 7.0)
            for c, early in (("A", 10), ("B", 0))
        }
        return self.assembler.assemble(FrameSet(stamp_ms * MS, images, ("C",)), waited_s)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_each_camera_gets_the_vehicles_pose_at_its_own_stamp(rig: Rig) -> None:
    job = rig.assemble()
    assert job is not None
    assert job.missing == {"C": "no picture in time"}
    assert job.ego_problem is None
    assert [c.ego2global.translation[0] for c in job.cameras.values()] == pytest.approx([0.49, 0.5])
    assert job.ego2global.translation[0] == pytest.approx(0.5)
    assert job.arrived == 7.0


def test_a_camera_info_that_is_late_is_waited_for_once_and_then_no_more(rig: Rig) -> None:
    rig.cameras["A"].intrinsics = None
    assert rig.assemble() is None
    job = rig.assemble(waited_s=TIMEOUT_S)
    assert job is not None
    assert job.missing["A"] == "/A/info: no CameraInfo"
    assert rig.assemble(550) is not None, "the next set does not wait for it"
    rig.cameras["A"].intrinsics = rig.cameras["B"].intrinsics
    job = rig.assemble(600)
    assert job is not None
    assert list(job.cameras) == ["A", "B"]


def test_a_camera_info_that_is_wrong_is_not_waited_for(rig: Rig) -> None:
    rig.cameras["A"].intrinsics, rig.cameras["A"].info_error = None, "K holds NaN"
    job = rig.assemble()
    assert job is not None
    assert job.missing["A"] == "/A/info: K holds NaN"


def test_a_camera_whose_frame_nobody_names_is_left_out_after_the_timeout(rig: Rig) -> None:
    assert rig.assemble(A="nowhere") is None
    job = rig.assemble(waited_s=TIMEOUT_S, A="nowhere")
    assert job is not None
    assert "no transform names 'nowhere'" in job.missing["A"]


def test_ego_motion_that_is_a_little_late_is_waited_for_with_every_set(rig: Rig) -> None:
    for stamp in (1100, 1200):
        assert rig.assemble(stamp) is None
        rig.tree.insert("map", "base_link", stamp * MS, at(stamp * 1e-3))
        job = rig.assemble(stamp)
        assert job is not None
        assert job.ego_problem is None


def test_ego_motion_that_ended_is_waited_for_once_and_told(rig: Rig) -> None:
    assert rig.assemble(8900) is None
    assert rig.assemble(8900, waited_s=TIMEOUT_S) is not None
    job = rig.assemble(9000)
    assert job is not None, "the next set does not wait for it"
    assert "the newest transform map -> base_link is" in str(job.ego_problem)
    np.testing.assert_array_equal(job.ego2global.matrix(), np.eye(4))
    rig.tree.insert("map", "base_link", 9050 * MS, at(9.05))
    assert rig.assemble(9100) is None, "it is back and only a little late"
    rig.tree.insert("map", "base_link", 9100 * MS, at(9.1))
    again = rig.assemble(9100)
    assert again is not None
    assert again.ego_problem is None
    assert all((c.ego2global.matrix() == np.eye(4)).all() for c in job.cameras.values())


def test_without_the_model_frame_there_is_no_answer(rig: Rig) -> None:
    rig.assembler = rig.assembler_of("ROOF")
    assert rig.assemble() is None
    with pytest.raises(TransformUnavailable, match="'ROOF'"):
        rig.assemble(waited_s=TIMEOUT_S)
