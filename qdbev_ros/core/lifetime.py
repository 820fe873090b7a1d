# SPDX-License-Identifier: Apache-2.0
"""How long what is shown must stay: until the next answer and no longer than needed, or it flickers or lingers."""

from __future__ import annotations

from collections import deque

LEAST_S, MOST_S = 1.0, 20.0
FIRST_S = 2.0  # while nothing is known about the rate
SPARE = 3.0  # periods


class MarkerLifetime:
    """Three times the longest of the last ten gaps between answers, from LEAST_S to MOST_S.

    A viewer counts a lifetime by its own clock, which is the wall's or that of a bag, played at any speed: a gap is
    the longer of the two.
    """

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=10)
        self._last: tuple[float, float] | None = None

    def after(self, now_s: float, stamp_s: float) -> float:
        """Seconds that the answer of stamp `stamp_s`, published at `now_s` of a monotonic clock, must be shown."""
        if self._last is not None:
            self._gaps.append(max(now_s - self._last[0], stamp_s - self._last[1]))
        self._last = (now_s, stamp_s)
        if not self._gaps:
            return FIRST_S
        return min(MOST_S, max(LEAST_S, SPARE * max(self._gaps)))
