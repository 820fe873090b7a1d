# SPDX-License-Identifier: Apache-2.0
"""What asks a program to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from qdbev_ros.core.signals import on_stop

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """As a terminal starts a program, also under nohup; the test run's own handlers are there again afterwards."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ctrl_c_termination_and_the_end_of_the_terminal_do() -> None:
    heard: list[int] = []
    on_stop(lambda number, _: heard.append(number))
    for number in NUMBERS:
        signal.raise_signal(number)
    assert heard == list(NUMBERS)


def test_under_nohup_the_end_of_the_terminal_does_not() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    heard: list[int] = []
    on_stop(lambda number, _: heard.append(number))
    signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]
