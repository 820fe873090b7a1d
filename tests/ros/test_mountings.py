# SPDX-License-Identifier: Apache-2.0
"""Frames that are in the calibration file alone are told to everyone else, so that RViz can show the boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rclpy.qos import DurabilityPolicy, QoSProfile
from tf2_msgs.msg import TFMessage

from qdbev_ros.ros.calibration_file import load_calibration
from qdbev_ros.ros.messages import pose_from_transform
from tests.ros.graph import Graph
from tests.ros.rig import TIMING, Rig
from tests.small_master import write_small_package


def test_what_only_the_calibration_file_places_is_on_tf_static_and_nothing_else_is(
    graph: Graph, calibration: Path, tmp_path: Path
) -> None:
    """The vehicle tells of all cameras but one, and not of the model frame."""
    pytest.importorskip("qdbev_msgs", reason="qdbev_msgs tells which cameras were used")
    write_small_package(tmp_path / "small.qdbev")
    content = yaml.safe_load(calibration.read_text())
    for camera in content["cameras"].values():
        del camera["intrinsics"]
    places = tmp_path / "places.yaml"
    places.write_text(yaml.safe_dump(content))
    given = {"model": tmp_path / "small.qdbev", "calibration": places, "model_frame": "ROOF"}
    node = graph.node("detector_node", **given, image_reliability="reliable", **TIMING)
    node.wait_for("ready")
    with Rig(graph, node, mounted=False) as rig:
        rig.mount({}, {"CAM_BACK": "elsewhere"})
        heard: list[dict[str, Any]] = []

        def hear(message: TFMessage) -> None:
            heard.append({transform.child_frame_id: transform for transform in message.transforms})

        latched = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        rig.node.create_subscription(TFMessage, "/tf_static", hear, latched)
        rig.until(lambda: any("elsewhere" in told for told in heard), "the rig never told of its cameras")
        rig.ask()
        rig.set_parameter("tf_timeout", 0.01)  # the node's patience with what others may tell
        rig.until(lambda: any("ROOF" in told for told in heard), "the node never told of the model frame")
        (told,) = (told for told in heard if "ROOF" in told)
        assert set(told) == {"ROOF", "CAM_BACK"}
        file = load_calibration(places)
        for frame, pose in (("ROOF", file.model), ("CAM_BACK", file.extrinsics["CAM_BACK"])):
            assert pose is not None
            assert told[frame].header.frame_id == "base_link"
            found = pose_from_transform(told[frame].transform)
            np.testing.assert_allclose(found.matrix(), pose.matrix(), atol=1e-6)
        ours = [
            i for i in rig.node.get_publishers_info_by_topic("/tf_static") if i.node_name == "qdbev_detector"
        ]
        assert [i.qos_profile.durability for i in ours] == [DurabilityPolicy.TRANSIENT_LOCAL]
