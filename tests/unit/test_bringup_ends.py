# SPDX-License-Identifier: Apache-2.0
"""Whose end is the end of all: real processes that are no nodes, run as those of the detector are."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdbev_ros.bringup import Bringup, Process, describe, run

LONG = "exec sleep 60"


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """The test run's own handlers are there again afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def shell(name: str, script: str, ends_all: bool) -> Process:
    return Process(name, "elsewhere", "bash", arguments=("-c", script), ends_all=ends_all)


def after(file: Path) -> str:
    """A script that ends well after `file` is there."""
    return f"until [ -e {file} ]; do sleep 0.05; done; sleep 1.5"


def ending(*processes: Process) -> int:
    return run(Bringup(processes, {}))


def test_the_detector_ends_all_and_what_plays_a_bag_does(tmp_path: Path) -> None:
    """A replay can be had again, and is there for its recording. A view is only a view."""
    model, bag = tmp_path / "m.qdbev", tmp_path / "b.mcap"
    model.touch()
    bag.touch()
    given = {"model": str(model), "record": "x.mcap", "rviz": "true"}
    live = {p.executable: p.ends_all for p in describe(given).processes}
    replay = {p.executable: p.ends_all for p in describe({**given, "bag": str(bag)}).processes}
    assert live == {"detector_node": True, "recorder_node": False, "rviz2": False}
    assert replay == {"detector_node": True, "recorder_node": True, "bag_player_node": True, "rviz2": False}


def test_the_end_of_one_that_ends_all_ends_the_others() -> None:
    assert ending(shell("detector", "exit 0", True), shell("recorder", LONG, False)) == 0
    assert ending(shell("detector", LONG, True), shell("player", "exit 3", True)) == 3


def test_a_recorder_that_fails_is_told_the_others_go_on_and_the_whole_fails_in_the_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gone, went_on = tmp_path / "gone", tmp_path / "went on"
    detector = shell("detector", f"{after(gone)}; touch '{went_on}'", True)
    assert ending(detector, shell("qdbev_recorder", f"touch {gone}; exit 2", False)) == 2
    assert went_on.exists()
    (line,) = capfd.readouterr().err.splitlines()
    assert "qdbev_recorder failed with exit code 2" in line
    assert "the detector goes on without it" in line


def test_a_view_that_is_closed_is_told_and_is_no_failure(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    assert ending(shell("detector", after(gone), True), shell("rviz2", f"touch {gone}", False)) == 0
    assert "rviz2 ended: the detector goes on without it" in capfd.readouterr().err


def test_a_failure_at_the_end_fails_the_whole(tmp_path: Path) -> None:
    """A recorder that cannot write its last megabyte."""
    ready = tmp_path / "ready"
    recorder = shell(
        "qdbev_recorder", f"trap 'exit 2' INT; touch {ready}; while :; do sleep 0.1; done", False
    )
    assert ending(shell("detector", after(ready), True), recorder) == 2
