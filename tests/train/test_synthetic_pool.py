# SPDX-License-Identifier: Apache-2.0
"""The processes of `qdbev synth` stop with the command: after a failure and after Ctrl-C nothing more is begun.

Of 40 scenes of a second each, fewer than 20 are to be begun: at least nine seconds for what should take none.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qdbev_ros.core.errors import DataError
from qdbev_train.synthetic import command, writer
from tests import slow_scenes


def begun(folder: Path) -> int:
    return len(list(folder.iterdir()))


def test_after_a_failure_no_further_scene_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "make_scene", slow_scenes.make)
    with pytest.raises(DataError, match="failing: no space"):
        command.make_all(slow_scenes.jobs(tmp_path, slow_scenes.FAILING, "second"), 2)
    assert begun(tmp_path) < 20


def test_ctrl_c_stops_it(tmp_path: Path) -> None:
    call = [sys.executable, "-m", "tests.slow_scenes", str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(call, cwd=root, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 100
            while not begun(tmp_path) and time.monotonic() < deadline:
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
            assert process.wait(100) != 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert 0 < begun(tmp_path) < 20


def test_every_scene_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "make_scene", slow_scenes.make)
    command.make_all(slow_scenes.jobs(tmp_path)[:3], 2)
    assert begun(tmp_path) == 3
