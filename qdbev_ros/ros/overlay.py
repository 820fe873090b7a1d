# SPDX-License-Identifier: Apache-2.0
"""~/overlay/compressed: six cameras with their boxes beside the bird's-eye view, drawn behind the answers."""

from __future__ import annotations

import array
import time

import cv2
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage

from qdbev_ros.core.boxes import empty_boxes
from qdbev_ros.core.drawing import camera_view, draw_overview
from qdbev_ros.core.preprocess import Picture
from qdbev_ros.core.projection import lidar_to_image
from qdbev_ros.ros.assembly import Job
from qdbev_ros.ros.inputs import picture_of
from qdbev_ros.ros.messages import Answer, ns_to_stamp
from qdbev_ros.ros.parameters import DetectorParameters
from qdbev_ros.ros.throttle import Throttled
from qdbev_ros.ros.worker import Worker

QUALITY = 85  # of the JPEG


class Overlay:
    """Draws in a thread of its own, the newest answer first, and only while somebody listens."""

    def __init__(self, node: Node, parameters: DetectorParameters, title: str) -> None:
        self.parameters = parameters  # live ones may be replaced
        self._node = node
        self._title = title
        self._publisher = node.create_publisher(CompressedImage, "~/overlay/compressed", QoSProfile(depth=2))
        self._warn = Throttled(node.get_logger())
        self._next = 0.0
        self._worker: Worker[tuple[Job, Answer]] = Worker(self._work, 1, self._failed)

    def show(self, job: Job, answer: Answer) -> None:
        """Has the answer drawn if it is time for a picture and somebody wants it; returns at once."""
        now, rate = time.monotonic(), self.parameters.overlay_rate
        if rate and now >= self._next and self._publisher.get_subscription_count():
            self._next = now + 1 / rate
            self._worker.submit((job, answer))

    def close(self) -> None:
        """Ends the thread and the publisher."""
        self._worker.close()
        self._node.destroy_publisher(self._publisher)

    def _work(self, item: tuple[Job, Answer]) -> None:
        job, answer = item
        picture = self._draw(job, answer)
        done, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        if done:
            message = CompressedImage(format="bgr8; jpeg compressed bgr8")
            message.header.stamp = ns_to_stamp(answer.stamp_ns)
            message.header.frame_id = self.parameters.model_frame
            message.data = array.array("B", data.tobytes())  # of bytes rclpy would check each
            self._publisher.publish(message)

    def _failed(self, error: Exception) -> None:
        self._warn("overlay", f"no overlay: {type(error).__name__}: {error}")

    def _draw(self, job: Job, answer: Answer) -> Picture:
        boxes = answer.boxes.select(answer.boxes.scores >= self.parameters.display_threshold)
        views = {}
        for name in answer.used:
            camera = job.cameras[name]
            to_image = lidar_to_image(camera.calibration, job.lidar2ego, camera.ego2global, job.ego2global)
            views[name] = camera_view(picture_of(camera.message), camera.calibration, to_image)
        lacking = answer.lacking()
        footer = "; ".join(lacking) if lacking else f"six cameras, {answer.spread_s * 1e3:.0f} ms apart"
        memory = f"memory of {answer.memory.age} sets" if answer.memory.age else "no memory yet"
        return draw_overview(
            views, boxes, empty_boxes(), f"{self._title}: {len(boxes)} boxes, {memory}", footer
        )
