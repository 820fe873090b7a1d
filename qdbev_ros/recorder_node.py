# SPDX-License-Identifier: Apache-2.0
"""The node qdbev_recorder: writes topics into one MCAP file, raw, for machines without rosbag2.

Example: ros2 run qdbev_ros recorder_node --ros-args -p output:=run.mcap -p topics:="/tf /odom"
"""

from __future__ import annotations

import importlib
import sys
import time
from functools import partial

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from qdbev_ros.core.errors import ConfigError, DataError
from qdbev_ros.ros.parameters import RecorderParameters, declare
from qdbev_ros.ros.process import run
from qdbev_ros.ros.timers import every

NODE_NAME = "qdbev_recorder"
QUIET_S = 0.5  # after a stop: nothing came for so long, so nothing will


class Recorder:
    """Subscribes to each topic when its publisher appears, with the quality of service that it offers."""

    grace_s = 6.0

    def __init__(self) -> None:
        from qdbev_ros.ros.bags import BagWriter

        self.node = Node(NODE_NAME)
        parameters = declare(self.node, RecorderParameters)
        if not parameters.output or not parameters.topics:
            raise ConfigError(
                "parameters output and topics must be given: what to record, and into which .mcap file"
            )
        self._wanted = set(parameters.topics.split())
        self._writer = BagWriter(parameters.output)
        self._count = 0
        self._last = time.monotonic()
        every(self.node, 0.05, self._discover)

    def finished(self) -> bool:
        return False

    def idle(self) -> bool:
        return time.monotonic() - self._last > QUIET_S

    def close(self) -> None:
        self._writer.close()
        self.node.get_logger().info(f"recorded {self._count} messages into {self._writer.path}")

    def _discover(self) -> None:
        """Subscribes to wanted topics that somebody publishes by now."""
        if not self._wanted:
            return
        types = dict(self.node.get_topic_names_and_types())
        for topic in sorted(self._wanted & set(types)):
            publishers = self.node.get_publishers_info_by_topic(topic)
            if not publishers:
                continue
            self._wanted.discard(topic)
            msgtype = types[topic][0]
            package, _, name = msgtype.split("/")
            offered = [info.qos_profile for info in publishers]
            latched = all(q.durability == DurabilityPolicy.TRANSIENT_LOCAL for q in offered)
            reliable = all(q.reliability == ReliabilityPolicy.RELIABLE for q in offered)
            quality = QoSProfile(
                depth=200,
                durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
                reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
            )
            try:
                kind = getattr(importlib.import_module(f"{package}.msg"), name)
                self._writer.add_topic(topic, msgtype, latched)
            except (ImportError, AttributeError, DataError) as error:
                self.node.get_logger().warning(f"{topic} is not recorded: {error}")
                continue
            self.node.create_subscription(kind, topic, partial(self._on_message, topic), quality, raw=True)

    def _on_message(self, topic: str, data: bytes) -> None:
        self._last = time.monotonic()
        self._count += 1
        self._writer.write(topic, self.node.get_clock().now().nanoseconds, data)


def main() -> int:
    return run("recorder_node", Recorder)


if __name__ == "__main__":
    sys.exit(main())
