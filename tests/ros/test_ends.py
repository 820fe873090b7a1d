# SPDX-License-Identifier: Apache-2.0
"""How the whole ends: a recorder that cannot go on, a terminal that closes."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tests.ros.graph import Graph, child
from tests.ros.rig import Rig, patient

pytest.importorskip("qdbev_msgs", reason="qdbev_msgs tells which cameras were used")
DISK_BYTES = 2_500_000  # a limit on the size of files stands for a disk that is full


def test_a_full_disk_ends_the_recording_and_not_the_detection(
    graph: Graph, package: Path, tmp_path: Path
) -> None:
    out = tmp_path / "drive.mcap"
    run = graph.start(
        "qdbev_ros.bringup", f"model:={package}", f"record:={out}", "record_images:=true", patient(tmp_path)
    )
    run.wait_for("ready: nano")
    with Rig(graph, run) as rig:
        recorder = child(run, "recorder_node")
        resource.prlimit(recorder.pid, resource.RLIMIT_FSIZE, (DISK_BYTES, resource.RLIM_INFINITY))
        for _ in range(50):
            if recorder.is_running():
                rig.ask()
        run.wait_for(
            "qdbev_recorder failed with exit code 2, see its line above: the detector goes on without it"
        )
        rig.ask()
    assert run.stop() == 2, "scripts see that the recording failed"
    partial = tmp_path / "drive.partial.mcap"
    assert f"mcap recover {partial}" in run.output
    assert "Traceback" not in run.output
    assert partial.stat().st_size > 1_000_000
