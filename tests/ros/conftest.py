# SPDX-License-Identifier: Apache-2.0
"""What every test with real processes needs: a graph, the demo's package, short bags."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdbev_ros.ros.calibration_file import write_calibration
from tests.ros.drive import drive, write_drive
from tests.ros.graph import Graph

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def package() -> Path:
    """The demo's package, or $QDBEV_PACKAGE."""
    path = Path(os.environ.get("QDBEV_PACKAGE", ROOT / "demo" / "nano.qdbev"))
    if not path.exists():
        pytest.skip(f"no package {path}; QDBEV_PACKAGE names another")
    return path


@pytest.fixture(scope="session")
def short_bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sets in 1.5 seconds."""
    return write_drive(tmp_path_factory.mktemp("short") / "short.mcap", sets=4)


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The calibration file of the rig of these bags."""
    folder = tmp_path_factory.mktemp("calibration")
    (frame,) = drive(folder, 1)
    cameras = {camera.calibration.name: camera.calibration for camera in frame.cameras}
    write_calibration(folder / "rig.yaml", cameras, frame.lidar2ego)
    return folder / "rig.yaml"


@pytest.fixture
def graph(tmp_path: Path) -> Iterator[Graph]:
    with Graph(tmp_path) as graph:
        yield graph
