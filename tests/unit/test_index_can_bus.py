# SPDX-License-Identifier: Apache-2.0
"""can_bus entries from a real CAN bus file, and what stands in for them where a scene has none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdbev_ros.core.ego_motion import EgoState, dynamics_from_poses
from qdbev_ros.core.geometry import Array, Pose, quaternion_to_matrix, wrap_angle
from qdbev_ros.core.memory import TemporalMemory
from qdbev_ros.core.variant import load_variant
from qdbev_train.data.tables import load_scenes
from tests.small_dataset import VERSION

CAN, POSES = load_variant("tiny").temporal, load_variant("nano").temporal  # by their `dynamics`
MAP = np.zeros((1, 1), np.float32)


@pytest.fixture(scope="module")
def messages(nuscenes_root: Path) -> list[dict[str, Any]]:
    """The real messages of scene-0103, from can_bus in or beside the folder of the real scene."""
    for folder in (nuscenes_root, nuscenes_root.parent):
        path = folder / "can_bus" / "scene-0103_pose.json"
        if path.is_file():
            found: list[dict[str, Any]] = json.loads(path.read_bytes())
            return found
    pytest.skip(f"no can_bus/scene-0103_pose.json in or beside {nuscenes_root}")


@pytest.fixture(scope="module")
def drive(messages: list[dict[str, Any]], small_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set with its scene-0103 moved to the time of the real messages, a sample every 4.9 s."""
    root = tmp_path_factory.mktemp("can") / "root"
    shutil.copytree(small_root, root)
    path = root / VERSION / "sample.json"
    samples = json.loads(path.read_text())
    for number, sample in enumerate(samples[:4]):
        sample["timestamp"] = messages[0]["utime"] + 4_900_000 * number
    path.write_text(json.dumps(samples))
    (root / "can_bus").mkdir()
    (root / "can_bus" / "scene-0103_pose.json").write_text(json.dumps(messages))
    return root


def in_file(message: dict[str, Any]) -> Array:
    return np.array([*message["accel"], *message["rotation_rate"], *message["vel"]])


def test_a_sample_gets_the_first_real_message_after_it(drive: Path, messages: list[dict[str, Any]]) -> None:
    """The reference's skew of one message: position and heading of the moment, dynamics some 20 ms later."""
    frames = load_scenes(drive, VERSION)["scene-0103"]
    for number, frame in enumerate(frames):
        stamp = messages[0]["utime"] + 4_900_000 * number
        after = next(m for m in messages if m["utime"] > stamp)
        assert 0 < after["utime"] - stamp < 45_000
        np.testing.assert_array_equal(frame.can_dynamics, in_file(after))


def test_the_model_sees_the_file_as_it_is(drive: Path, messages: list[dict[str, Any]]) -> None:
    """`dynamics: can` puts acceleration, rotation rate and velocity into can_bus[7:16]; in scenes without a
    file the ego poses say them, as they say everything else."""
    scenes = load_scenes(drive, VERSION)
    memory, from_poses = TemporalMemory(CAN), TemporalMemory(POSES)
    for name, frames in scenes.items():
        for frame in frames:
            vector = memory.step(frame.stamp_ns, frame.ego2global, name, frame.can_dynamics).can_bus
            memory.store(MAP)
            expected = from_poses.step(frame.stamp_ns, frame.ego2global, name).can_bus[7:16]
            from_poses.store(MAP)
            if name != "scene-0916":
                expected = np.float32(frame.can_dynamics)
            np.testing.assert_array_equal(vector[7:16], expected)
            np.testing.assert_array_equal(vector[3:7], np.float32(frame.ego2global.rotation))
    first = in_file(messages[1])
    assert 8 < first[6] < 9  # m/s ahead, with hardly anything sideways
    assert 9.5 < first[2] < 10.2  # gravity
    assert abs(first[[7, 8]]).max() < 0.1


def test_dynamics_from_poses_are_those_of_the_real_can_bus(messages: list[dict[str, Any]]) -> None:
    """Two poses a second, as in key frames, of a drive that brakes from 9 to 2 m/s and speeds up again."""
    stamps = np.array([m["utime"] for m in messages])
    rows = np.searchsorted(stamps, np.arange(stamps[0], stamps[-1], 500_000))
    previous, found = None, []
    for row in rows:
        message = messages[row]
        pose = Pose(np.array(message["orientation"]), np.array(message["pos"]))
        stamp_ns = int(message["utime"]) * 1000
        dynamics = dynamics_from_poses(previous, stamp_ns, pose)
        previous = EgoState(stamp_ns, pose, dynamics)
        found.append(dynamics)
    ours, real = np.array(found[2:]), np.array([in_file(messages[row]) for row in rows[2:]])
    off = np.abs(ours - real)
    assert off[:, 6].mean() < 0.25  # speed in m/s; a pose difference is the mean over half a second
    assert off[:, 6].max() < 0.7
    assert off[:, 5].max() < 0.03  # yaw rate in rad/s
    assert off[:, 0].mean() < 0.4  # acceleration in m/s2
    assert np.corrcoef(ours[:, 0], real[:, 0])[0, 1] > 0.9
    assert off[:, 1].mean() < 0.2
    assert np.corrcoef(ours[:, 1], real[:, 1])[0, 1] > 0.6
    np.testing.assert_allclose(real[:, 2], 9.81, atol=0.6)


def test_without_a_can_bus_file_the_real_scenes_poses_say_how_it_moves(real_frames: Any) -> None:
    """`dynamics: poses`: speed and yaw rate of the real scene are those of its ego poses, frame after frame."""
    assert real_frames[0].can_dynamics is None
    memory = TemporalMemory(POSES)
    previous = None
    for frame in real_frames:
        vector = memory.step(frame.stamp_ns, frame.ego2global, frame.scene, frame.can_dynamics).can_bus
        memory.store(MAP)
        if previous is None:
            np.testing.assert_array_equal(vector[7:16], 0.0)
        else:
            seconds = (frame.stamp_ns - previous.stamp_ns) * 1e-9
            ahead = quaternion_to_matrix(previous.ego2global.rotation).T @ (
                frame.ego2global.translation - previous.ego2global.translation
            )
            assert vector[13] == pytest.approx(np.linalg.norm(ahead) / seconds, rel=1e-4)
            assert ahead[0] > -0.05  # it never drives backwards, so speed along x has the right sign
            turn = wrap_angle(frame.ego2global.yaw() - previous.ego2global.yaw())
            assert vector[12] == pytest.approx(turn / seconds, abs=1e-5)
        previous = frame
