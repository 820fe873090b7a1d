# SPDX-License-Identifier: Apache-2.0
"""The node under a lifecycle manager: nothing by itself, a bad model is told and mended without a restart."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState

from qdbev_ros.ros.diagnostics import PIPELINE
from tests.ros.fault_table import record
from tests.ros.graph import Graph
from tests.ros.rig import TIMING, Rig
from tests.small_master import write_small_package


def change(rig: Rig, transition: int) -> bool:
    request = ChangeState.Request(transition=Transition(id=transition))
    return bool(rig.call(ChangeState, "change_state", request).success)


def test_a_managed_node_waits_says_what_is_wrong_works_once_it_is_mended_and_swaps_models(
    graph: Graph, package: Path, tmp_path: Path
) -> None:
    pytest.importorskip("qdbev_msgs", reason="qdbev_msgs tells which cameras were used")
    damaged = tmp_path / "damaged.qdbev"
    damaged.write_bytes(package.read_bytes()[:5000])
    node = graph.node(
        "detector_node", model=damaged, autostart="false", image_reliability="reliable", **TIMING
    )
    rig = Rig(graph, node)
    try:
        rig.until(lambda: PIPELINE in rig.statuses, "an unconfigured node says nothing")
        rig.until_state("waiting", "not active")
        started = time.monotonic()
        assert not change(rig, Transition.TRANSITION_CONFIGURE)
        rig.until_state("fault", "damaged.qdbev")
        said, told = rig.statuses[PIPELINE].message, time.monotonic() - started
        small = tmp_path / "small.qdbev"
        write_small_package(small)
        for model in (package, small):
            assert rig.set_parameter("model", str(model)).successful
            assert change(rig, Transition.TRANSITION_CONFIGURE)
            assert change(rig, Transition.TRANSITION_ACTIVATE)
            rig.until_heard()
            started = time.monotonic()
            rig.whole()
            rig.until(lambda: rig.values()["package"] == rig.answers[rig.now_ns].model, "another package")
            resets = rig.values().get("memory_resets.model_change", "0")
            if model == package:
                record("damaged model", said, told, "configured with a good model: running")
            else:
                record("model swapped", f"package {rig.values()['package']}, memory_resets.model_change {resets}",
                       time.monotonic() - started, "no restart; the old memory is not used")  # fmt: skip
            assert "cannot change" in rig.set_parameter("model", str(damaged)).reason
            assert change(rig, Transition.TRANSITION_DEACTIVATE)
            rig.until_state("waiting", "not active")
            assert change(rig, Transition.TRANSITION_CLEANUP)
        assert len({answer.model for answer in rig.answers.values()}) == 2
        assert resets == "1"
    finally:
        rig.close()
    assert node.stop() == 0
    assert "Traceback" not in node.output


def test_the_node_says_what_takes_long_at_a_start_and_why_every_start_takes_as_long(
    graph: Graph, tmp_path: Path
) -> None:
    write_small_package(tmp_path / "small.qdbev")
    shared = tmp_path / "cache"
    shared.mkdir()
    shared.chmod(0o775)
    graph.environment["QDBEV_CACHE"] = str(shared)
    node = graph.node("detector_node", model=tmp_path / "small.qdbev")
    node.wait_for("ready: ")
    assert f"because others can write to {shared} (chmod go-w {shared})" in node.output
    assert "[INFO]" in next(line for line in node.output.splitlines() if "checking ONNX Runtime" in line)
    assert node.stop() == 0
