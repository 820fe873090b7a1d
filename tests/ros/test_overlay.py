# SPDX-License-Identifier: Apache-2.0
"""~/overlay/compressed: drawn only for listeners, no more often than asked, with what the answer says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image

from qdbev_ros.core.boxes import Boxes, empty_boxes
from qdbev_ros.core.drawing import COLORS
from qdbev_ros.core.geometry import CameraCalibration, Pose, quaternion_multiply, yaw_quaternion
from qdbev_ros.core.memory import MemoryInput
from qdbev_ros.core.variant import CAMERAS, CLASSES
from qdbev_ros.ros.assembly import CameraJob, Job
from qdbev_ros.ros.domain import free_domain
from qdbev_ros.ros.messages import Answer, stamp_to_ns
from qdbev_ros.ros.overlay import Overlay
from qdbev_ros.ros.parameters import DetectorParameters
from tests.ros.drive import HEIGHT, LIDAR2EGO, OPTICAL, WIDTH, YAWS
from tests.ros.graph import Graph
from tests.ros.rig import Rig

STAMP = 1_700_000_000_000_000_000
GREY = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
MEMORY = MemoryInput(np.zeros(18, np.float32), None, 7, 0.5, None)
LISTENER = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)


def jpeg_message() -> CompressedImage:
    return CompressedImage(format="jpeg", data=cv2.imencode(".jpg", GREY)[1].tobytes())


def raw_message() -> Image:
    return Image(width=WIDTH, height=HEIGHT, step=3 * WIDTH, encoding="rgb8", data=GREY.tobytes())


def seen(boxes: Boxes, message: Any, without: str = "") -> tuple[Job, Answer]:
    """A set of grey pictures with an answer; one camera may be missing."""
    k = np.array([[316.0, 0, WIDTH / 2], [0, 316.0, HEIGHT / 2], [0, 0, 1]])
    cameras = {}
    for name in (c for c in CAMERAS if c != without):
        mount = Pose(
            quaternion_multiply(yaw_quaternion(float(YAWS[name])), OPTICAL), np.array([1.2, 0.0, 1.5])
        )
        calibration = CameraCalibration(name, k, WIDTH, HEIGHT, mount)
        cameras[name] = CameraJob(message, calibration, Pose.identity())
    missing = {without: "no picture in time"} if without else {}
    job = Job(STAMP, 0.03, cameras, missing, Pose.identity(), LIDAR2EGO, None, 0.0)
    return job, Answer(STAMP, 0.03, boxes, tuple(cameras), missing, None, MEMORY)


def car_ahead() -> Boxes:
    return Boxes(
        np.array([[0.0, 10.0, -1.0]]), np.array([[2.0, 4.5, 1.6]]), np.array([np.pi / 2]), np.zeros((1, 2)),
        np.array([0.8]), np.array([CLASSES.index("car")]),
    )  # fmt: skip


class Desk:
    """An overlay in this process, and a listener that can be there or not."""

    def __init__(self) -> None:
        self._context = Context()
        rclpy.init(context=self._context, domain_id=free_domain())
        self.node = rclpy.create_node("desk", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self.overlay = Overlay(self.node, DetectorParameters(model_frame="LIDAR_TOP"), "nano")
        self.pictures: list[Any] = []

    def listen(self) -> None:
        topic = "/desk/overlay/compressed"
        self.node.create_subscription(CompressedImage, topic, self.pictures.append, LISTENER)
        self.until(lambda: self.overlay._publisher.get_subscription_count() == 1)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            self._executor.spin_once(timeout_sec=0.02)

    def picture(self, boxes: Boxes, message: Any, without: str = "") -> np.ndarray:
        """The picture of an answer."""
        self.pictures.clear()
        self.overlay._next = 0.0
        self.overlay.show(*seen(boxes, message, without))
        self.until(lambda: bool(self.pictures))
        assert stamp_to_ns(self.pictures[0].header.stamp) == STAMP
        return cv2.imdecode(np.frombuffer(self.pictures[0].data, np.uint8), cv2.IMREAD_COLOR)

    def close(self) -> None:
        self.overlay.close()
        self._executor.shutdown()
        self.node.destroy_node()
        self._context.try_shutdown()


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()


def colored(picture: np.ndarray, name: str) -> int:
    """Pixels near a class's colour."""
    return int((np.abs(picture.astype(int) - np.array(COLORS[name])).max(-1) < 40).sum())


def test_nothing_is_drawn_while_nobody_listens(desk: Desk) -> None:
    drawn: list[Answer] = []
    desk.overlay._draw = lambda job, answer: drawn.append(answer) or GREY  # type: ignore[method-assign]
    desk.overlay.show(*seen(car_ahead(), jpeg_message()))
    assert desk.overlay._worker.idle()
    desk.listen()
    desk.overlay.show(*seen(car_ahead(), jpeg_message()))
    desk.until(lambda: bool(desk.pictures))
    assert len(drawn) == 1


@pytest.mark.parametrize("make", [jpeg_message, raw_message])
def test_boxes_are_drawn_over_compressed_and_raw_pictures(desk: Desk, make: Callable[[], Any]) -> None:
    desk.listen()
    empty, with_car = (desk.picture(boxes, make()) for boxes in (empty_boxes(), car_ahead()))
    assert empty.shape[1] > 1900
    assert colored(with_car, "car") > colored(empty, "car") + 300


def test_a_missing_camera_is_dark_and_an_undecodable_picture_is_told(desk: Desk) -> None:
    desk.listen()
    whole, without = (desk.picture(empty_boxes(), jpeg_message(), camera) for camera in ("", "CAM_BACK"))
    assert int((np.abs(whole.astype(int) - 90).max(-1) < 8).sum()) > 1.15 * int(
        (np.abs(without.astype(int) - 90).max(-1) < 8).sum()
    )
    desk.overlay._next = 0.0
    desk.overlay.show(*seen(empty_boxes(), CompressedImage(format="jpeg", data=b"nothing")))
    desk.until(desk.overlay._worker.idle)
    assert desk.picture(empty_boxes(), jpeg_message()) is not None, "the thread went on"


def test_pictures_come_no_more_often_than_asked(desk: Desk) -> None:
    desk.listen()
    desk.overlay.parameters = DetectorParameters(overlay_rate=0.01)
    for _ in range(5):
        desk.overlay.show(*seen(empty_boxes(), jpeg_message()))
        desk.until(desk.overlay._worker.idle)
    desk.until(lambda: bool(desk.pictures))
    assert len(desk.pictures) == 1
    desk.overlay.parameters = DetectorParameters(overlay_rate=0.0)
    desk.overlay._next = 0.0
    desk.overlay.show(*seen(empty_boxes(), jpeg_message()))
    assert desk.overlay._worker.idle()


def test_the_running_node_draws_what_it_answers(graph: Graph, package: Path) -> None:
    node = graph.node("detector_node", model=package, sync_deadline=10.0, tf_timeout=10.0, stale_after=60.0)
    with Rig(graph, node) as rig:
        pictures: list[Any] = []
        topic = "/qdbev_detector/overlay/compressed"
        rig.node.create_subscription(CompressedImage, topic, pictures.append, LISTENER)
        rig.until(lambda: rig.node.count_subscribers(topic) == 1, "no listener")
        stamps = [stamp_to_ns(rig.ask().header.stamp)]
        while not pictures:
            stamps.append(stamp_to_ns(rig.ask().header.stamp))
            assert len(stamps) < 50
        assert stamp_to_ns(pictures[0].header.stamp) in stamps
