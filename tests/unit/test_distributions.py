# SPDX-License-Identifier: Apache-2.0
"""The node's messages are laid out alike in every ROS 2 that it is for, by the definitions that rosbags carries.

vision_msgs, which rosbags lacks, has had the same Detection3DArray from 4.0.0 on, the release of Humble.
"""

from __future__ import annotations

import pytest
from rosbags.typesys import Stores, get_typestore

MESSAGES = (
    "builtin_interfaces/msg/Time",
    "diagnostic_msgs/msg/DiagnosticArray",
    "geometry_msgs/msg/PoseStamped",
    "lifecycle_msgs/msg/State",
    "nav_msgs/msg/Odometry",
    "rcl_interfaces/msg/ParameterDescriptor",
    "rcl_interfaces/msg/SetParametersResult",
    "rosgraph_msgs/msg/Clock",
    "sensor_msgs/msg/CameraInfo",
    "sensor_msgs/msg/CompressedImage",
    "sensor_msgs/msg/Image",
    "tf2_msgs/msg/TFMessage",
    "visualization_msgs/msg/MarkerArray",
)


@pytest.mark.parametrize(
    "other", [Stores.ROS2_HUMBLE, Stores.ROS2_KILTED, Stores.ROS2_LYRICAL], ids=lambda s: s.value
)
def test_messages_are_laid_out_as_in_jazzy(other: Stores) -> None:
    here, there = get_typestore(Stores.ROS2_JAZZY), get_typestore(other)
    assert {m: there.hash_rihs01(m) for m in MESSAGES} == {m: here.hash_rihs01(m) for m in MESSAGES}
