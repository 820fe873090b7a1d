# SPDX-License-Identifier: Apache-2.0
"""Faults put in front of a running node over DDS: it answers with what is left, says what is missing, and recovers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from std_srvs.srv import Trigger

from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.diagnostics import CAMERA, PIPELINE
from qdbev_ros.ros.parameters import DetectorParameters
from tests.ros.graph import Graph
from tests.ros.rig import LONG_S, TIMING, Rig

STARTED = {"image_reliability": "reliable", **TIMING}
OK, WARN, ERROR, STALE = (bytes([level]) for level in range(4))


@pytest.fixture(scope="module")
def running(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One node for all tests here."""
    pytest.importorskip("qdbev_msgs", reason="qdbev_msgs tells which cameras were used")
    with Graph(tmp_path_factory.mktemp("degraded")) as graph:
        node = graph.node("detector_node", model=package, **STARTED)
        node.wait_for("ready")
        with Rig(graph, node) as rig:
            yield rig
        assert node.stop() == 0
        assert "Traceback" not in node.output


@pytest.fixture
def rig(running: Rig) -> Rig:
    """Each test begins with a node that runs, in a scene of its own, with all cameras."""
    running.whole()
    return running


@pytest.mark.parametrize("lost", CAMERAS)
def test_a_lost_camera_is_named_and_the_others_answer_with_their_memory(rig: Rig, lost: str) -> None:
    """Nothing is sent after the incomplete set: the answer does not wait for the next one."""
    answer = rig.ask_in_vain("sync_deadline", without=[lost])
    assert answer.state == "degraded"
    assert answer.cameras_used == [camera for camera in CAMERAS if camera != lost]
    assert (answer.cameras_missing, answer.missing_reasons) == ([lost], ["no picture in time"])
    assert (answer.memory_state, answer.memory_age) == ("tracking", 4)
    rig.until_state("degraded", f"camera {lost}: no picture in time")
    assert rig.statuses[PIPELINE].level == WARN
    assert rig.statuses[CAMERA + lost].level in (WARN, STALE)
    for _ in range(3):
        assert rig.ask().cameras_missing == []
    rig.until_state("running")
    assert rig.statuses[PIPELINE].level == OK
    assert "left out" not in rig.statuses[CAMERA + lost].message


def test_a_damaged_picture_and_a_camera_info_of_nan_cost_their_cameras_only(rig: Rig) -> None:
    answer = rig.ask(pictures={"CAM_BACK": rig.jpeg[:200]})
    assert answer.cameras_missing == ["CAM_BACK"]
    rig.until(lambda: rig.values("CAM_BACK")["picture_errors"] != "0", "the error was not counted")
    for focal in (math.nan, 0.0):
        rig.ask(focal={"CAM_FRONT": focal})  # topics have no order: this one may come before its CameraInfo
        answer = rig.ask(focal={"CAM_FRONT": focal})
        assert answer.cameras_missing == ["CAM_FRONT"]
        rig.until(lambda: rig.statuses[CAMERA + "CAM_FRONT"].level == ERROR, "no word of the CameraInfo")
        assert all(math.isfinite(o.score) for o in answer.objects)
    rig.ask()
    for _ in range(3):
        assert rig.ask().cameras_missing == []


def test_too_few_cameras_are_not_answered_and_the_node_says_why(rig: Rig) -> None:
    for name, value in (("stale_after", 0.2), ("sync_deadline", 0.2), ("min_cameras", 6)):
        assert rig.set_parameter(name, value).successful
    rig.send(without=["CAM_BACK"])
    rig.until_state("stale", "5 usable cameras, min_cameras is 6")
    assert rig.statuses[PIPELINE].level == STALE
    assert int(rig.values()["sets_dropped.cameras"]) >= 1
    for name, value in (("stale_after", 60.0), ("sync_deadline", LONG_S), ("min_cameras", 3)):
        assert rig.set_parameter(name, value).successful
    rig.whole()


def test_the_policy_may_be_to_skip_incomplete_sets(rig: Rig) -> None:
    dropped = int(rig.values().get("sets_dropped.cameras", 0))
    assert rig.set_parameter("missing_cameras", "skip").successful
    assert rig.set_parameter("sync_deadline", 0.2).successful
    skipped = rig.send(without=["CAM_BACK"])
    rig.until(lambda: int(rig.values().get("sets_dropped.cameras", 0)) > dropped, "no set was dropped")
    assert skipped not in rig.answers
    assert rig.set_parameter("missing_cameras", "mask").successful
    assert rig.set_parameter("sync_deadline", LONG_S).successful
    rig.whole()


def test_without_ego_motion_nothing_is_remembered_and_everyone_is_told(rig: Rig) -> None:
    answer = rig.ask_in_vain("tf_timeout", tf=False)
    assert (answer.state, answer.ego_motion, answer.memory_age) == ("degraded", False, 0)
    assert (answer.memory_state, answer.memory_reset_reason) == ("reset", "no_ego_motion")
    rig.until_state("degraded", "no ego motion")
    back = rig.ask()
    assert (back.ego_motion, back.memory_age) == (True, 0)
    assert rig.ask().memory_age == 1


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"period_s": 10.0}, "gap"),
        ({"jump_m": 500.0}, "ego_jump"),
        ({"period_s": -30.0}, "time_back"),
    ],
)
def test_a_past_that_does_not_fit_is_forgotten_at_once(rig: Rig, how: dict[str, float], reason: str) -> None:
    answer = rig.ask(**how)
    assert (answer.memory_state, answer.memory_reset_reason, answer.memory_age) == ("reset", reason, 0)
    again = rig.ask(jump_m=how.get("jump_m", 0.0))
    assert (again.memory_state, again.memory_age) == ("tracking", 1)
    rig.until(lambda: int(rig.values().get(f"memory_resets.{reason}", 0)) >= 1, "the reset was not counted")


def test_a_calibration_that_changes_in_flight_resets_the_memory_within_two_sets(rig: Rig) -> None:
    rig.mount({"CAM_FRONT": 0.5})
    resets = [rig.ask().memory_reset_reason for _ in range(2)]
    assert sorted(resets) == ["", "calibration_change"]
    rig.mount({})
    assert "calibration_change" in [rig.ask().memory_reset_reason for _ in range(2)]


def test_stamps_from_the_future_stop_nothing(rig: Rig) -> None:
    future = rig.ask(offset_s=3600.0)
    assert future.memory_reset_reason == "gap"
    assert rig.ask().memory_reset_reason == "time_back"
    assert rig.ask().memory_age == 1


def test_the_memory_is_reset_on_request(rig: Rig) -> None:
    assert rig.call(Trigger, "reset_memory", Trigger.Request()).success
    answer = rig.ask()
    assert (answer.memory_state, answer.memory_reset_reason) == ("reset", "service")


def test_a_parameter_changes_live(rig: Rig) -> None:
    assert rig.set_parameter("max_detections", 5).successful
    assert len(rig.ask().objects) <= 5
    assert rig.set_parameter("max_detections", 300).successful
    assert not rig.set_parameter("max_spread", -1.0).successful
    assert "use one of" in rig.set_parameter("missing_cameras", "guess").reason
    assert rig.ask().state == "running"


@pytest.mark.parametrize("item", dataclasses.fields(DetectorParameters), ids=lambda item: item.name)
def test_every_parameter_changes_live_or_says_that_it_cannot(running: Rig, item: Any) -> None:
    meta, name, now = item.metadata, item.name, STARTED.get(item.name, item.default)
    others = [choice for choice in meta["choices"] if choice not in ("", now)]
    if isinstance(now, bool):
        other: Any = not now
    elif isinstance(now, str):
        other = others[0] if others else "another"
    else:
        other = type(now)(meta["low"] if now != meta["low"] else meta["high"])
    if meta["live"]:
        assert running.set_parameter(name, other).successful
        assert running.set_parameter(name, now).successful
    else:
        refused = running.set_parameter(name, other)
        assert not refused.successful
        assert f"parameter {name} cannot change while the node is configured" in refused.reason


def test_diagnostics_count_and_time_everything(rig: Rig) -> None:
    answered = int(rig.values()["sets_answered"])
    rig.ask()
    rig.until(lambda: rig.values()["memory_age"] == "4", "diagnostics never told of the fifth set")
    values = rig.values()
    assert int(values["sets_answered"]) > answered
    for stage in ("decode", "preprocess", "engine", "postprocess", "publish", "wait", "total"):
        times = [float(values[f"latency_ms.{stage}.{p}"]) for p in ("p50", "p99", "p99.9")]
        assert 0 <= times[0] <= times[1] <= times[2]
    assert float(values["set_spread_ms"]) == pytest.approx(42.0)
    for camera in CAMERAS:
        status = rig.values(camera)
        assert float(status["rate_hz"]) > 0
        assert float(status["age_s"]) >= 0
