# SPDX-License-Identifier: Apache-2.0
"""What a soak run comes to: figures from samples, and which limits they miss. No ROS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOST_LIMIT = 0.001  # of the sets
SLOPE_LIMIT = 1.0  # MB an hour
TAIL_LIMIT = 2.0  # p99 in terms of p50
JUDGED_S = 600.0  # of memory after the warm-up; the slope of less is noise
AROUND = ("decode", "preprocess", "postprocess", "publish")  # the node's stages beside the engine
MAX_POINTS = 1500  # for Theil and Sen's slope, which looks at all pairs


@dataclass(frozen=True)
class Sample:
    """One row of soak.csv. Counters since the start; latencies and CPU of the seconds since the row before."""

    seconds: float
    rss_mb: float  # the node's resident memory, shared memory of DDS included
    anonymous_mb: float  # its own part of that
    cores: float  # CPU time a second
    sent: int
    answered: int
    lost: int
    p50_ms: float  # NaN where nothing was answered
    p99_ms: float
    state: str

    @staticmethod
    def header() -> str:
        return ",".join(field.name for field in fields(Sample))

    def row(self) -> str:
        values = (getattr(self, field.name) for field in fields(self))
        return ",".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values)


def theil_sen(x: Sequence[float], y: Sequence[float]) -> float:
    """The median of the slopes between all pairs of points; NaN for less than two. One step up moves it little."""
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    step = -(-len(xs) // MAX_POINTS) or 1
    xs, ys = xs[::step], ys[::step]
    first, second = np.triu_indices(len(xs), 1)
    run = xs[second] - xs[first]
    steep = run > 0
    if not steep.any():
        return float("nan")
    return float(np.median((ys[second] - ys[first])[steep] / run[steep]))


def figures(samples: Sequence[Sample], latencies_ms: Sequence[float], warm_up_s: float) -> dict[str, Any]:
    """Everything that a run yields, ready for JSON. latencies_ms: of every answered set, in order."""
    last = samples[-1]
    warm = [sample for sample in samples if sample.seconds >= warm_up_s]
    judged_s = warm[-1].seconds - warm[0].seconds if warm else 0.0
    per_hour = {
        name: round(3600 * theil_sen([s.seconds for s in warm], [getattr(s, name) for s in warm]), 3)
        for name in ("rss_mb", "anonymous_mb")
        if len(warm) > 1
    }
    latencies: NDArray[np.float64] = np.asarray(latencies_ms, np.float64)
    p50, p99, p999 = np.percentile(latencies, (50, 99, 99.9)) if len(latencies) else (np.nan,) * 3
    return {
        "seconds": round(last.seconds, 1),
        "sets_sent": last.sent,
        "sets_answered": last.answered,
        "sets_lost": last.lost,
        "lost_share": round(last.lost / last.sent, 6) if last.sent else None,
        "answers_hz": round(last.answered / last.seconds, 3) if last.seconds else None,
        "latency_ms": {"p50": _number(p50), "p99": _number(p99), "p99.9": _number(p999)},
        "latency_max_ms": _number(latencies.max()) if len(latencies) else None,
        "cores": round(float(np.mean([sample.cores for sample in samples])), 3),
        "warm_up_s": warm_up_s,
        "memory_judged_s": round(judged_s, 1),
        "memory_mb": {"first": samples[0].rss_mb, "warm": warm[0].rss_mb if warm else None, "last": last.rss_mb},
        "memory_slope_mb_per_hour": per_hour.get("rss_mb"),
        "own_memory_slope_mb_per_hour": per_hour.get("anonymous_mb"),
        "seconds_not_running": _not_running(samples),
        "seconds_stood_still": _stood_still(samples),
    }  # fmt: skip


def missed_limits(figures: dict[str, Any]) -> list[str]:
    """A line for each limit that the run missed."""
    missed = []
    share, slope = figures["lost_share"], figures["memory_slope_mb_per_hour"]
    p50, p99 = figures["latency_ms"]["p50"], figures["latency_ms"]["p99"]
    if share is None or p50 is None:
        return ["not one set was answered"]
    if share >= LOST_LIMIT:
        missed.append(f"{share:.2%} of the sets were lost, the limit is {LOST_LIMIT:.1%}")
    if figures["memory_judged_s"] >= JUDGED_S and slope >= SLOPE_LIMIT:
        missed.append(f"memory grew by {slope:.2f} MB an hour, the limit is {SLOPE_LIMIT:g}")
    if p99 >= TAIL_LIMIT * p50:
        missed.append(f"p99 is {p99:.1f} ms, the limit is {TAIL_LIMIT:g} x p50, {TAIL_LIMIT * p50:.1f} ms")
    return missed


def table(figures: dict[str, Any]) -> str:
    """The figures as one table."""
    latency, memory = figures["latency_ms"], figures["memory_mb"]
    slope = figures["memory_slope_mb_per_hour"]
    judged = figures["memory_judged_s"] >= JUDGED_S
    growth = (
        f"{slope:.2f} MB/h after {figures['warm_up_s'] / 60:g} min" if judged else "run too short to judge"
    )
    rows = {
        "time": f"{figures['seconds'] / 60:.1f} min at {figures['rate_hz']:.2f} sets/s",
        "sets": f"{figures['sets_sent']} sent, {figures['sets_answered']} answered, {figures['sets_lost']} lost",
        "last image to boxes, ms": f"p50 {latency['p50']}, p99 {latency['p99']}, p99.9 {latency['p99.9']}",
        "memory, MB": f"{memory['first']:.1f} at first, {memory['last']:.1f} at last; {growth}",
        "CPU, cores": f"{figures['cores']:.2f}",
        "not running, s": f"{figures['seconds_not_running']:.0f}",
        "machine stood still, s": f"{figures['seconds_stood_still']:.0f}",
        "stages, ms p50 (p99)": _stages(figures["diagnostics"]),
        "pictures and boxes, ms": f"{figures['around_engine_ms']} beside the engine, p50",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def around_engine_ms(diagnostics: Mapping[str, str]) -> float | None:
    """What a set costs beside the engine, at the median: its pictures before, its boxes and messages after."""
    parts = [diagnostics.get(f"latency_ms.{stage}.p50") for stage in AROUND]
    return None if None in parts else round(sum(map(float, filter(None, parts))), 2)


def _stages(diagnostics: Mapping[str, str]) -> str:
    """Every stage as the node's own diagnostics told it last."""
    stages = [
        key.split(".")[1] for key in diagnostics if key.startswith("latency_ms.") and key.endswith(".p50")
    ]
    told = [(s, diagnostics[f"latency_ms.{s}.p50"], diagnostics[f"latency_ms.{s}.p99"]) for s in stages]
    return ", ".join(f"{stage} {p50} ({p99})" for stage, p50, p99 in told)


def _not_running(samples: Sequence[Sample]) -> float:
    """Seconds in which diagnostics said anything but running."""
    pairs = pairwise(samples)
    return round(sum(b.seconds - a.seconds for a, b in pairs if b.state != "running"), 1)


def _stood_still(samples: Sequence[Sample]) -> float:
    """Seconds that samples came too late: this process was not run either, so it was the machine's doing."""
    steps = np.diff([sample.seconds for sample in samples])
    late = steps[steps > 2 * np.median(steps)] - np.median(steps) if len(steps) else steps
    return round(float(late.sum()), 1)


def _number(value: float) -> float | None:
    return round(float(value), 2) if np.isfinite(value) else None
