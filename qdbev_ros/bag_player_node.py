# SPDX-License-Identifier: Apache-2.0
"""The node qdbev_bag_player: plays a bag's raw messages in real time, for machines without rosbag2.

Example: ros2 run qdbev_ros bag_player_node --ros-args -p bag:=demo/town.mcap
"""

from __future__ import annotations

import importlib
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rosgraph_msgs.msg import Clock
from vision_msgs.msg import Detection3DArray

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.ros.messages import ns_to_stamp
from qdbev_ros.ros.parameters import PlayerParameters, declare
from qdbev_ros.ros.presets import TopicPreset, load_preset
from qdbev_ros.ros.process import run
from qdbev_ros.ros.timers import every

NODE_NAME = "qdbev_bag_player"
CLOCK_PERIOD_S = 0.025
SETTLE_S = 1.0  # after the last match for the other side to know of it, and between passes and after the end
BEHIND_S = 1.0  # an endless drive that is further behind goes on from where it is
STAMP = struct.Struct(
    "<4xiI"
)  # CDR's own header, then std_msgs/Header.stamp, which comes first in both types read here


class Player:
    """Waits for its listeners, plays at the recorded pace, lingers, ends."""

    grace_s = 0.0

    def __init__(self) -> None:
        from qdbev_ros.ros.bags import BagReader
        from qdbev_ros.ros.endless import Endless

        self.node = Node(NODE_NAME)
        self._parameters = declare(self.node, PlayerParameters)
        if not self._parameters.bag:
            raise ConfigError("parameter bag is empty: give a bag, e.g. --ros-args -p bag:=demo/town.mcap")
        preset = load_preset(self._parameters.preset)
        self._bag = BagReader(self._parameters.bag)
        self._require_pictures(preset)
        self._endless = Endless(self._bag, preset) if self._parameters.endless else None
        self._publishers = self._advertise()
        self._clock = self.node.create_publisher(Clock, "/clock", 10) if self._parameters.clock else None
        known = {*self._publishers, self._parameters.answers}
        self._awaited = [t for t in self._parameters.wait_for.split() or preset.image_topics() if t in known]
        self._messages: Iterator[tuple[str, int, bytes]] | None = None
        self._next: tuple[str, int, bytes] | None = None
        self._origin = (0, 0.0)  # bag time in ns, monotonic seconds
        self._wait_until = time.monotonic() + self._parameters.wait
        self._start_at: float | None = None
        self._end_at: float | None = None
        self._passes = 0
        self._image_topics = set(preset.image_topics())
        self._cut: set[str] = set()  # topics of which a message was too short
        self._newest = (0, 0)  # stamp of the pictures played
        self._answered = (0, 0)  # stamp of the newest answer
        # One picture of it stands for a set. The first one: to hold in the middle of a set would tear it apart.
        self._counted = self._bag.first_topic(preset.image_topics())
        self._unanswered: deque[tuple[int, int]] = deque()  # its stamps
        self._held_since: float | None = None
        if self._parameters.answers:
            self._listen(self._parameters.answers)
        self._timer = every(self.node, 0.01, self._tick)
        if self._clock is not None:
            every(self.node, CLOCK_PERIOD_S, self._publish_clock)

    def finished(self) -> bool:
        return self._end_at is not None and time.monotonic() >= self._end_at

    def idle(self) -> bool:
        return True

    def close(self) -> None:
        self._bag.close()

    def _require_pictures(self, preset: TopicPreset) -> None:
        """Says what the bag lacks; refuses it only where no camera is left. CameraInfo may come from a file."""
        missing = self._bag.missing_topics(preset)
        if set(preset.image_topics()) <= set(missing):
            self._bag.require_cameras(preset)
        if missing:
            self.node.get_logger().warning(
                f"bag {self._bag.path} lacks {', '.join(missing)} (preset {preset.name}): playing what is there"
            )

    def _advertise(self) -> dict[str, Any]:
        """A publisher for every topic whose type is installed; static transforms stay for late listeners."""
        publishers = {}
        for topic, msgtype in self._bag.types.items():
            if topic == "/clock" or (self._endless is not None and topic not in self._endless.topics):
                continue
            package, _, name = msgtype.split("/")
            try:
                kind = getattr(importlib.import_module(f"{package}.msg"), name)
            except (ImportError, AttributeError):
                self.node.get_logger().warning(
                    f"{topic} is left out: message type {msgtype} is not installed"
                )
                continue
            quality = QoSProfile(depth=100)
            if topic == "/tf_static":
                quality.durability = DurabilityPolicy.TRANSIENT_LOCAL
            publishers[topic] = self.node.create_publisher(kind, topic, quality)
        return publishers

    def _tick(self) -> None:
        """Every 10 ms: publishes all that is due."""
        now = time.monotonic()
        if self._end_at is not None or not self._ready(now):
            return
        if self._messages is None:
            # The end of a pass is worked off before the next one starts.
            if self._endless is None and self._hold(now, 0, 1):
                return
            self._rewind(now)
        if self._endless is not None and self._next is not None and now - self._due(self._next[1]) > BEHIND_S:
            self._origin = (
                self._next[1],
                now,
            )  # like cameras: what a standing machine missed is not made up for
        while self._next is not None and self._due(self._next[1]) <= now:
            topic, bag_ns, data = self._next
            if topic == self._counted and self._hold(now, bag_ns, self._parameters.max_ahead):
                return
            self._play(topic, data)
            self._next = next(self._messages, None) if self._messages is not None else None
        if self._next is None:
            self._messages = None
            self._passes += 1
            if self._endless is not None:
                self._start_at = now
            elif self._parameters.loop:
                self._start_at = self._leave_at(now) if self._parameters.max_ahead else now + SETTLE_S
            else:
                self.node.get_logger().info("end of the bag")
                self._end_at = self._leave_at(now)

    def _play(self, topic: str, data: bytes) -> None:
        """Publishes a message; one that was cut off and cannot be a picture is left out, which is told once a topic."""
        if topic in self._image_topics and len(data) < STAMP.size:
            if topic not in self._cut:
                self.node.get_logger().warning(
                    f"{topic}: {len(data)} bytes are too short for a picture: left out"
                )
            self._cut.add(topic)
            return
        if self._endless is not None:
            data = self._endless.message(topic, data, self._passes)
        if topic in self._publishers:
            self._publishers[topic].publish(data)
        if topic in self._image_topics:
            self._newest = max(self._newest, STAMP.unpack_from(data))
        if topic == self._counted:
            self._unanswered.append(STAMP.unpack_from(data))

    def _hold(self, now: float, bag_ns: int, limit: int) -> bool:
        """Whether the next set must wait for there to be less than `limit` open; if so, the bag's time stands still."""
        if not self._parameters.max_ahead or len(self._unanswered) < limit:
            self._held_since = None
            return False
        if self._held_since is None:
            self._held_since = now
        if now - self._held_since > self._parameters.linger:
            count = len(self._unanswered)
            self.node.get_logger().warning(f"{count} sets without an answer: playing on")
            self._unanswered.clear()
        self._origin = (bag_ns, now)
        return True

    def _listen(self, topic: str) -> None:
        quality = QoSProfile(depth=100)
        self.node.create_subscription(Detection3DArray, topic, self._on_answer, quality, raw=True)

    def _on_answer(self, data: bytes) -> None:
        """Each answer prolongs the stay, that to the newest pictures ends it."""
        stamp = STAMP.unpack_from(data)
        self._answered = max(self._answered, stamp)
        while self._unanswered and self._unanswered[0] <= stamp:
            self._unanswered.popleft()
        if self._end_at is not None:
            self._end_at = self._leave_at(time.monotonic())
        elif self._passes and self._messages is None and self._parameters.max_ahead:
            self._start_at = self._leave_at(time.monotonic())

    def _leave_at(self, now: float) -> float:
        done = bool(self._parameters.answers) and self._answered >= self._newest
        return now + (SETTLE_S if done else self._parameters.linger)

    def _ready(self, now: float) -> bool:
        """Whether the listeners are there, or were waited for long enough."""
        if self._start_at is None:
            lonely = [topic for topic in self._awaited if not self._listeners(topic)]
            if lonely and now < self._wait_until:
                return False
            if lonely:
                waited = f"{self._parameters.wait:g} s"
                self.node.get_logger().warning(
                    f"nobody listens to {', '.join(lonely)} after {waited}: playing anyway"
                )
            self._start_at = now + SETTLE_S
        return now >= self._start_at

    def _listeners(self, topic: str) -> int:
        """Subscriptions to a topic of the bag, or to the answers besides the player's own."""
        if topic in self._publishers:
            return int(self._publishers[topic].get_subscription_count())
        return self.node.count_subscribers(topic) - 1

    def _rewind(self, now: float) -> None:
        self._messages = self._bag.raw() if self._endless is None else iter(self._endless.messages)
        self._next = next(self._messages, None)
        first_ns = self._next[1] if self._next else 0
        if self._endless is not None and self._passes:
            self._origin = (first_ns, self._due(first_ns + self._endless.period_ns))
        else:
            self._newest = self._answered = (0, 0)
            self._unanswered.clear()
            self._origin = (first_ns, now)
        self.node.get_logger().info(
            f"playing {self._parameters.bag}, {self._bag.duration_s:.1f} s at rate {self._parameters.rate:g}"
            + (f", pass {self._passes + 1}" if self._parameters.loop else "")
        )

    def _due(self, bag_ns: int) -> float:
        return self._origin[1] + (bag_ns - self._origin[0]) * 1e-9 / self._parameters.rate

    def _publish_clock(self) -> None:
        """The bag's time now; stands still before the start and after the end."""
        if self._clock is None or self._messages is None:
            return
        elapsed = (time.monotonic() - self._origin[1]) * self._parameters.rate
        passed = 0 if self._endless is None else self._passes * self._endless.period_ns
        self._clock.publish(Clock(clock=ns_to_stamp(self._origin[0] + round(elapsed * 1e9) + passed)))


def main() -> int:
    return run("bag_player_node", Player)


if __name__ == "__main__":
    sys.exit(main())
