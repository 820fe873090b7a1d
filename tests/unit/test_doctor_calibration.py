# SPDX-License-Identifier: Apache-2.0
"""The doctor and a calibration file: what it holds wins in the node, so it is looked at as topics and tf are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from qdbev_ros.ros.calibration_file import RigCalibration, write_calibration
from qdbev_ros.ros.camera_state import Intrinsics
from qdbev_ros.ros.observe import Observer
from qdbev_ros.ros.presets import load_preset
from qdbev_train.cli import main
from qdbev_train.data.tables import load_scenes

DEMO = Path(__file__).resolve().parents[2] / "demo"
BODY = {"qw": 1.0, "qx": 0.0, "qy": 0.0, "qz": 0.0}  # x forward, y left, z up


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The demo's own calibration file."""
    (frames,) = load_scenes(DEMO / "town", "v1.0-mini").values()
    path = tmp_path_factory.mktemp("rig") / "rig.yaml"
    write_calibration(
        path, {c.calibration.name: c.calibration for c in frames[0].cameras}, frames[0].lidar2ego
    )
    return yaml.safe_load(path.read_text())


def diagnosed(content: Any, folder: Path) -> list[dict[str, str]]:
    """The findings of `qdbev doctor demo/town.mcap --calibration rig.yaml`."""
    (folder / "rig.yaml").write_text(yaml.safe_dump(content))
    arguments = [str(DEMO / "town.mcap"), "--calibration", str(folder / "rig.yaml")]
    status = main(["doctor", *arguments, "--json", str(folder / "found.json")])
    findings: list[dict[str, str]] = json.loads((folder / "found.json").read_text())["findings"]
    assert status == bool(findings)
    return findings


def test_the_file_of_the_rig_is_good(good: Any, tmp_path: Path) -> None:
    assert diagnosed(good, tmp_path) == []


def front(part: str, **numbers: float) -> Callable[[Any], None]:
    return lambda content: content["cameras"]["CAM_FRONT"][part].update(numbers)


def doubled(content: Any) -> None:
    for key in ("width", "height"):
        content["cameras"]["CAM_FRONT"]["intrinsics"][key] *= 2


FAULTS: dict[str, tuple[Callable[[Any], None], str, str]] = {
    "another resolution": (doubled, "info-size", "CAM_FRONT"),
    "K of half the resolution": (front("intrinsics", cx=100.0, cy=56.0), "info-resolution", "CAM_FRONT"),
    "body axes": (front("extrinsics", **BODY), "tf-camera-axes", "CAM_FRONT"),
    "millimetres": (front("extrinsics", x=1700.0), "tf-camera-position", "CAM_FRONT"),
    "another direction": (
        front("extrinsics", qw=0.5, qx=-0.5, qy=-0.5, qz=0.5), "tf-camera-direction", "CAM_FRONT",
    ),
    "a model frame with x forward": (
        lambda content: content["model_frame"].update(BODY), "tf-model-axes", "LIDAR_TOP",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_file_is_named_with_the_file_and_no_other(
    good: Any, tmp_path: Path, name: str
) -> None:
    fault, code, where = FAULTS[name]
    content = yaml.safe_load(yaml.safe_dump(good))
    fault(content)
    (finding,) = diagnosed(content, tmp_path)
    assert (finding["code"], finding["where"]) == (code, where)
    assert str(tmp_path / "rig.yaml") in finding["text"]


def test_camera_info_that_the_file_stands_in_for_is_not_looked_at() -> None:
    """As in the node, which does not listen to it."""
    given = RigCalibration({"CAM_BACK": Intrinsics(np.eye(3), 400, 225)})
    topics = Observer(load_preset("nuscenes"), {}, given).topics
    assert "/CAM_BACK/camera_info" not in topics
    assert "/CAM_FRONT/camera_info" in topics
