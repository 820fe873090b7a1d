# SPDX-License-Identifier: Apache-2.0
"""What a soak run comes to."""

from __future__ import annotations

import random

import pytest

from qdbev_ros.core.soak_figures import Sample, around_engine_ms, figures, missed_limits, table, theil_sen

STAGES = {"decode": "5.0", "preprocess": "2.0", "engine": "40.0", "postprocess": "0.5", "publish": "1.0"}
RUNNING = {f"latency_ms.{stage}.{p}": ms for stage, ms in STAGES.items() for p in ("p50", "p99", "p99.9")}


def run(
    minutes: int = 30, growth_mb_per_hour: float = 0.0, lost: int = 0, tail_ms: float = 60.0
) -> dict[str, object]:
    """Figures of a run of 10 sets a second that leaks, loses and hesitates as told."""
    noise = random.Random(3)
    samples = [
        Sample(
            seconds=float(s), rss_mb=400 + growth_mb_per_hour * s / 3600 + noise.gauss(0, 0.02), anonymous_mb=170.0,
            cores=0.5, sent=10 * s, answered=10 * s - lost, lost=lost, p50_ms=50.0, p99_ms=60.0,
            state="running" if s != 60 else "degraded",
        )
        for s in range(5, 60 * minutes + 1, 5)
    ]  # fmt: skip
    latencies = [50.0] * 980 + [tail_ms] * 20
    return {**figures(samples, latencies, 300.0), "rate_hz": 10.0, "diagnostics": RUNNING,
            "around_engine_ms": around_engine_ms(RUNNING)}  # fmt: skip


def test_the_slope_is_that_of_the_line_whatever_single_points_do() -> None:
    times = [float(i) for i in range(200)]
    values = [3.0 * t + 7 for t in times]
    values[10] = values[150] = 1e6
    assert theil_sen(times, values) == pytest.approx(3.0)


def test_a_steady_run_misses_nothing() -> None:
    result = run()
    assert missed_limits(result) == []
    assert abs(float(str(result["memory_slope_mb_per_hour"]))) < 0.2
    assert result["seconds_not_running"] == 5.0
    assert result["around_engine_ms"] == 8.5
    assert "30.0 min at 10.00 sets/s" in table(result)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ({"growth_mb_per_hour": 5.0}, "memory grew by"),
        ({"lost": 20}, "of the sets were lost"),
        ({"tail_ms": 120.0}, "p99 is 120.0 ms"),
    ],
)
def test_each_limit_that_is_missed_is_named(fault: dict[str, float], text: str) -> None:
    missed = missed_limits(run(**fault))  # type: ignore[arg-type]
    assert len(missed) == 1
    assert text in missed[0]


def test_memory_is_not_judged_by_a_short_run() -> None:
    assert missed_limits(run(minutes=10, growth_mb_per_hour=50.0)) == []
    assert "too short to judge" in table(run(minutes=10))


def test_a_run_without_an_answer_says_so() -> None:
    sample = Sample(5.0, 400.0, 170.0, 0.1, 0, 0, 0, float("nan"), float("nan"), "waiting")
    assert missed_limits(figures([sample], [], 300.0)) == ["not one set was answered"]


def test_a_machine_that_stood_still_is_told_apart_from_the_node() -> None:
    still = [
        Sample(t, 400.0, 170.0, 0.5, 1, 1, 0, 50.0, 60.0, "running") for t in (5.0, 10.0, 15.0, 40.0, 45.0)
    ]
    assert figures(still, [50.0], 0.0)["seconds_stood_still"] == 20.0
