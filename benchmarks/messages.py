# SPDX-License-Identifier: Apache-2.0
"""What one answer costs to build and publish: by rclpy's message objects, and as the node encodes it. In turns.

Example: python -m benchmarks.messages --boxes 300 --markers 40 --turns 60
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from qdbev_msgs import msg as kinds
from rclpy.qos import QoSProfile
from std_msgs.msg import Header
from vision_msgs.msg import Detection3DArray
from visualization_msgs.msg import MarkerArray

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.files import write_json
from qdbev_ros.core.memory import MemoryInput
from qdbev_ros.core.variant import CAMERAS, CLASSES
from qdbev_ros.ros.domain import free_domain
from qdbev_ros.ros.encode import encode_detections, encode_markers, encode_objects
from qdbev_ros.ros.messages import Answer, ns_to_stamp
from tests.ros import plain_messages

STAMP, FRAME, MODEL = 1_700_000_000_123_456_789, "LIDAR_TOP", "nano"
KINDS = {"detections": Detection3DArray, "objects": kinds.DetectedObjectArray, "markers": MarkerArray}
WAYS = ("rclpy", "encoded")


def made_boxes(count: int) -> Boxes:
    rng = np.random.default_rng(0)
    return Boxes(
        rng.normal(0, 20, (count, 3)), rng.uniform(0.5, 5, (count, 3)), rng.uniform(-3, 3, count),
        rng.normal(0, 3, (count, 2)), np.sort(rng.uniform(0, 1, count))[::-1], rng.integers(0, len(CLASSES), count),
    )  # fmt: skip


def builders(boxes: Boxes, markers: int) -> dict[tuple[str, str], Callable[[], Any]]:
    """(topic, way) -> what builds the message; encoded markers have texts that no marker had before."""
    memory = MemoryInput(np.zeros(18, np.float32), None, 3, 0.5, None)
    answer = Answer(STAMP, 0.03, boxes, CAMERAS, {}, None, memory)
    header, shown = Header(stamp=ns_to_stamp(STAMP), frame_id=FRAME), boxes.select(slice(markers))
    kind = kinds.DetectedObjectArray
    return {
        ("detections", "rclpy"): lambda: plain_messages.detection_array(header, boxes),
        ("detections", "encoded"): lambda: encode_detections(STAMP, FRAME, boxes),
        ("objects", "rclpy"): lambda: plain_messages.object_array(kinds, header, boxes, MODEL, answer),
        ("objects", "encoded"): lambda: encode_objects(kind, FRAME, boxes, MODEL, answer),
        ("markers", "rclpy"): lambda: plain_messages.marker_array(header, shown, markers, 1.0),
        ("markers", "encoded"): lambda: encode_markers(STAMP, FRAME, shown, markers, 1.0),
    }


def measure(boxes: int, markers: int, turns: int) -> dict[tuple[str, str], dict[str, list[float]]]:
    """(topic, way) -> milliseconds of processor time of this thread, to build and to publish, of each turn."""
    rclpy.init(domain_id=free_domain())
    node = rclpy.create_node("messages")
    quality = QoSProfile(depth=10)
    publishers = {name: node.create_publisher(kind, name, quality) for name, kind in KINDS.items()}
    listeners = [
        node.create_subscription(k, name, lambda _: None, quality, raw=True) for name, k in KINDS.items()
    ]
    while not all(publisher.get_subscription_count() for publisher in publishers.values()):
        time.sleep(0.01)
    build = builders(made_boxes(boxes), markers)
    found: dict[tuple[str, str], dict[str, list[float]]] = {
        key: {"build": [], "publish": []} for key in build
    }
    for _ in range(turns):
        for (name, way), make in build.items():
            begin = time.thread_time()
            message = make()
            built = time.thread_time()
            publishers[name].publish(message)
            found[name, way]["build"].append((built - begin) * 1e3)
            found[name, way]["publish"].append((time.thread_time() - built) * 1e3)
    assert len(listeners) == len(publishers)
    rclpy.shutdown()
    return found


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.messages", description=__doc__)
    parser.add_argument("--boxes", type=int, default=300, help="boxes of an answer (default: %(default)s)")
    parser.add_argument(
        "--markers", type=int, default=40, help="of them shown as markers (default: %(default)s)"
    )
    parser.add_argument("--turns", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all milliseconds there")
    args = parser.parse_args(words)
    found = measure(args.boxes, args.markers, args.turns)
    print("| topic | way | build ms | publish ms | together |\n|---|---|---|---|---|")
    rows = [(name, way, parts["build"], parts["publish"]) for (name, way), parts in found.items()]
    for way in WAYS:
        chosen = [row for row in rows if row[1] == way]
        rows.append(("all three", way, *([sum(t) for t in zip(*(row[k] for row in chosen))] for k in (2, 3))))
    for name, way, build, publish in rows:
        both = [a + b for a, b in zip(build, publish)]
        cells = [f"{statistics.median(part):.2f} [{min(part):.2f}]" for part in (build, publish, both)]
        print(f"| {name} | {way} | {' | '.join(cells)} |")
    if args.json:
        write_json(args.json, {f"{name}.{way}": parts for (name, way), parts in found.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
