# SPDX-License-Identifier: Apache-2.0
"""use_sim_time without a clock, as with a bag that is paused or at its end: what means real time goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.diagnostics import PIPELINE
from tests.ros.drive import START_NS
from tests.ros.graph import Graph
from tests.ros.rig import TIMING, Rig
from tests.small_master import write_small_package


def test_without_a_clock_diagnostics_come_deadlines_hold_and_silence_is_told(
    graph: Graph, tmp_path: Path
) -> None:
    pytest.importorskip("qdbev_msgs", reason="qdbev_msgs tells which cameras were used")
    write_small_package(tmp_path / "small.qdbev")
    given = {"model": tmp_path / "small.qdbev", "image_reliability": "reliable", "use_sim_time": "true"}
    node = graph.node("detector_node", **given, **TIMING)
    node.wait_for("ready")
    with Rig(graph, node) as rig:
        rig.until_state("waiting")
        rig.whole()
        assert rig.ask_in_vain("sync_deadline", without=["CAM_BACK"]).cameras_missing == ["CAM_BACK"]
        answer = rig.ask_in_vain("tf_timeout", tf=False)
        assert not answer.ego_motion
        assert rig.set_parameter("stale_after", 0.2).successful
        rig.until_state("stale", "no answer for")
        told = rig.statuses[PIPELINE]
        rig.until(lambda: rig.statuses[PIPELINE].message != told.message, "the diagnostics froze")


def test_a_player_and_a_recorder_that_are_given_sim_time_by_mistake_work(
    graph: Graph, short_bag: Path, tmp_path: Path
) -> None:
    """The player makes the clock: were it to wait for one, everything would."""
    out = tmp_path / "clock.mcap"
    recorder = graph.node("recorder_node", output=out, topics="/odom", use_sim_time="true")
    player = graph.node(
        "bag_player_node", bag=short_bag, clock="true", wait_for="/odom", linger=0.5, use_sim_time="true"
    )
    assert player.wait(60) == 0
    assert recorder.stop() == 0
    with BagReader(out) as bag:
        stamps = [m.header.stamp.sec * 10**9 + m.header.stamp.nanosec for _, _, m in bag.messages(["/odom"])]
    assert len(stamps) > 10
    assert min(stamps) < START_NS
