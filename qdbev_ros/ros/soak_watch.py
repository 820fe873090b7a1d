# SPDX-License-Identifier: Apache-2.0
"""Looks at a running detector from outside: what it is sent, what it answers, what its diagnostics say."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile
from rclpy.signals import SignalHandlerOptions
from rclpy.subscription import Subscription
from sensor_msgs.msg import CameraInfo
from vision_msgs.msg import Detection3DArray

from qdbev_ros.bringup import DETECTOR
from qdbev_ros.core.synchroniser import Synchroniser, SyncSettings
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.diagnostics import PIPELINE
from qdbev_ros.ros.presets import TopicPreset

STAMP = struct.Struct("<4xiI")  # CDR's own header, then std_msgs/Header.stamp
LOST_AFTER_S = 5.0  # a set without an answer for so long counts as lost
SETS_DEADLINE_S = 0.8


class Watch:
    """Counts sets by the CameraInfo of their pictures, which are published next to them and are small.

    Times are those at which DDS took a message over, as its sender noted them: this process may be late on a busy
    machine. Only sets of all cameras count, from the first answer on: before it the node may still be loading.
    """

    def __init__(self, preset: TopicPreset) -> None:
        rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
        self._node = rclpy.create_node("qdbev_soak")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._sync: Synchroniser[None] = Synchroniser(CAMERAS, SyncSettings(deadline_s=SETS_DEADLINE_S))
        self._open: dict[
            int, float
        ] = {}  # stamp of a set without an answer -> when its last picture was sent
        self._early: dict[
            int, float
        ] = {}  # stamp of an answer that was heard before its set -> when it was sent
        self.lost = 0
        self.latencies_ms: list[float] = []
        self.status: dict[str, str] = {}  # of the pipeline, as diagnostics told it last
        for camera in CAMERAS:
            self._listen(CameraInfo, preset.info_topic(camera), partial(self._on_info, camera))
        self._listen(Detection3DArray, f"/{DETECTOR}/detections", self._on_answer)
        self._node.create_subscription(
            DiagnosticArray, "/diagnostics", self._on_diagnostics, QoSProfile(depth=10)
        )

    def close(self) -> None:
        self._executor.shutdown()
        self._node.destroy_node()
        rclpy.try_shutdown()

    @property
    def answered(self) -> int:
        return len(self.latencies_ms)

    @property
    def sent(self) -> int:
        """Sets that were answered or lost; those that may still be answered are left out."""
        return self.answered + self.lost

    def spin(self, seconds: float) -> None:
        """Listens for so long, then counts what is lost."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=left)
        if not self.answered:
            return
        before = time.time() - LOST_AFTER_S
        count = len(self._open)
        self._open = {stamp: since for stamp, since in self._open.items() if since > before}
        self._early = {stamp: since for stamp, since in self._early.items() if since > before}
        self.lost += count - len(self._open)

    def _listen(self, kind: Any, topic: str, hear: Callable[[bytes, float], None]) -> None:
        """hear(CDR bytes, seconds of the system's clock). Humble doesn't tell the sender's time."""

        def with_time(data: bytes, info: dict[str, int]) -> None:
            hear(data, info["source_timestamp"] * 1e-9)

        def without_time(data: bytes) -> None:
            hear(data, time.time())

        hears = with_time if hasattr(Subscription, "CallbackType") else without_time
        self._node.create_subscription(kind, topic, hears, QoSProfile(depth=500), raw=True)

    def _on_info(self, camera: str, data: bytes, sent_s: float) -> None:
        for frames in self._sync.add(camera, _stamp_ns(data), None, sent_s):
            if frames.missing:
                continue
            complete_s = max(image.arrived_s for image in frames.images.values())
            answered_s = self._early.pop(frames.stamp_ns, None)
            if answered_s is None:
                self._open[frames.stamp_ns] = complete_s
            else:
                self.latencies_ms.append((answered_s - complete_s) * 1e3)

    def _on_answer(self, data: bytes, sent_s: float) -> None:
        stamp = _stamp_ns(data)
        if not self.answered:
            self._open = {other: since for other, since in self._open.items() if other >= stamp}
        complete_s = self._open.pop(stamp, None)
        if complete_s is None:
            self._early[stamp] = sent_s
        else:
            self.latencies_ms.append((sent_s - complete_s) * 1e3)

    def _on_diagnostics(self, message: Any) -> None:
        for status in message.status:
            if status.name == PIPELINE:
                self.status = {pair.key: pair.value for pair in status.values}


def _stamp_ns(data: bytes) -> int:
    seconds, nanoseconds = STAMP.unpack_from(data)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)
