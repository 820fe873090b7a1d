# SPDX-License-Identifier: Apache-2.0
"""One log line per cause and interval: a broken camera must not bury everything else."""

from __future__ import annotations

import time
from typing import Protocol


class Log(Protocol):
    """A node's logger."""

    def warning(self, text: str, /) -> object: ...
    def error(self, text: str, /) -> object: ...


class Throttled:
    """Logs a text at most once per `interval_s` for each key; says how many it kept back."""

    def __init__(self, log: Log, error: bool = False, interval_s: float = 5.0) -> None:
        """A warning, or with `error` an error."""
        self._log = log
        self._error = error
        self._interval = interval_s
        self._next: dict[str, float] = {}
        self._kept: dict[str, int] = {}

    def __call__(self, key: str, text: str) -> None:
        now = time.monotonic()
        if now < self._next.get(key, now):
            self._kept[key] = self._kept.get(key, 0) + 1
            return
        kept = self._kept.pop(key, 0)
        self._next[key] = now + self._interval
        text = f"{text} ({kept} more of this kind before)" if kept else text
        if self._error:
            self._log.error(text)
        else:  # of a line of its own: rclpy raises where one line logs with two severities
            self._log.warning(text)
