# SPDX-License-Identifier: Apache-2.0
"""Scenes for the processes of `qdbev synth` that take a second, or fail, and draw nothing.

`python -m tests.slow_scenes FOLDER` makes forty with two processes.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from qdbev_ros.core.errors import DataError
from qdbev_train.synthetic import command, writer

FAILING = "failing"


def jobs(folder: Path, *names: str) -> list[writer.Job]:
    """A job for each name, then forty slow ones."""
    scenes = [*names, *(f"slow-{number}" for number in range(40))]
    return [writer.Job(str(folder), "v1.0-mini", scene, writer.Settings(0, 2, 32, 32)) for scene in scenes]


def make(job: writer.Job) -> None:
    """Leaves a file when it begins. The second job waits until the failing one, which is the first, has begun."""
    folder = Path(job.out)
    (folder / job.scene).touch()
    if job.scene == FAILING:
        raise DataError(f"{job.scene}: no space")
    while job.scene == "second" and not (folder / FAILING).exists():
        time.sleep(0.05)
    time.sleep(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background has it ignored
    writer.make_scene = make  # type: ignore[assignment]
    command.make_all(jobs(Path(sys.argv[1])), 2)
