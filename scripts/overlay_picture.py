# SPDX-License-Identifier: Apache-2.0
"""Makes docs/pictures/overlay.jpg: a picture of ~/overlay/compressed as the node publishes it over the demo bag.

Example: python scripts/overlay_picture.py --at 13.5
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import rclpy
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage

from qdbev_ros.bringup import DETECTOR
from qdbev_ros.core.files import whole_file
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.domain import free_domain
from qdbev_ros.ros.messages import stamp_to_ns
from qdbev_ros.ros.presets import load_preset
from qdbev_ros.ros.recording import read_sets

PATIENCE_S = 900.0
# Patient, and one set at a time: the picture is the same however slow the machine is.
NODE = {"image_reliability": "reliable", "sync_deadline": 10.0, "tf_timeout": 10.0, "overlay_rate": 60.0}
PLAYER = {"answers": f"/{DETECTOR}/detections", "max_ahead": 1, "linger": 60.0, "wait": 300.0}


def start(module: str, **parameters: Any) -> subprocess.Popen[bytes]:
    words = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
    return subprocess.Popen([sys.executable, "-m", f"qdbev_ros.{module}", "--ros-args", *words])


def first_after(stamp: int, model: Path, bag: Path) -> bytes | None:
    """The first overlay of `stamp` or later while the node runs over the bag; None where none comes."""
    os.environ["ROS_DOMAIN_ID"] = str(free_domain())
    rclpy.init()
    node = rclpy.create_node("overlay_picture")
    found: list[bytes] = []

    def take(message: Any) -> None:
        if stamp_to_ns(message.header.stamp) >= stamp:
            found.append(message.data.tobytes())

    node.create_subscription(CompressedImage, f"/{DETECTOR}/overlay/compressed", take, QoSProfile(depth=5))
    running = [start("detector_node", model=model, **NODE), start("bag_player_node", bag=bag, **PLAYER)]
    deadline = time.monotonic() + PATIENCE_S
    try:
        while not found and time.monotonic() < deadline and all(p.poll() is None for p in running):
            rclpy.spin_once(node, timeout_sec=0.1)
    finally:
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait()
        rclpy.shutdown()
    return found[0] if found else None


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("demo/nano.qdbev"), help="default: %(default)s")
    parser.add_argument("--bag", type=Path, default=Path("demo/town.mcap"), help="default: %(default)s")
    parser.add_argument("--at", type=float, default=13.5, help="seconds into the bag (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/pictures/overlay.jpg"), help="default: %(default)s"
    )
    args = parser.parse_args(words)
    with BagReader(args.bag) as bag:
        begin = read_sets(bag, load_preset("nuscenes"))[0].stamp_ns
    picture = first_after(begin + round(args.at * 1e9), args.model, args.bag)
    if picture is None:
        print("overlay_picture: no picture came, see above", file=sys.stderr)
        return 1
    with whole_file(args.out) as temporary:
        temporary.write_bytes(picture)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
