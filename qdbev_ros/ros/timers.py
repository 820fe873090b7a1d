# SPDX-License-Identifier: Apache-2.0
"""Timers of real time: with use_sim_time a node's own ones stand still whenever /clock does, or never came."""

from __future__ import annotations

from collections.abc import Callable

from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.timer import Timer


def every(node: Node, seconds: float, callback: Callable[[], None]) -> Timer:
    """Calls back every `seconds` of time.monotonic(), in the node's executor."""
    return node.create_timer(seconds, callback, clock=Clock(clock_type=ClockType.STEADY_TIME))
