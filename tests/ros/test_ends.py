# SPDX-License-Identifier: Apache-2.0
"""How the whole ends: a recorder that cannot go on, a terminal that closes."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.recording import read_detections
from tests.ros.graph import Graph, child, from_a_terminal
from tests.ros.rig import Rig, patient

DISK_BYTES = 2_500_000  # a limit on the size of files stands for a disk that is full


def test_a_full_disk_ends_the_recording_and_not_the_detection(
    graph: Graph, package: Path, tmp_path: Path
) -> None:
    pytest.importorskip("qdbev_msgs", reason="qdbev_msgs tells which cameras were used")
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


def in_a_terminal(graph: Graph, *arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """bringup as the leader of a terminal's session, and the terminal's other end."""
    ours, theirs = os.openpty()

    def take_the_terminal() -> None:
        from_a_terminal()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-m", "qdbev_ros.bringup", *arguments],
        env=graph.environment, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=take_the_terminal,
    )  # fmt: skip
    os.close(theirs)
    return process, ours


def test_a_terminal_that_closes_ends_everything_and_the_recording_has_its_name(
    graph: Graph, package: Path, short_bag: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run.mcap"
    process, terminal = in_a_terminal(
        graph, f"model:={package}", f"bag:={short_bag}", f"record:={out}", "loop:=true", "queue_size:=4"
    )
    started: list[psutil.Process] = []
    try:
        printed = b""
        while b"pass 2" not in printed:
            printed += os.read(terminal, 4096)  # fails at the end of the process
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) == 3
        os.close(terminal)
        assert process.wait(60) == 0
        assert not [child for child in started if child.is_running()]
    finally:
        for left in [*started, process]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                left.kill()
    with BagReader(out) as recording:
        assert len(read_detections(recording, "qdbev_detector")) == 4
