# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM end a run after the step in hand, with a checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = (
    10.0  # seconds; torchrun repeats the terminal's signal at once, a person who wants out does so later
)


class StopRequest(AbstractContextManager["StopRequest"]):
    """`asked` becomes true with the first signal. A later one interrupts as usual."""

    def __init__(self) -> None:
        self.asked = False
        self._first = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._ask) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and now - self._first > PATIENCE:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._first = True, now
