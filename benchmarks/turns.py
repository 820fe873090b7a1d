# SPDX-License-Identifier: Apache-2.0
"""Measuring several things side by side: each in a process of its own, all taking turns.

A process answers with one line of JSON when it is ready and one after each turn; a line on its stdin is a turn.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qdbev_ros.core.errors import DataError

# A turn is a dictionary, empty at first: a job may add the seconds of its parts, by name.
Parts = dict[str, list[float]]
Turns = Iterator[Parts]


@dataclass
class Row:
    """One measured thing: seconds of its runs, by the clock and of all its threads together, and of their parts where
    it has any; floating point operations of one run, peak memory in MiB."""

    variant: str
    engine: str
    stage: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    parts: Parts = field(default_factory=dict)
    flops: float = 0.0
    peak_mb: float = 0.0

    def to_dict(self, peak_rate: float) -> dict[str, Any]:
        """Plain data; `peak_rate` is the machine's operations a second."""
        median = statistics.median(self.seconds)
        return {
            "variant": self.variant,
            "engine": self.engine,
            "stage": self.stage,
            "ms_median": round(median * 1e3, 1),
            "ms_min": round(min(self.seconds) * 1e3, 1),
            "cpu_ms_median": round(statistics.median(self.cpu_seconds) * 1e3, 1),
            "runs": len(self.seconds),
            "gflop": round(self.flops / 1e9, 1),
            "fraction_of_peak": round(self.flops / median / peak_rate, 3),
            "peak_mb": round(self.peak_mb),
        }


class Worker:
    """A row's process: Python with `arguments`, which calls `serve`. A context manager: the process ends with it.

    `environment` holds what it needs where the user's own environment has nothing.
    """

    def __init__(self, row: Row, arguments: list[str], environment: dict[str, str]) -> None:
        self.row = row
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        # Threads that wait in a loop would take the cores from the process whose turn it is.
        environment = {**environment, **os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Worker:
        self._answer()
        return self

    def turn(self) -> None:
        """One run; the first one also counts operations."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        answer = self._answer()
        self.row.seconds.append(answer["seconds"])
        self.row.cpu_seconds.append(answer["cpu_seconds"])
        for part, seconds in answer["parts"].items():
            self.row.parts.setdefault(part, []).extend(seconds)
        self.row.flops = self.row.flops or answer["flops"]
        self.row.peak_mb = answer["peak_mb"]

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["killed, perhaps for its memory"])[-1]
            row = self.row
            raise DataError(f"{row.variant} {row.engine} {row.stage} ended: {last}")
        return dict(json.loads(line))


def serve(job: Callable[[Turns], None], uses_torch: bool, counted: bool) -> None:
    """The life of a process: `job` gets ready, then works once for each of the turns that it is given.

    counted: torch's operations are counted in the first turn.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not come between
    if uses_torch:
        import torch

        torch.set_num_threads(cores())

    def answer(**data: float | Parts) -> None:
        print(json.dumps(data), file=answers, flush=True)

    def turns() -> Turns:
        answer()
        for number, _ in enumerate(sys.stdin):
            if number == 0:
                with suppress(OSError):  # not everywhere allowed; the peak then counts from the start
                    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
            with flop_counter() if uses_torch and counted and number == 0 else nullcontext() as counter:
                parts: Parts = {}
                begin, busy = time.perf_counter(), time.process_time()
                yield parts
                seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - busy
            flops = counter.get_total_flops() if counter is not None else 0
            answer(seconds=seconds, cpu_seconds=cpu_seconds, parts=parts, flops=flops, peak_mb=peak_mb())

    job(turns())


def flop_counter() -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


def peak_mb() -> float:
    """Peak of this process's resident memory in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def cores() -> int:
    return len(os.sched_getaffinity(0))


def free_gb() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) / 1024**2 for line in lines if line.startswith("MemAvailable"))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU"
    )
