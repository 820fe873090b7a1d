# SPDX-License-Identifier: Apache-2.0
"""What asks a program to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


def on_stop(handler: Callable[[int, FrameType | None], None]) -> None:
    """Has `handler` called on Ctrl-C, on SIGTERM, and when the terminal closes (SIGHUP) unless nohup was asked for."""
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handler)
