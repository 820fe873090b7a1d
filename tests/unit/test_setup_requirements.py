# SPDX-License-Identifier: Apache-2.0
"""The requirement files: what is pinned, what fits together, and what must stay out of the node's environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).resolve().parents[2] / "requirements"


def requirements(file: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (FOLDER / file).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


PINS = {canonicalize_name(pin.name): pin for pin in requirements("constraints.txt")}


def test_constraints_give_one_exact_version_each() -> None:
    loose = [str(pin) for pin in PINS.values() if [s.operator for s in pin.specifier] != ["=="]]
    assert not loose


@pytest.mark.parametrize("file", ["rig.txt", "rig-build.txt"])
def test_every_ros_wheel_is_pinned(file: str) -> None:
    # An unpinned one resolves to a later ROS 2 release, and the two don't work together.
    ros = [canonicalize_name(r.name) for r in requirements(file) if r.name.startswith("ros-")]
    assert ros
    assert not [name for name in ros if name not in PINS]


@pytest.mark.parametrize(
    "file", ["node.txt", "test.txt", "rig.txt", "rig-build.txt", "openvino.txt", "tensorrt.txt"]
)
def test_pins_lie_within_what_is_asked_for(file: str) -> None:
    for wanted in requirements(file):
        pin = PINS.get(canonicalize_name(wanted.name))
        if pin is not None:
            (version,) = (s.version for s in pin.specifier)
            assert wanted.specifier.contains(version), f"{wanted} and {pin}"


def test_node_environment_holds_no_torch_and_one_headless_opencv() -> None:
    names = [r.name for r in requirements("node.txt")]
    assert not {"torch", "torchvision", "nuscenes-devkit", "lightning-fabric"} & set(names)
    assert [name for name in names if "opencv" in name] == ["opencv-python-headless"]


@pytest.mark.parametrize("file", ["node.txt", "rig-build.txt", "test.txt"])
def test_shared_packages_are_asked_for_alike(file: str) -> None:
    # setuptools appears twice: each lane must leave alone what the other one installed.
    others = {r.name: r for r in requirements("test.txt")}
    for wanted in requirements(file):
        assert wanted.specifier == others.get(wanted.name, wanted).specifier
