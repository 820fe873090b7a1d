# SPDX-License-Identifier: Apache-2.0
"""`qdbev doctor --live` over real DDS: a bag with a planted fault is played, the fault is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.ros.drive import edit_bag
from tests.ros.graph import Graph

DEMO = Path(__file__).resolve().parents[2] / "demo" / "town.mcap"
TIMING = {
    "tf-late",
    "tf-coverage",
    "pictures-lost",
    "rate-differs",
    "spread",
    "stamp-receipt",
}  # may be the machine's


def test_a_fault_of_a_running_graph_is_named(graph: Graph, tmp_path: Path) -> None:
    def damage(topic: str, message: Any) -> Any:
        if topic == "/CAM_BACK/camera_info":
            message.k = np.zeros(9)
        return message

    bag = edit_bag(DEMO, tmp_path / "faulty.mcap", damage)
    graph.node("bag_player_node", bag=bag, loop="true")
    doctor = graph.start(
        "qdbev_train.cli", "doctor", "--live", "--seconds", "8", "--json", str(tmp_path / "doctor.json")
    )
    assert doctor.wait() == 1, doctor.output
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert (found["source"], found["preset"]) == ("live topics", "nuscenes")
    assert all(count >= 4 for count in found["pictures"].values()), found["pictures"]
    codes = {(finding["code"], finding["where"]) for finding in found["findings"]}
    assert ("info-zero", "CAM_BACK") in codes
    assert {code for code, _ in codes} - TIMING == {"info-zero"}, doctor.output


def test_a_graph_without_pictures_is_bad_input(graph: Graph) -> None:
    doctor = graph.start("qdbev_train.cli", "doctor", "--live", "--seconds", "1")
    assert doctor.wait() == 2
    assert "nobody published a picture topic within 10 s: start the cameras" in doctor.output
