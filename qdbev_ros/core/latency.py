# SPDX-License-Identifier: Apache-2.0
"""Durations of the pipeline's stages over the last frames."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np

WINDOW = 5000  # frames: seven minutes at 12 a second, and enough for the 99.9th percentile


class StageLatencies:
    """Rolling windows of milliseconds by stage; safe to read while another thread adds."""

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._values: dict[str, deque[float]] = {}

    def add(self, milliseconds: Mapping[str, float]) -> None:
        """One frame: stage -> milliseconds."""
        for stage, value in milliseconds.items():
            self._values.setdefault(stage, deque(maxlen=self._window)).append(value)

    def percentiles(self, *which: float) -> dict[str, tuple[float, ...]]:
        """stage -> the asked percentiles in milliseconds, stages in the order they were first seen."""
        snapshot = {stage: list(values) for stage, values in list(self._values.items())}
        return {
            stage: tuple(float(v) for v in np.percentile(values, which)) for stage, values in snapshot.items()
        }
