# SPDX-License-Identifier: Apache-2.0
"""The demo's drive in every convention: the doctor finds the preset by itself, and nothing wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdbev_ros.core.doctor import diagnose
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.calibration_file import load_calibration, write_calibration
from qdbev_ros.ros.observe import observe_bag
from qdbev_ros.ros.presets import load_preset, preset_names
from qdbev_train.data.tables import load_scenes
from tests.conventions import CALIBRATED_BY_FILE, Entry, as_convention, write_bag

DEMO = Path(__file__).resolve().parents[2] / "demo"
SETS = 5


@pytest.fixture(scope="module")
def slice_of_the_demo() -> list[Entry]:
    with BagReader(DEMO / "town.mcap") as bag:
        entries = list(bag.messages([topic for topic in bag.types if topic != "/annotations"]))
    until = [log for topic, log, _ in entries if topic == "/CAM_FRONT/camera_info"][SETS] - 50_000_000
    return [entry for entry in entries if entry[1] < until]


@pytest.fixture(scope="module")
def rig_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ((frame, *_),) = load_scenes(DEMO / "town", "v1.0-mini").values()
    path = tmp_path_factory.mktemp("rig") / "rig.yaml"
    write_calibration(path, {c.calibration.name: c.calibration for c in frame.cameras}, frame.lidar2ego)
    return path


@pytest.mark.parametrize("name", preset_names())
def test_a_bag_of_each_convention_is_recognised_and_good(
    name: str, slice_of_the_demo: list[Entry], rig_file: Path, tmp_path: Path
) -> None:
    bag = write_bag(as_convention(slice_of_the_demo, name), tmp_path / "bag.mcap")
    calibration = load_calibration(rig_file) if name in CALIBRATED_BY_FILE else None
    # Without its annotations a bag of watonomous looks like one of ours.
    chosen = load_preset(name) if name == "watonomous" else None
    found, drive = observe_bag(bag, chosen, calibration)
    assert found == name
    assert [len(camera.pictures) for camera in drive.cameras.values()] == [SETS] * 6
    assert diagnose(drive).findings == ()


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("nuscenes2bag", {"info-missing"}),
        ("chris7462", {"tf-missing", "tf-model-frame"}),
        ("bevfusion_demo", {"info-missing", "tf-camera-axes", "tf-model-frame"}),
    ],
)
def test_without_the_calibration_file_the_doctor_asks_for_it(
    name: str, codes: set[str], slice_of_the_demo: list[Entry], tmp_path: Path
) -> None:
    findings = diagnose(
        observe_bag(write_bag(as_convention(slice_of_the_demo, name), tmp_path / "b.mcap"), None, None)[1]
    ).findings
    assert {finding.code for finding in findings} == codes
    assert any("calibration file" in finding.advice for finding in findings)
