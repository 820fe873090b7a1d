# SPDX-License-Identifier: Apache-2.0
"""Errors of the program itself: a bug, an engine that answers NaN. Each is told, and the node goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rclpy.logging
from std_srvs.srv import Trigger

from qdbev_ros.ros.throttle import Throttled
from tests.ros.fault_rig import PERIOD_S, FaultRig, both, boxes_of
from tests.ros.graph import Graph, Running
from tests.ros.rig import Edit
from tests.ros.spoiled_node import SLOW_S

NODE = {"image_reliability": "reliable", "max_detections": 20, "queue_size": 10, "model": ""}


@pytest.fixture(scope="module")
def graph_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    with Graph(tmp_path_factory.mktemp("errors")) as graph:
        yield graph


@pytest.fixture(scope="module")
def node(graph_of_all: Graph, package: Path) -> Iterator[Running]:
    words = [w for n, v in (NODE | {"model": package}).items() for w in ("-p", f"{n}:={v}")]
    node = graph_of_all.start("tests.ros.spoiled_node", "--ros-args", *words)
    node.wait_for("ready")
    yield node
    assert node.stop() == 0


@pytest.fixture(scope="module")
def running(graph_of_all: Graph, node: Running) -> Iterator[FaultRig]:
    pytest.importorskip("qdbev_msgs", reason="qdbev_msgs tells which cameras were used")
    with FaultRig(graph_of_all, node) as rig:
        yield rig


@pytest.fixture
def rig(running: FaultRig) -> FaultRig:
    """The node runs, in a scene of its own."""
    running.steady()
    return running


def asking(for_what: str) -> Edit:
    def edit(camera: str, info: Any, image: Any) -> int:
        if camera == "CAM_FRONT":
            image.format = for_what
        return 1

    return edit


def test_after_a_warning_an_error_can_be_logged() -> None:
    """rclpy allows each line of code one severity, and raises: it ended the inference thread."""
    log = rclpy.logging.get_logger("throttled")
    Throttled(log)("camera", "left out")
    Throttled(log, error=True)("failure", "set dropped")
    Throttled(log)("camera", "left out")


def test_an_error_in_the_executor_is_told_once_and_begins_anew(rig: FaultRig, node: Running) -> None:
    failures = int(rig.values().get("failures.pictures", 0))
    told = both(rig.counts("failures.pictures"), rig.counts("memory_resets.failure", "sync_resets.failure"))
    stamps: list[int] = []
    rig.suffer("error in the node itself", told, lambda: stamps.append(rig.step(edit=asking("bug"))))
    assert int(rig.values()["failures.pictures"]) >= failures + len(stamps)
    for _ in range(3):
        rig.step(edit=asking("bug"))
    assert node.output.count("Traceback") == 1
    assert node.output.count("ValueError: max() arg is an empty sequence") == 1


def test_an_engine_that_answers_nan_is_a_fault_and_leaves_no_map(rig: FaultRig) -> None:
    answered = set(rig.answers)
    told = rig.says("fault", "not finite: bev")
    stamps: list[int] = []

    def do() -> None:
        """No answer is waited for: none comes."""
        started = time.monotonic()
        stamps.append(rig.send(period_s=PERIOD_S, edit=asking("nan")))
        while time.monotonic() < started + PERIOD_S:
            rig.spin()

    rig.suffer("engine answers NaN", told, do)
    assert not set(stamps) & set(rig.answers)
    after = min(stamp for stamp in set(rig.answers) - answered if stamp > stamps[-1])
    assert rig.answers[after].memory_age == 0


def test_an_error_after_the_answer_does_not_silence_the_node(rig: FaultRig) -> None:
    told = rig.counts("failures.inference", "sets_answered")
    stamps: list[int] = []
    rig.suffer("error after the answer", told, lambda: stamps.append(rig.step(edit=asking("after"))))
    assert set(stamps) <= set(rig.answers)


def test_forgetting_waits_for_no_inference_and_the_set_that_is_worked_on_leaves_no_map(
    rig: FaultRig, node: Running
) -> None:
    alone, before = rig.fresh(), node.output.count("slow set begun")
    rig.steady()
    slow = rig.send(period_s=PERIOD_S, edit=asking("slow"))
    rig.until(lambda: node.output.count("slow set begun") > before, "the slow set never began")
    started = time.monotonic()
    response = rig.call(Trigger, "reset_memory", Trigger.Request())
    assert time.monotonic() - started < SLOW_S / 2
    assert slow not in rig.answers
    assert response.success
    assert "next set" in response.message
    assert rig.answer(slow).memory_age > 0
    answer = rig.ask(period_s=PERIOD_S)
    assert (answer.memory_state, answer.memory_age, answer.memory_reset_reason) == ("reset", 0, "service")
    np.testing.assert_allclose(boxes_of(answer), alone, atol=1e-3)
