# SPDX-License-Identifier: Apache-2.0
"""A progress bar on stderr without dependencies, for the commands that also run in the node's environment."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

WIDTH = 30
REFRESH_S = 0.1


def progress(items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterator[T]:
    """Yields `items` and shows how many are done, how fast, and how long the rest takes; only on a terminal."""
    if total is None:
        total = len(items) if isinstance(items, Sized) else 0
    terminal = sys.stderr.isatty()
    start = shown = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if terminal and (done == 0 or now - shown > REFRESH_S):
            shown = now
            _show(what, unit, done, total, now - start)
        yield item
    if terminal:
        _show(what, unit, total, total, time.monotonic() - start)
        sys.stderr.write("\n")


def _show(what: str, unit: str, done: int, total: int, elapsed: float) -> None:
    rate = done / elapsed if elapsed > 0 else 0.0
    rest = f"{(total - done) / rate:.0f} s left" if rate and total > done else f"{elapsed:.0f} s"
    filled = WIDTH * done // total if total else 0
    bar = "#" * filled + "." * (WIDTH - filled)
    sys.stderr.write(f"\r{what} [{bar}] {done}/{total} {unit}, {rate:.1f}/s, {rest}\x1b[K")
    sys.stderr.flush()
