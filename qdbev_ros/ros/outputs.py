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

from qdbev_ros.ros.messages import Answer, detection_array, marker_array, ns_to_stamp, object_array
from qdbev_ros.ros.parameters import DetectorParameters

MIN_LIFETIME_S = 1.0  # markers must outlive the time to the next set, or they flicker


class Outputs:
    """~/detections, ~/markers and, where qdbev_msgs is installed, ~/objects."""

    def __init__(self, node: Node, parameters: DetectorParameters, model: str) -> None:
        self.parameters = parameters  # live ones may be replaced
        self._node = node
        self._model = model
        quality = QoSProfile(depth=50)
        self._detections = node.create_publisher(Detection3DArray, "~/detections", quality)
        self._markers = node.create_publisher(MarkerArray, "~/markers", quality)
        self._marked = 0
        self._published: deque[float] = deque(maxlen=10)
        self._objects: Any = None
        try:
            self._kinds: Any = importlib.import_module("qdbev_msgs.msg")
            self._objects = node.create_publisher(self._kinds.DetectedObjectArray, "~/objects", quality)
        except ImportError:
            self._kinds = None
            node.get_logger().info("qdbev_msgs is not installed: ~/objects is off")

    def publish(self, answer: Answer) -> None:
        """One set's result; an empty array too, because silence would mean something else."""
        parameters, boxes = self.parameters, answer.boxes
        header = Header(stamp=ns_to_stamp(answer.stamp_ns), frame_id=parameters.model_frame)
        chosen = boxes.select(boxes.scores >= parameters.score_threshold)
        chosen = chosen.select(slice(parameters.max_detections))
        self._detections.publish(detection_array(header, chosen))
        if self._kinds is not None:
            self._objects.publish(object_array(self._kinds, header, chosen, self._model, answer))
        shown = boxes.select(boxes.scores >= parameters.display_threshold)
        self._published.append(time.monotonic())
        self._markers.publish(marker_array(header, shown, self._marked, self._lifetime_s()))
        self._marked = len(shown)

    def close(self) -> None:
        """Ends all publishers."""
        for publisher in (self._detections, self._markers, self._objects):
            if publisher is not None:
                self._node.destroy_publisher(publisher)

    def _lifetime_s(self) -> float:
        """Three periods, but no less than MIN_LIFETIME_S."""
        if len(self._published) < 2:
            return 2 * MIN_LIFETIME_S
        period = (self._published[-1] - self._published[0]) / (len(self._published) - 1)
        return max(MIN_LIFETIME_S, 3 * period)
