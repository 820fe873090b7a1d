# SPDX-License-Identifier: Apache-2.0
"""What the views select of the node's messages is there, and the script of their pictures says what it lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qdbev_ros.core.health import Health, State
from qdbev_ros.ros.diagnostics import pipeline_status
from qdbev_ros.ros.encode import MARKERS
from qdbev_ros.ros.presets import config_folder

ROOT = Path(__file__).parents[2]


def test_foxglove_finds_the_pipeline_and_the_markers_by_the_names_they_have() -> None:
    panels = json.loads((config_folder() / "foxglove_layout.json").read_text())["configById"]
    status = pipeline_status(Health(State.RUNNING, "running"), {"engine": "ONNX Runtime on some machine"})
    chosen = panels["DiagnosticStatusPanel!pipeline"]
    assert (chosen["selectedHardwareId"], chosen["selectedName"]) == (status.hardware_id, status.name)
    markers = [panel.get("topics", {}).get("/qdbev_detector/markers", {}) for panel in panels.values()]
    assert {name for settings in markers for name in settings.get("namespaces", {})} < set(MARKERS)


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["foxglove"], "--app"),
        (["foxglove", "--app", "http://localhost:1"], "there is no chromedriver (Debian: "),
        (["rviz"], "there is no rviz2"),
        (["rerun"], "(Debian: "),
        (["overlay", "--bag", "none.mcap"], "none.mcap"),
    ],
)
def test_a_picture_that_cannot_be_made_here_is_refused_in_one_line(
    words: list[str], missing: str, tmp_path: Path
) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "view_pictures.py"), *words, "--out", str(tmp_path)]
    done = subprocess.run(
        script, cwd=ROOT, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert missing in done.stderr
    assert list(tmp_path.iterdir()) == []
