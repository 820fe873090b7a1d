# SPDX-License-Identifier: Apache-2.0
"""How the detector does, in one word: a state machine over what happens to sets. No clock, no ROS: times are given.

WAITING   nothing was answered yet                         left with the first answer
RUNNING   the last answers had all that the model wants    left when an answer lacks something
DEGRADED  an answer lacked something (a camera, the        left after `recover_sets` answers in a row that lacked
          vehicle's motion)                                nothing
STALE     no answer for `stale_after_s`, or three periods  left with the next answer
          where sets come more slowly
FAULT     `fault_after` sets in a row failed in the        left with the next answer, or when whoever declared the
          engine, or it could not be started               fault takes it back
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from enum import Enum, IntEnum
from itertools import pairwise
from statistics import median


class Level(IntEnum):
    """As in diagnostic_msgs/DiagnosticStatus."""

    OK = 0
    WARN = 1
    ERROR = 2
    STALE = 3


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    DEGRADED = "degraded"
    STALE = "stale"
    FAULT = "fault"


LEVELS = {
    State.WAITING: Level.WARN,
    State.RUNNING: Level.OK,
    State.DEGRADED: Level.WARN,
    State.STALE: Level.STALE,
    State.FAULT: Level.ERROR,
}


@dataclass(frozen=True)
class HealthPolicy:
    """When a state is entered and left; see the module's text."""

    stale_after_s: float = 1.0
    recover_sets: int = 3
    fault_after: int = 3


@dataclass(frozen=True)
class Health:
    """A state with what there is to say about it."""

    state: State
    text: str

    @property
    def level(self) -> Level:
        return LEVELS[self.state]


class HealthMonitor:
    """Told of every set by the thread that works on it, asked by another. Times are monotonic seconds."""

    def __init__(self, policy: HealthPolicy | None = None) -> None:
        self.policy = policy or HealthPolicy()
        self._lock = threading.Lock()
        self._fault: str | None = None
        self.restart()

    def restart(self) -> None:
        """Back to WAITING, as at the start. A declared fault stays."""
        with self._lock:
            self._answers: deque[float] = deque(maxlen=10)
            self._lacking: tuple[str, ...] = ()
            self._full_in_row = self.policy.recover_sets
            self._failures = 0
            self._failure = ""
            self._refusal = ""

    def answered(self, now_s: float, lacking: tuple[str, ...] = ()) -> None:
        """A set was answered; `lacking` says what it had to do without."""
        with self._lock:
            self._answers.append(now_s)
            self._failures, self._refusal = 0, ""
            if lacking:
                self._lacking, self._full_in_row = lacking, 0
            else:
                self._full_in_row += 1

    def refused(self, reason: str) -> None:
        """A set could not be answered with what was there; says why nothing comes."""
        with self._lock:
            self._refusal = reason

    def failed(self, reason: str) -> None:
        """The engine failed on a set."""
        with self._lock:
            self._failures += 1
            self._failure = reason

    def declare_fault(self, reason: str | None) -> None:
        """A fault that no set can tell of, for example a model that could not be loaded; None takes it back."""
        with self._lock:
            self._fault = reason

    def check(self, now_s: float) -> Health:
        """The state now."""
        with self._lock:
            if self._fault is not None:
                return Health(State.FAULT, self._fault)
            if self._failures >= self.policy.fault_after:
                return Health(State.FAULT, f"the last {self._failures} sets failed: {self._failure}")
            if not self._answers:
                return Health(State.WAITING, self._refusal or self._failure or "no set answered yet")
            silent = now_s - self._answers[-1]
            if silent > max(self.policy.stale_after_s, 3 * self._period_s()):
                why = f": {self._refusal}" if self._refusal else ""
                return Health(State.STALE, f"no answer for {silent:.1f} s{why}")
            if self._full_in_row < self.policy.recover_sets:
                return Health(State.DEGRADED, "; ".join(self._lacking))
            return Health(State.RUNNING, "running")

    def _period_s(self) -> float:
        """Between the last answers; the median, which a single pause leaves alone. 0 while unknown."""
        if len(self._answers) < 3:
            return 0.0
        return median(b - a for a, b in pairwise(self._answers))
