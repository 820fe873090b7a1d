# SPDX-License-Identifier: Apache-2.0
"""Watches live topics for a while, for the doctor."""

from __future__ import annotations

import importlib
import time
from functools import partial
from typing import Any

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions

from qdbev_ros.core.doctor import Drive
from qdbev_ros.core.errors import DataError
from qdbev_ros.ros.calibration_file import RigCalibration
from qdbev_ros.ros.observe import Observer, best_preset
from qdbev_ros.ros.presets import TopicPreset

NODE_NAME = "qdbev_doctor"
DISCOVERY_S = 10.0  # patience with the first picture topic
SETTLE_S = 1.0  # then for the other topics to be found
LOOK_EVERY = 6  # decoding costs time in which messages wait


def observe_live(
    seconds: float, preset: TopicPreset | None, calibration: RigCalibration | None
) -> tuple[str, Drive]:
    """Listens for `seconds`. (the preset's name, what was seen); raises DataError where nobody publishes pictures."""
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = Node(NODE_NAME)
        try:
            types = _discover(node)
            preset = preset or best_preset(types)
            observer = Observer(preset, types, calibration, LOOK_EVERY)
            _subscribe(node, observer)
            _spin(node, seconds)
        finally:
            node.destroy_node()
    finally:
        rclpy.try_shutdown()
    return preset.name, observer.drive


def _discover(node: Node) -> dict[str, str]:
    """topic -> type of what is published, when pictures are among it."""
    deadline = time.monotonic() + DISCOVERY_S
    while time.monotonic() < deadline:
        time.sleep(SETTLE_S)
        found = {
            name: kinds[0] for name, kinds in node.get_topic_names_and_types() if node.count_publishers(name)
        }
        if any(
            kind in ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage") for kind in found.values()
        ):
            return found
    raise DataError(
        f"nobody published a picture topic within {DISCOVERY_S:g} s: start the cameras, and check ROS_DOMAIN_ID"
    )


def _subscribe(node: Node, observer: Observer) -> None:
    for topic, msgtype in observer.topics.items():
        package, _, name = msgtype.split("/")
        kind = getattr(importlib.import_module(f"{package}.msg"), name)
        quality = QoSProfile(depth=200, reliability=ReliabilityPolicy.BEST_EFFORT)
        if topic == "/tf_static":
            quality = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        node.create_subscription(kind, topic, partial(_take, observer, topic), quality)


def _take(observer: Observer, topic: str, message: Any) -> None:
    observer.add(topic, time.time_ns(), message)


def _spin(node: Node, seconds: float) -> None:
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            executor.spin_once(timeout_sec=0.05)
    finally:
        executor.shutdown()
