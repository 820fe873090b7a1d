# SPDX-License-Identifier: Apache-2.0
"""The inference thread's queue, and log lines that do not bury each other."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from qdbev_ros.ros.throttle import Throttled
from qdbev_ros.ros.worker import Worker


def wait_until_idle(worker: Worker[int]) -> None:
    deadline = time.monotonic() + 10
    while not worker.idle():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def never(error: Exception) -> None:
    raise AssertionError(f"a job failed: {error}")


def test_when_it_falls_behind_the_newest_job_wins() -> None:
    gate, started, done = threading.Event(), threading.Event(), []

    def work(job: int) -> None:
        started.set()
        gate.wait(10)
        done.append(job)

    worker = Worker(work, queue_size=1, failed=never)
    worker.submit(0)
    assert started.wait(10)
    for job in (1, 2, 3):
        worker.submit(job)
    assert not worker.idle()
    gate.set()
    wait_until_idle(worker)
    worker.close()
    assert done == [0, 3]
    assert worker.dropped == 2


def test_a_longer_queue_keeps_every_job_in_order() -> None:
    done: list[int] = []
    worker = Worker(done.append, queue_size=100, failed=never)
    for job in range(50):
        worker.submit(job)
    wait_until_idle(worker)
    worker.close()
    assert done == list(range(50))
    assert worker.dropped == 0


def test_closing_waits_for_the_running_job_and_forgets_the_rest() -> None:
    started, done = threading.Event(), []

    def work(job: int) -> None:
        started.set()
        time.sleep(0.05)
        done.append(job)

    worker = Worker(work, queue_size=5, failed=never)
    for job in range(3):
        worker.submit(job)
    assert started.wait(10)
    worker.close()
    assert done == [0]


def test_a_queue_made_shorter_lets_go_of_the_oldest_at_once() -> None:
    gate, started, done = threading.Event(), threading.Event(), []

    def work(job: int) -> None:
        started.set()
        gate.wait(10)
        done.append(job)

    worker = Worker(work, queue_size=100, failed=never)
    worker.submit(0)
    assert started.wait(10)
    for job in range(1, 51):
        worker.submit(job)
    worker.resize(2)
    assert worker.dropped == 48
    worker.submit(51)
    assert worker.dropped == 49
    gate.set()
    wait_until_idle(worker)
    worker.close()
    assert done == [0, 50, 51]


def test_a_job_that_fails_is_told_and_the_next_ones_are_worked_on() -> None:
    """Even where telling fails, as logging may: a thread that ends here would leave a node that is silent."""
    done: list[int] = []
    told: list[str] = []

    def work(job: int) -> None:
        if job < 3:
            raise ZeroDivisionError(f"job {job}")
        done.append(job)

    def failed(error: Exception) -> None:
        told.append(str(error))
        raise RuntimeError("the log is full")

    worker = Worker(work, queue_size=100, failed=failed)
    for job in range(5):
        worker.submit(job)
    wait_until_idle(worker)
    worker.close()
    assert told == ["job 0", "job 1", "job 2"]
    assert done == [3, 4]


def test_one_line_per_cause_and_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    lines: list[str] = []
    log = Throttled(SimpleNamespace(warning=lines.append, error=None), interval_s=5.0)
    for _ in range(3):
        log("tf", "no transform")
    log("picture", "no JPEG")
    now += 6
    log("tf", "no transform")
    assert lines == ["no transform", "no JPEG", "no transform (2 more of this kind before)"]
