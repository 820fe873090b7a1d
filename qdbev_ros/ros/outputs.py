# SPDX-License-Identifier: Apache-2.0
"""The detector's publishers."""

from __future__ import annotations

import importlib
import time
from collections import deque
from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSProfile
from std_msgs.msg import Header
from vision_msgs.msg import Detection3DArray
from visualization_msgs.msg import MarkerArray

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.memory import MemoryInput
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.messages import detection_array, marker_array, ns_to_stamp, object_array
from qdbev_ros.ros.parameters import DetectorParameters

MIN_LIFETIME_S = 1.0  # markers must outlive the time to the next set, or they flicker


class Outputs:
    """~/detections, ~/markers and, where qdbev_msgs is installed, ~/objects."""

    def __init__(self, node: Node, parameters: DetectorParameters, model: str) -> None:
        self._parameters = parameters
        self._model = model
        quality = QoSProfile(depth=50)
        self._detections = node.create_publisher(Detection3DArray, "~/detections", quality)
        self._markers = node.create_publisher(MarkerArray, "~/markers", quality)
        self._marked = 0
        self._published: deque[float] = deque(maxlen=10)
        self.sets = 0
        try:
            self._kinds: Any = importlib.import_module("qdbev_msgs.msg")
            self._objects = node.create_publisher(self._kinds.DetectedObjectArray, "~/objects", quality)
        except ImportError:
            self._kinds = None
            node.get_logger().info("qdbev_msgs is not installed: ~/objects is off")

    def publish(self, stamp_ns: int, boxes: Boxes, used: list[str], memory: MemoryInput) -> None:
        """One set's result; an empty array too, because silence would mean something else."""
        header = Header(stamp=ns_to_stamp(stamp_ns), frame_id=self._parameters.model_frame)
        chosen = boxes.select(boxes.scores >= self._parameters.score_threshold)
        chosen = chosen.select(slice(self._parameters.max_detections))
        self._detections.publish(detection_array(header, chosen))
        if self._kinds is not None:
            missing = [camera for camera in CAMERAS if camera not in used]
            message = object_array(self._kinds, header, chosen, self._model, used, missing, memory)
            self._objects.publish(message)
        shown = boxes.select(boxes.scores >= self._parameters.display_threshold)
        self._published.append(time.monotonic())
        self._markers.publish(marker_array(header, shown, self._marked, self._lifetime_s()))
        self._marked = len(shown)
        self.sets += 1

    def _lifetime_s(self) -> float:
        """Three periods, but no less than MIN_LIFETIME_S."""
        if len(self._published) < 2:
            return 2 * MIN_LIFETIME_S
        period = (self._published[-1] - self._published[0]) / (len(self._published) - 1)
        return max(MIN_LIFETIME_S, 3 * period)
