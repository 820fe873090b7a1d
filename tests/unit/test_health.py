# SPDX-License-Identifier: Apache-2.0
"""The five states: how each is entered, how it is left, and the diagnostic level that it has."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qdbev_ros.core.health import HealthMonitor, HealthPolicy, Level, State

POLICY = HealthPolicy(stale_after_s=1.0, recover_sets=3, fault_after=3)


@pytest.fixture
def monitor() -> HealthMonitor:
    return HealthMonitor(POLICY)


def test_waiting_until_the_first_answer_and_says_what_for(monitor: HealthMonitor) -> None:
    health = monitor.check(1000.0)
    assert (health.state, health.level) == (State.WAITING, Level.WARN)
    monitor.refused("no transform names 'LIDAR_TOP'")
    assert monitor.check(1000.0).text == "no transform names 'LIDAR_TOP'"
    monitor.answered(1000.1)
    health = monitor.check(1000.1)
    assert (health.state, health.level) == (State.RUNNING, Level.OK)


def test_one_answer_that_lacks_something_degrades_at_once(monitor: HealthMonitor) -> None:
    monitor.answered(0.0)
    monitor.answered(0.1, ("CAM_BACK: no picture in time",))
    health = monitor.check(0.1)
    assert (health.state, health.level) == (State.DEGRADED, Level.WARN)
    assert "CAM_BACK" in health.text


def test_degraded_ends_after_three_full_answers_in_a_row(monitor: HealthMonitor) -> None:
    monitor.answered(0.0, ("CAM_BACK",))
    states = []
    for i, lacking in enumerate([(), (), ("CAM_BACK",), (), (), ()]):
        monitor.answered(0.1 * i, lacking)
        states.append(monitor.check(0.1 * i).state)
    assert states == [State.DEGRADED] * 5 + [State.RUNNING]


def test_stale_after_a_second_without_an_answer_until_the_next_one(monitor: HealthMonitor) -> None:
    monitor.answered(0.0)
    assert monitor.check(0.99).state == State.RUNNING
    monitor.refused("2 cameras, min_cameras is 3")
    health = monitor.check(1.01)
    assert (health.state, health.level) == (State.STALE, Level.STALE)
    assert health.text == "no answer for 1.0 s: 2 cameras, min_cameras is 3"
    monitor.answered(1.5)
    assert monitor.check(1.5).state == State.RUNNING


def test_sets_that_come_slowly_are_not_stale_between_each_other(monitor: HealthMonitor) -> None:
    for i in range(4):
        monitor.answered(2.0 * i)
    assert monitor.check(6.0 + 5.9).state == State.RUNNING
    assert monitor.check(6.0 + 6.1).state == State.STALE


def test_fault_after_three_failures_in_a_row_until_the_next_answer(monitor: HealthMonitor) -> None:
    monitor.answered(0.0)
    for _ in range(2):
        monitor.failed("RuntimeError: out of memory")
    assert monitor.check(0.1).state == State.RUNNING
    monitor.failed("RuntimeError: out of memory")
    health = monitor.check(0.1)
    assert (health.state, health.level) == (State.FAULT, Level.ERROR)
    assert "out of memory" in health.text
    monitor.answered(0.2)
    assert monitor.check(0.2).state == State.RUNNING


def test_a_declared_fault_stays_until_it_is_taken_back(monitor: HealthMonitor) -> None:
    monitor.declare_fault("nano.qdbev is damaged")
    monitor.restart()
    assert monitor.check(0.0).state == State.FAULT
    monitor.declare_fault(None)
    assert monitor.check(0.0).state == State.WAITING


def test_a_restart_waits_anew(monitor: HealthMonitor) -> None:
    monitor.answered(0.0, ("CAM_BACK",))
    monitor.restart()
    assert monitor.check(0.0).state == State.WAITING


EVENTS = st.lists(
    st.tuples(st.sampled_from(["full", "lacking", "failed", "refused"]), st.floats(0, 3)), max_size=30
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(EVENTS)
def test_whatever_happens_the_state_is_what_its_definition_says(events: list[tuple[str, float]]) -> None:
    monitor = HealthMonitor(POLICY)
    now, last, answers, failures = 0.0, 0.0, [], 0
    for kind, pause in events:
        now += pause
        if kind in ("full", "lacking"):
            monitor.answered(now, ("a camera",) if kind == "lacking" else ())
            answers, failures, last = [*answers, kind], 0, now
        else:
            getattr(monitor, kind)("why")
            failures += kind == "failed"
        state = monitor.check(now).state
        assert (state == State.FAULT) == (failures >= 3)
        if state != State.FAULT:
            assert (state == State.WAITING) == (not answers)
        if state == State.STALE:
            assert now - last > 1.0
        if state == State.RUNNING:
            assert "lacking" not in answers[-3:]
        if state == State.DEGRADED:
            assert "lacking" in answers[-3:]
