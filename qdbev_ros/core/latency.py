# SPDX-License-Identifier: Apache-2.0
"""Durations of the pipeline's stages over the last frames, and how often something happens."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

EVENTS = 30
WINDOW = 5000  # frames: seven minutes at 12 a second, and enough for the 99.9th percentile


class Rate:
    """How often something happens, over the last EVENTS times. Times are seconds of a monotonic clock."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=EVENTS)

    def note(self, now_s: float) -> None:
        """It happened."""
        self._times.append(now_s)

    @property
    def last_s(self) -> float | None:
        """When it happened last."""
        return self._times[-1] if self._times else None

    def hz(self, now_s: float | None = None) -> float:
        """Times a second; 0 while unknown. With `now_s` what has stopped gets slower."""
        times = list(self._times)
        if len(times) < 2 or times[-1] <= times[0]:
            return 0.0
        hz = (len(times) - 1) / (times[-1] - times[0])
        if now_s is None or now_s - times[-1] <= 2 / hz:
            return hz
        return (len(times) - 1) / (now_s - times[0])


class StageLatencies:
    """Rolling windows of milliseconds by stage; safe to read while another thread adds.

    A stage's window has all its memory from the start: what grows for minutes looks like a leak.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._values: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, int] = {}

    def add(self, milliseconds: Mapping[str, float]) -> None:
        """One frame: stage -> milliseconds."""
        for stage, value in milliseconds.items():
            if stage not in self._values:
                self._counts[stage] = 0
                self._values[stage] = np.full(self._window, np.nan)
            self._values[stage][self._counts[stage] % self._window] = value
            self._counts[stage] += 1

    def percentiles(self, *which: float) -> dict[str, tuple[float, ...]]:
        """stage -> the asked percentiles in milliseconds, stages in the order they were first seen."""
        kept = {stage: values[: self._counts[stage]] for stage, values in list(self._values.items())}
        return {
            stage: tuple(float(v) for v in np.percentile(values, which))
            for stage, values in kept.items()
            if len(values)
        }
