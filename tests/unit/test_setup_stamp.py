# SPDX-License-Identifier: Apache-2.0
"""scripts/stamp.sh decides whether the set-up has anything to do; scripts/setup.sh says what it cannot do without."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the set-up reads."""
    for folder in ("requirements", "msg", "scripts", "launch", "config"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    return tmp_path


def stamp(checkout: Path, lane: str = "node", ros: str = "rig") -> str:
    command = [checkout / "scripts" / "stamp.sh", lane, ros]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def append(path: Path) -> None:
    path.write_text(path.read_text() + "\n# changed\n")


def test_stamp_stays_while_nothing_changes(checkout: Path) -> None:
    assert stamp(checkout) == stamp(checkout) != ""


@pytest.mark.parametrize(
    "changed",
    [
        "requirements/node.txt",
        "requirements/constraints.txt",
        "msg/DetectedObject.msg",
        "scripts/setup.sh",
        "scripts/rig/compat_msgs/vision_msgs/msg/Detection3D.msg",
        "setup.cfg",
    ],
)
def test_stamp_follows_what_the_environment_is_made_from(checkout: Path, changed: str) -> None:
    before = {lane: stamp(checkout, lane) for lane in ("node", "test")}
    append(checkout / changed)
    assert stamp(checkout, "node") != before["node"]
    assert stamp(checkout, "test") != before["test"]


def test_stamp_follows_the_names_of_linked_files_but_not_their_text(checkout: Path) -> None:
    before = stamp(checkout)
    append(checkout / "config" / "presets" / "raw.yaml")
    assert stamp(checkout) == before
    (checkout / "config" / "new.yaml").write_text("")
    assert stamp(checkout) != before


def test_test_requirements_leave_the_node_stamp_alone(checkout: Path) -> None:
    node, test = stamp(checkout, "node"), stamp(checkout, "test")
    append(checkout / "requirements" / "test.txt")
    assert stamp(checkout, "node") == node
    assert stamp(checkout, "test") != test


def test_stamp_tells_lanes_and_ros_distributions_apart(checkout: Path) -> None:
    assert (
        len({stamp(checkout, lane, ros) for lane in ("node", "test") for ros in ("rig", "jazzy", "humble")})
        == 6
    )


def run_setup(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {
        k: v for k, v in os.environ.items() if k not in ("ROS_DISTRO", "AMENT_PREFIX_PATH", "PYTHON", "CI")
    }
    return subprocess.run(
        [checkout / "scripts" / "setup.sh", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=kept | environment,
    )


def test_unknown_lane_is_refused(checkout: Path) -> None:
    done = run_setup(checkout, "nodes")
    assert done.returncode == 2
    assert "usage: scripts/setup.sh [node|test]" in done.stderr


def test_unusable_python_is_named_and_nothing_is_made(checkout: Path) -> None:
    done = run_setup(checkout, "node", PYTHON="/bin/false")
    assert done.returncode == 2
    assert "missing: Python 3.10, 3.11 or 3.12 is needed, and PYTHON=/bin/false is not it" in done.stderr
    assert not (checkout / ".venv").exists()


def test_sourced_ros_wins_over_the_wheels(checkout: Path) -> None:
    # This "ROS" has no rclpy: the set-up must ask for that ROS's Python, not quietly install another ROS.
    done = run_setup(
        checkout,
        "node",
        ROS_DISTRO="jazzy",
        AMENT_PREFIX_PATH="/opt/ros/jazzy",
        PYTHON="/bin/false",
        PYTHONPATH="",
    )
    assert done.returncode == 2
    assert "the Python of ROS 2 jazzy (the one that can import rclpy) is needed" in done.stderr


def test_own_environment_does_not_count_as_a_sourced_ros(checkout: Path) -> None:
    # After `source scripts/env.sh` the same variables are set, by ourselves.
    done = run_setup(
        checkout, "node", ROS_DISTRO="jazzy", AMENT_PREFIX_PATH=str(checkout / ".venv"), PYTHON="/bin/false"
    )
    assert "Python 3.10, 3.11 or 3.12 is needed" in done.stderr
