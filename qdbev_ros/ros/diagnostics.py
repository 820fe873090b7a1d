# SPDX-License-Identifier: Apache-2.0
"""/diagnostics: one status for each camera and one for the whole, with every counter there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from qdbev_ros.core.health import Health, Level, State
from qdbev_ros.core.latency import Rate
from qdbev_ros.core.synchroniser import SyncCounters
from qdbev_ros.ros.camera_state import CameraState

PIPELINE = "qdbev_detector: pipeline"  # name of the status of the whole
CAMERA = "qdbev_detector: camera "  # and of a camera, followed by its name
PERCENTILES = (50.0, 99.0, 99.9)


@dataclass
class PipelineReport:
    """What the detector counts. Written by the inference thread, read by diagnostics."""

    sets_answered: int = 0
    sets_degraded: int = 0
    answers: Rate = field(default_factory=Rate)
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> sets without an answer
    refused: Counter[str] = field(default_factory=Counter)  # kind of message -> those that could not be used
    failures: Counter[str] = field(default_factory=Counter)  # place -> errors that nothing should have raised
    memory_age: int = 0
    memory_gap_s: float = 0.0
    spread_s: float = 0.0


def camera_status(state: CameraState, now: float) -> DiagnosticStatus:
    """One camera. `now` is the monotonic clock's time."""
    level, text = state.status(now)
    age = state.age(now)
    values = {
        "topic": state.image_topic,
        "pictures": state.images,
        "rate_hz": f"{state.arrivals.hz(now):.2f}",
        "age_s": "never" if age is None else f"{age:.2f}",
        "picture_errors": state.picture_errors,
        "sets_without": state.sets_without,
        "calibrated": state.intrinsics is not None,
    }
    return _status(CAMERA + state.name, level, text, state.name, values)


def pipeline_status(health: Health, values: Mapping[str, object]) -> DiagnosticStatus:
    """The whole; `values` are of pipeline_values where the node is configured.

    Without a hardware_id: viewers find a status by it, so it has to be the same on every machine.
    """
    return _status(PIPELINE, health.level, health.text, "", {"state": health.state.value, **values})


def pipeline_values(
    report: PipelineReport,
    sync: SyncCounters,
    memory_resets: Mapping[str, int],
    latencies: Mapping[str, tuple[float, ...]],
    now: float,
) -> dict[str, object]:
    """Every counter. latencies: stage -> milliseconds at PERCENTILES. `now` is the monotonic clock's time."""
    values: dict[str, object] = {
        "sets_complete": sync.complete_sets,
        "sets_incomplete": sync.incomplete_sets,
        "sets_answered": report.sets_answered,
        "sets_degraded": report.sets_degraded,
        "rate_hz": f"{report.answers.hz(now):.2f}",
        "set_spread_ms": f"{report.spread_s * 1e3:.1f}",
        "memory_age": report.memory_age,
        "memory_gap_s": f"{report.memory_gap_s:.3f}",
        "pictures_reordered": sync.reordered,
    }
    values |= {f"sets_dropped.{reason}": n for reason, n in report.dropped.items()}
    values |= {f"inputs_refused.{kind}": n for kind, n in report.refused.items()}
    values |= {f"failures.{place}": n for place, n in report.failures.items()}
    values |= {f"pictures_dropped.{reason}": n for reason, n in sync.dropped.items()}
    values |= {f"sync_resets.{reason}": n for reason, n in sync.resets.items()}
    values |= {f"memory_resets.{reason}": n for reason, n in memory_resets.items()}
    for stage, milliseconds in latencies.items():
        for percentile, value in zip(PERCENTILES, milliseconds, strict=True):
            values[f"latency_ms.{stage}.p{percentile:g}"] = f"{value:.2f}"
    return values


def with_input_problems(health: Health, cameras: Iterable[CameraState], now: float) -> Health:
    """While nothing is answered, what the cameras lack says more than the state alone."""
    if health.state not in (State.WAITING, State.STALE):
        return health
    problems = [text for state in cameras for level, text in [state.status(now)] if level > Level.WARN]
    if len(problems) > 2:
        problems = [problems[0], f"and {len(problems) - 1} more cameras"]
    return Health(health.state, "; ".join([health.text, *problems]))


def _status(
    name: str, level: Level, text: str, hardware: str, values: Mapping[str, object]
) -> DiagnosticStatus:
    pairs = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
    return DiagnosticStatus(
        name=name, level=bytes([level]), message=text, hardware_id=hardware, values=pairs
    )  # `level` is a ROS byte


def diagnostic_array(stamp: object, statuses: list[DiagnosticStatus]) -> DiagnosticArray:
    message = DiagnosticArray(status=statuses)
    message.header.stamp = stamp
    return message
