# SPDX-License-Identifier: Apache-2.0
"""A rig that drives steadily, like cameras do, and measures how soon a fault is told and mended."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from std_srvs.srv import Trigger

from qdbev_ros.ros.diagnostics import CAMERA, PIPELINE
from tests.ros.fault_table import record
from tests.ros.rig import PATIENCE_S, Rig

PERIOD_S = 0.1
PACE_S = 0.5  # for a set that gets no answer
# The promise is one second; a machine that others use, too, may take longer, and the table has the measured time.
TOLD_S = 5.0
Said = Callable[[], str]


class FaultRig(Rig):
    """Ten sets a second, or as many as are answered. No answer may hold a number that is none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._said: Said | None = None
        self._told: tuple[str, float] | None = None
        self.whole_in_row = 0
        self._heard: deque[float] = deque(maxlen=30)
        super().__init__(*args, **kwargs)

    def step(self, period_s: float = PERIOD_S, **how: Any) -> int:
        """Sends a set, and waits for its answer or PACE_S; its stamp."""
        started = time.monotonic()
        stamp = self.send(period_s=period_s, **how)
        self.pace(started, stamp)
        return stamp

    def pace(self, started: float, stamp: int) -> None:
        """Waits until PERIOD_S after `started`, and for the answer to `stamp`, but not longer than PACE_S."""
        while (now := time.monotonic()) < started + PERIOD_S or (
            stamp not in self.answers and now < started + PACE_S
        ):
            self.spin()

    def spin(self) -> None:
        assert self._process.process.poll() is None, f"the node ended\n{self._process.output}"
        self._executor.spin_once(timeout_sec=0.02)

    def steady(self) -> None:
        """A new scene, in which the node is running."""
        self.now_ns += 100_000_000_000
        self.mended()

    def mended(self, **how: Any) -> float:
        """Sends sets without a fault until all is well again; seconds that it took."""
        started, self.whole_in_row = time.monotonic(), 0
        while self.whole_in_row < 3 or self.values()["state"] != "running":
            waited = time.monotonic() - started
            assert waited < PATIENCE_S, f"never well again: {self.statuses}\n{self._process.output}"
            self.step(**how)
        return time.monotonic() - started

    def told(self, said: Said, do: Callable[[], object]) -> tuple[str, float]:
        """Does `do`, which has the fault, until diagnostics say so; (what they say, seconds since the first time)."""
        self._said, self._told = said, None
        started = time.monotonic()
        while self._told is None:
            late = time.monotonic() - started > PATIENCE_S
            assert not late, f"diagnostics never said so: {self.statuses}\n{self._process.output}"
            do()
        text, at = self._told
        self._said = None
        assert at - started < TOLD_S
        return text, at - started

    def suffer(self, fault: str, said: Said, do: Callable[[], object], **mend: Any) -> None:
        """One row of the table: the fault is told, nothing is wrong in any answer, and all is well afterwards."""
        text, seconds = self.told(said, do)
        back = self.mended(**mend)
        record(fault, text, seconds, f"running {back:.1f} s after its end")

    def says(self, state: str, text: str) -> Said:
        """The whole is in `state`, and the message has `text`."""
        return lambda: (
            self.statuses[PIPELINE].message
            if self.values()["state"] == state and text in self.statuses[PIPELINE].message
            else ""
        )

    def camera_says(self, camera: str, level: bytes, text: str) -> Said:
        """One camera's status is of `level`, and the message has `text`."""

        def said() -> str:
            status = self.statuses[CAMERA + camera]
            return status.message if status.level == level and text in status.message else ""

        return said

    def counts(self, *keys: str) -> Said:
        """Each of these counters is higher than now."""
        before = {key: int(self.values().get(key, 0)) for key in keys}

        def said() -> str:
            values = self.values()
            higher = all(int(values.get(key, 0)) > count for key, count in before.items())
            return f"{', '.join(keys)} counted" if higher else ""

        return said

    def heard_hz(self) -> float:
        """Answers a second, over the last 30."""
        if len(self._heard) < 2:
            return 0.0
        return (len(self._heard) - 1) / (self._heard[-1] - self._heard[0])

    def fresh(self) -> np.ndarray:
        """The boxes of a set without a past."""
        assert self.call(Trigger, "reset_memory", Trigger.Request()).success
        return boxes_of(self.ask(period_s=PERIOD_S))

    def _on_answer(self, message: Any) -> None:
        super()._on_answer(message)
        self._heard.append(time.monotonic())
        assert np.isfinite(boxes_of(message)).all()
        assert math.isfinite(message.set_spread)
        assert math.isfinite(message.memory_gap)
        self.whole_in_row = 0 if message.cameras_missing or not message.ego_motion else self.whole_in_row + 1

    def _on_diagnostics(self, message: Any) -> None:
        super()._on_diagnostics(message)
        if self._said is not None and self._told is None and (text := self._said()):
            self._told = text, time.monotonic()


def boxes_of(answer: Any) -> np.ndarray:
    """(n, 14): every number of every box."""
    rows = []
    for item in answer.objects:
        p, q, s, v = item.pose.position, item.pose.orientation, item.size, item.velocity
        rows.append((p.x, p.y, p.z, q.x, q.y, q.z, q.w, s.x, s.y, s.z, v.x, v.y, v.z, item.score))
    return np.array(rows, np.float64).reshape(-1, 14)


def both(*said: Said) -> Said:
    """All of these are said."""

    def all_said() -> str:
        texts = [one() for one in said]
        return "; ".join(texts) if all(texts) else ""

    return all_said


def first(once: Callable[[], object], then: Callable[[], object]) -> Callable[[], object]:
    """Does `once` at the first call and `then` at all others."""
    done = False

    def do() -> object:
        nonlocal done
        special, done = not done, True
        return once() if special else then()

    return do
