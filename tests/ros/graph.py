# SPDX-License-Identifier: Apache-2.0
"""Real processes in a ROS graph of their own, ended and looked at by tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from qdbev_ros.ros.domain import free_domain
from qdbev_ros.ros.presets import config_folder


class Running:
    """One process with what it printed."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self, seconds: float = 120.0) -> int:
        """Exit code; fails with the output where the process does not end in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.output}") from None

    def stop(self, number: int = signal.SIGINT) -> int:
        """Sends a signal and waits for the exit code."""
        self.process.send_signal(number)
        return self.wait(40)

    def wait_for(self, text: str, seconds: float = 90.0) -> None:
        """Waits until the process printed `text`."""
        until(
            lambda: text in self.output,
            seconds,
            lambda: f"never printed {text!r}:\n{self.output}",
            self.process,
        )


class Graph:
    """Starts modules of this project in a ROS domain of their own; ends them all on exit."""

    def __init__(self, folder: Path) -> None:
        self.domain = free_domain()
        self._folder = folder
        self._running: list[Running] = []
        profile = str(config_folder() / "fastdds_shm.xml")
        self.environment = os.environ | {
            "ROS_DOMAIN_ID": str(self.domain),
            "FASTRTPS_DEFAULT_PROFILES_FILE": profile,
            "FASTDDS_DEFAULT_PROFILES_FILE": profile,
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> Graph:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        for running in self._running:
            if running.process.poll() is None:
                running.process.send_signal(signal.SIGINT)
        for running in self._running:
            try:
                running.process.wait(15)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()

    def start(self, module: str, *arguments: str) -> Running:
        """python -m MODULE ARGUMENTS in this graph, from Popen: a shell's background job would not get SIGINT."""
        return self.command(sys.executable, "-m", module, *arguments)

    def node(self, module: str, **parameters: Any) -> Running:
        """A node with parameters given on its command line."""
        words = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
        return self.start(f"qdbev_ros.{module}", "--ros-args", *words)

    def command(self, *command: str) -> Running:
        log = self._folder / f"log-{len(self._running)}.txt"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                list(command), env=self.environment, stdout=stream, stderr=subprocess.STDOUT,
                preexec_fn=from_a_terminal,
            )  # fmt: skip
        running = Running(process, log)
        self._running.append(running)
        return running


def from_a_terminal() -> None:
    """Before a program starts: tests that run under nohup would have it deaf to the end of the terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def child(running: Running, name: str) -> psutil.Process:
    """The process below `running` whose command names `name`."""
    below = psutil.Process(running.process.pid).children(recursive=True)
    return next(process for process in below if name in " ".join(process.cmdline()))


def until(
    condition: Callable[[], bool],
    seconds: float,
    complaint: Callable[[], str],
    process: subprocess.Popen[bytes] | None = None,
) -> None:
    """Waits for `condition`; fails with `complaint` in vain, or when `process` ended meanwhile."""
    deadline = time.monotonic() + seconds
    while not condition():
        ended = process is not None and process.poll() is not None
        assert not (ended and not condition()), f"the process ended: {complaint()}"
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.05)
