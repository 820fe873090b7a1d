# SPDX-License-Identifier: Apache-2.0
"""The demo's drive through the running node scores what `qdbev eval` gives for the same package and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qdbev_train.cli import main
from tests.ros.graph import Graph

DEMO = Path(__file__).resolve().parents[2] / "demo"
DATA = (str(DEMO / "town"), "--version", "v1.0-mini", "--split", "mini_val")


def numbers(command: str, subject: Path, out: Path) -> dict[str, Any]:
    assert main([command, str(subject), *DATA, "--json", str(out)]) == 0
    return json.loads(out.read_text())


def test_recorded_and_offline_scores_agree_to_a_thousandth(package: Path, tmp_path: Path) -> None:
    pytest.importorskip("nuscenes", reason="nuscenes-devkit gives the score")
    recording = tmp_path / "answers.mcap"
    # A slow machine answers late, but it answers every set.
    arguments = (f"model:={package}", f"bag:={DEMO / 'town.mcap'}", f"record:={recording}", "queue_size:=4")
    with Graph(tmp_path) as graph:
        run = graph.start("qdbev_ros.bringup", *arguments)
        assert run.wait(240) == 0, run.output
    online = numbers("score", recording, tmp_path / "online.json")
    offline = numbers("eval", package, tmp_path / "offline.json")
    assert online["unanswered"] == []
    assert online["nds"] == pytest.approx(offline["nds"], abs=0.001)
    assert online["mAP"] == pytest.approx(offline["mAP"], abs=0.001)
    # Zero equals zero as well: the drive must be one on which the package finds something.
    assert offline["mAP"] > 0.02
