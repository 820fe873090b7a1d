# SPDX-License-Identifier: Apache-2.0
"""An activation that fails is told, and leaves nothing behind: no mute process, no thread, no subscription."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import yaml
from lifecycle_msgs.msg import Transition

from qdbev_ros.ros.diagnostics import PIPELINE
from tests.ros.graph import Graph
from tests.ros.rig import TIMING, Rig
from tests.ros.test_faults import one_line
from tests.ros.test_lifecycle import change

TOO_LONG = "/" + "o" * 300  # what a preset may say and no DDS takes; the cameras are subscribed to before it


def deaf_preset(folder: Path) -> Path:
    """The preset nuscenes, with an odometry topic that cannot be listened to."""
    preset = {"image_type": "compressed", "image": "/{camera}/image_rect_compressed", "odometry": TOO_LONG}
    preset |= {"camera_info": "/{camera}/camera_info", "ego_motion": "odometry"}
    (folder / "deaf.yaml").write_text(yaml.safe_dump(preset))
    return folder / "deaf.yaml"


def test_a_node_that_cannot_listen_ends_with_one_clear_line(
    graph: Graph, package: Path, tmp_path: Path
) -> None:
    node = graph.node("detector_node", model=package, preset=deaf_preset(tmp_path))
    assert node.wait() == 2
    (line,) = (line for line in node.output.splitlines() if line.startswith("detector_node: error:"))
    assert "deaf" in line
    assert "topic name" in line


def test_a_preset_of_topics_that_ros_does_not_allow_is_refused_by_name(
    graph: Graph, package: Path, tmp_path: Path
) -> None:
    (tmp_path / "rig.yaml").write_text(
        yaml.safe_dump({"image_type": "raw", "image": "/kamera_ä/{camera}/image"}, allow_unicode=True)
    )
    node = graph.node("detector_node", model=package, preset=tmp_path / "rig.yaml")
    assert node.wait() == 2
    assert "'/kamera_ä/CAM_FRONT/image'" in one_line(node.output, "detector_node")


def test_a_transition_that_raises_closes_everything_and_can_be_tried_again(
    graph: Graph, package: Path
) -> None:
    pytest.importorskip("qdbev_msgs", reason="qdbev_msgs tells which cameras were used")
    graph.environment["QDBEV_SPOILT"] = "deactivate"
    parameters = TIMING | {"model": package, "image_reliability": "reliable"}
    words = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
    node = graph.start("tests.ros.spoiled_node", "--ros-args", *words)
    node.wait_for("ready")
    with Rig(graph, node) as rig:
        rig.whole()
        assert not change(rig, Transition.TRANSITION_DEACTIVATE)
        rig.until_state("fault", "a lifecycle transition from active failed")
        assert rig.set_parameter("decode_threads", 1).successful, "it is not configured any more"
        assert change(rig, Transition.TRANSITION_CONFIGURE)
        assert change(rig, Transition.TRANSITION_ACTIVATE)
        rig.until_heard()
        rig.whole()
    assert node.stop() == 0


def test_a_managed_node_that_cannot_listen_says_so_and_is_mended_without_a_restart(
    graph: Graph, package: Path, tmp_path: Path
) -> None:
    pytest.importorskip("qdbev_msgs", reason="qdbev_msgs tells which cameras were used")
    deaf = deaf_preset(tmp_path)
    node = graph.node(
        "detector_node", model=package, preset=deaf, autostart="false", image_reliability="reliable", **TIMING
    )
    rig = Rig(graph, node)
    try:
        rig.until(lambda: PIPELINE in rig.statuses, "an unconfigured node says nothing")
        assert change(rig, Transition.TRANSITION_CONFIGURE)
        threads = psutil.Process(node.process.pid).num_threads()
        for _ in range(3):
            assert not change(rig, Transition.TRANSITION_ACTIVATE)
        rig.until_state("fault", "deaf")
        assert psutil.Process(node.process.pid).num_threads() == threads, "a worker stays"
        assert rig.node.count_subscribers("/CAM_FRONT/image_rect_compressed") == 0, "a subscription stays"
        assert change(rig, Transition.TRANSITION_CLEANUP)
        assert rig.set_parameter("preset", "nuscenes").successful
        assert change(rig, Transition.TRANSITION_CONFIGURE)
        assert change(rig, Transition.TRANSITION_ACTIVATE)
        rig.until_heard()
        rig.whole()
    finally:
        rig.close()
    assert node.stop() == 0
