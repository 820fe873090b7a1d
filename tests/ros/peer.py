# SPDX-License-Identifier: Apache-2.0
"""A camera driver that sends large pictures all the time, to be killed meanwhile: python -m tests.ros.peer CAMERA"""

from __future__ import annotations

import sys

import cv2
import numpy as np
import rclpy
from sensor_msgs.msg import CameraInfo, CompressedImage

from qdbev_ros.ros.messages import ns_to_stamp, stamp_to_ns
from tests.ros.drive import HEIGHT, OFFSETS_MS, WIDTH

LEADER = "CAM_FRONT"  # whose stamps it follows
BYTES = 1_000_000  # the rest behind the picture is no part of it, and decoders stop before


def main(camera: str) -> None:
    rclpy.init()
    node = rclpy.create_node("peer")
    ok, data = cv2.imencode(".jpg", np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    assert ok
    message = CompressedImage(format="jpeg", data=data.tobytes().ljust(BYTES, b"\0"))
    message.header.frame_id = camera
    publisher = node.create_publisher(CompressedImage, f"/{camera}/image_rect_compressed", 10)
    later = (OFFSETS_MS[camera] - OFFSETS_MS[LEADER]) * 1_000_000

    def follow(info: CameraInfo) -> None:
        message.header.stamp = ns_to_stamp(stamp_to_ns(info.header.stamp) + later)

    node.create_subscription(CameraInfo, f"/{LEADER}/camera_info", follow, 10)
    print("ready", flush=True)
    while True:
        rclpy.spin_once(node, timeout_sec=0.01)
        for _ in range(2):
            publisher.publish(message)


if __name__ == "__main__":
    main(sys.argv[1])
