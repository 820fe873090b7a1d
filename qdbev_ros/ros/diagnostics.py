# SPDX-License-Identifier: Apache-2.0
"""/diagnostics: one status for each camera and one for the whole, with every counter there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from qdbev_ros.core.synchroniser import SyncCounters
from qdbev_ros.ros.camera_state import CameraState, Level

PIPELINE = "qdbev_detector: pipeline"  # name of the status of the whole
CAMERA = "qdbev_detector: camera "  # and of a camera, followed by its name


@dataclass
class PipelineReport:
    """What the detector says about itself. Written by the inference thread, read once a second."""

    engine: str
    package: str
    sha256: str
    sets_answered: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> complete sets without an answer
    memory_age: int = 0
    memory_gap_s: float = 0.0
    spread_s: float = 0.0
    last_error: str | None = None


def camera_status(state: CameraState, now: float) -> DiagnosticStatus:
    """One camera. `now` is the monotonic clock's time."""
    level, text = state.status(now)
    age = state.age(now)
    values = {
        "topic": state.image_topic,
        "pictures": state.images,
        "rate_hz": f"{state.rate():.2f}",
        "age_s": "never" if age is None else f"{age:.2f}",
        "picture_errors": state.picture_errors,
        "calibrated": state.intrinsics is not None,
    }
    return _status(CAMERA + state.name, level, text, state.name, values)


def pipeline_status(
    report: PipelineReport,
    cameras: Mapping[str, CameraState],
    sync: SyncCounters,
    memory_resets: Mapping[str, int],
    latencies: Mapping[str, tuple[float, ...]],
    now: float,
) -> DiagnosticStatus:
    """The whole. latencies: stage -> (p50, p99) in milliseconds."""
    level, text = Level.OK, "running"
    problems = [
        text for state in cameras.values() for worst, text in [state.status(now)] if worst != Level.OK
    ]
    if len(problems) > 2:
        problems = [problems[0], f"and {len(problems) - 1} more cameras"]
    if report.last_error is not None:
        level, text = Level.ERROR, report.last_error
    elif problems:
        level, text = Level.WARN, "waiting: " + "; ".join(problems)
    elif not report.sets_answered:
        level, text = Level.WARN, "no set answered yet"
    values: dict[str, object] = {
        "engine": report.engine,
        "package": report.package,
        "package_sha256": report.sha256,
        "sets_complete": sync.complete_sets,
        "sets_incomplete": sync.incomplete_sets,
        "sets_answered": report.sets_answered,
        "set_spread_ms": f"{report.spread_s * 1e3:.1f}",
        "memory_age": report.memory_age,
        "memory_gap_s": f"{report.memory_gap_s:.3f}",
    }
    values |= {f"sets_dropped.{reason}": n for reason, n in report.dropped.items()}
    values |= {f"pictures_dropped.{reason}": n for reason, n in sync.dropped.items()}
    values |= {f"sync_resets.{reason}": n for reason, n in sync.resets.items()}
    values |= {f"memory_resets.{reason}": n for reason, n in memory_resets.items()}
    for stage, (p50, p99) in latencies.items():
        values |= {f"latency_ms.{stage}.p50": f"{p50:.2f}", f"latency_ms.{stage}.p99": f"{p99:.2f}"}
    return _status(PIPELINE, level, text, report.engine, values)


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
