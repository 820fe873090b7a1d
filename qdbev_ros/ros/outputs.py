# SPDX-License-Identifier: Apache-2.0
"""The detector's publishers."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.qos import QoSProfile
from vision_msgs.msg import Detection3DArray
from visualization_msgs.msg import MarkerArray

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.lifetime import MarkerLifetime
from qdbev_ros.core.memory import MemoryInput
from qdbev_ros.ros.encode import check_definition, encode_detections, encode_markers, encode_objects
from qdbev_ros.ros.messages import Answer
from qdbev_ros.ros.parameters import DetectorParameters

# What the installed message definitions are tried with.
EXAMPLE = Boxes(
    np.zeros((1, 3)), np.ones((1, 3)), np.zeros(1), np.ones((1, 2)), np.ones(1), np.zeros(1, np.int64)
)
EXAMPLE_ANSWER = Answer(
    1, 0.0, EXAMPLE, ("a",), {"b": "c"}, None, MemoryInput(np.zeros(18, np.float32), None, 0, 0.0, None)
)


class Outputs:
    """~/detections, ~/markers and, where qdbev_msgs is installed, ~/objects. What nobody hears is not made."""

    def __init__(self, node: Node, parameters: DetectorParameters, model: str) -> None:
        """Raises ConfigError where a message is defined otherwise on this machine."""
        self.parameters = parameters  # live ones may be replaced
        self._node = node
        self._model = model
        self._kind: Any = None
        try:
            self._kind = importlib.import_module("qdbev_msgs.msg").DetectedObjectArray
        except ImportError:
            node.get_logger().info("qdbev_msgs is not installed: ~/objects is off")
        check_definition(Detection3DArray, encode_detections(1, "f", EXAMPLE))
        check_definition(MarkerArray, encode_markers(1, "f", EXAMPLE, 1, 1.0))
        quality = QoSProfile(depth=50)
        self._detections = node.create_publisher(Detection3DArray, "~/detections", quality)
        self._markers = node.create_publisher(MarkerArray, "~/markers", quality)
        self._objects: Any = None
        if self._kind is not None:
            check_definition(self._kind, encode_objects(self._kind, "f", EXAMPLE, "m", EXAMPLE_ANSWER))
            self._objects = node.create_publisher(self._kind, "~/objects", quality)
        self._marked = 0
        self._lifetime = MarkerLifetime()

    def publish(self, answer: Answer) -> None:
        """One set's result; an empty array too, because silence would mean something else."""
        parameters, boxes = self.parameters, answer.boxes
        stamp, frame = answer.stamp_ns, parameters.model_frame
        chosen = boxes.select(boxes.scores >= parameters.score_threshold)
        chosen = chosen.select(slice(parameters.max_detections))
        _send(self._detections, lambda: encode_detections(stamp, frame, chosen))
        if self._objects is not None:
            _send(self._objects, lambda: encode_objects(self._kind, frame, chosen, self._model, answer))
        shown = boxes.select(boxes.scores >= parameters.display_threshold)
        marked, self._marked = self._marked, len(shown)
        seconds = self._lifetime.after(time.monotonic(), stamp * 1e-9)
        _send(self._markers, lambda: encode_markers(stamp, frame, shown, marked, seconds))

    def close(self) -> None:
        """Ends all publishers."""
        for publisher in (self._detections, self._markers, self._objects):
            if publisher is not None:
                self._node.destroy_publisher(publisher)


def _send(publisher: Any, encode: Callable[[], bytes]) -> None:
    if publisher.get_subscription_count():
        publisher.publish(encode())
