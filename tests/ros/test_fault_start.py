# SPDX-License-Identifier: Apache-2.0
"""Faults that take a node of their own: what is missing at the start, a node that is killed, raw pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from qdbev_ros.ros.diagnostics import PIPELINE
from tests.ros.fault_rig import FaultRig
from tests.ros.fault_table import record
from tests.ros.graph import Graph

ERROR = bytes([2])
NODE = {"image_reliability": "reliable", "max_detections": 20, "queue_size": 10}
START_S = 20.0  # the promise is 5 s on a machine that does nothing else; the table has the measured time


@pytest.fixture(autouse=True)
def _messages() -> None:
    pytest.importorskip("qdbev_msgs", reason="qdbev_msgs tells which cameras were used")


def test_a_node_without_transforms_waits_for_them_and_a_killed_one_is_replaced(
    graph: Graph, package: Path
) -> None:
    node = graph.node("detector_node", model=package, **NODE)
    node.wait_for("ready")
    with FaultRig(graph, node, mounted=False) as rig:
        told = rig.says("waiting", "no transform names the frame 'base_link'")
        text, seconds = rig.told(told, lambda: rig.step(tf=False))
        rig.mount({})
        back = rig.mended()
        record("no transform at all at the start", text, seconds, f"running {back:.1f} s after they came")

        node.process.kill()
        node.wait()
        rig.answers, started = {}, time.monotonic()
        rig.statuses.clear()
        again = graph.node("detector_node", model=package, **NODE)
        rig.watch(again)
        while not rig.answers:
            rig.step()
        first = time.monotonic() - started
        assert first < START_S
        rig.until(lambda: PIPELINE in rig.statuses, "no diagnostics")
        rig.mended()
        assert next(iter(rig.answers.values())).memory_age == 0
        then = "the time is that from the start of the new process to its first answer"
        record("node killed and restarted", "waiting, then running", first, then)
    assert again.stop() == 0
    assert "Traceback" not in again.output


def test_raw_pictures_of_a_wrong_encoding_cost_their_camera(graph: Graph, package: Path) -> None:
    def grey(camera: str, info: Any, image: Any) -> int:
        if camera == "CAM_BACK":
            image.encoding = "mono8"
        return 1

    node = graph.node("detector_node", model=package, preset="raw", **NODE)
    node.wait_for("ready")
    with FaultRig(graph, node, raw=True) as rig:
        rig.steady()
        told = rig.camera_says("CAM_BACK", ERROR, "has no colours")
        rig.suffer("wrong encoding", told, lambda: rig.step(edit=grey))
    assert node.stop() == 0
