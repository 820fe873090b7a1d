# SPDX-License-Identifier: Apache-2.0
"""The detector's subscriptions: pictures, CameraInfo, transforms. Each job holds all that one inference needs."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from nav_msgs.msg import Odometry
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from tf2_msgs.msg import TFMessage

from qdbev_ros.core.encodings import encoding_problem
from qdbev_ros.core.errors import CalibrationError, DataError
from qdbev_ros.core.geometry import CameraCalibration, Pose
from qdbev_ros.core.pose_buffer import TransformTree, TransformUnavailable
from qdbev_ros.core.synchroniser import FrameSet, Synchroniser, SyncSettings
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.calibration_file import RigCalibration
from qdbev_ros.ros.camera_state import CameraState, check_intrinsics
from qdbev_ros.ros.messages import pose_from_message, pose_from_transform, stamp_to_ns
from qdbev_ros.ros.parameters import DetectorParameters
from qdbev_ros.ros.presets import TopicPreset
from qdbev_ros.ros.throttle import Throttled

MAX_PENDING = 20  # sets that wait for transforms or calibrations
TICK_S = 0.02  # how often deadlines are looked at


@dataclass(frozen=True)
class CameraJob:
    """One camera's message with its calibration and the vehicle's pose at the message's stamp."""

    message: Any  # sensor_msgs/CompressedImage or Image
    calibration: CameraCalibration
    ego2global: Pose


@dataclass(frozen=True)
class Job:
    """A complete set with every pose it needs. `arrived` is when its last picture came (monotonic seconds)."""

    stamp_ns: int
    spread_s: float
    cameras: dict[str, CameraJob]
    ego2global: Pose
    lidar2ego: Pose
    arrived: float


class Inputs:
    """Collects messages in the executor's thread and hands whole jobs to `on_job`, in order."""

    def __init__(
        self,
        node: Node,
        parameters: DetectorParameters,
        preset: TopicPreset,
        calibration: RigCalibration,
        on_job: Callable[[Job], None],
    ) -> None:
        self._parameters = parameters
        self._on_job = on_job
        self._preset = preset
        self._calibration = calibration  # what a calibration file gives wins over the topics
        self.cameras = {c: CameraState(c, preset.image_topic(c), preset.info_topic(c)) for c in CAMERAS}
        for camera, intrinsics in calibration.intrinsics.items():
            self.cameras[camera].intrinsics = intrinsics
        settings = SyncSettings(
            parameters.max_spread, parameters.sync_deadline, anchor=parameters.sync_anchor
        )
        self.sync: Synchroniser[Any] = Synchroniser(CAMERAS, settings)
        self.tree = TransformTree()
        self.dropped: Counter[str] = Counter()  # reason -> complete sets that never became a job
        self._pending: deque[tuple[FrameSet[Any], float]] = deque()
        self._warn = Throttled(node.get_logger().warning)
        self._subscribe(node, preset)
        node.create_timer(TICK_S, self._tick)

    @property
    def pending(self) -> int:
        """Complete sets that wait for transforms or calibrations."""
        return len(self._pending)

    def _subscribe(self, node: Node, preset: TopicPreset) -> None:
        kind = CompressedImage if preset.image_type == "compressed" else Image
        reliable = self._parameters.image_reliability == "reliable"
        reliability = ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT
        images = QoSProfile(depth=10, reliability=reliability)
        infos = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
        for camera, state in self.cameras.items():
            node.create_subscription(kind, state.image_topic, partial(self._on_image, camera), images)
            if camera not in self._calibration.intrinsics:
                node.create_subscription(CameraInfo, state.info_topic, partial(self._on_info, camera), infos)
        latched = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        node.create_subscription(TFMessage, "/tf_static", self._on_tf_static, latched)
        if self._parameters.ego_motion == "tf":
            node.create_subscription(TFMessage, "/tf", self._on_tf, QoSProfile(depth=200))
        else:
            quality = QoSProfile(depth=200, reliability=ReliabilityPolicy.BEST_EFFORT)
            node.create_subscription(Odometry, preset.odometry, self._on_odometry, quality)

    def _on_info(self, camera: str, message: CameraInfo) -> None:
        state = self.cameras[camera]
        try:
            state.intrinsics = check_intrinsics(message.k, message.p, message.width, message.height)
            state.info_error = None
        except ValueError as error:
            state.intrinsics, state.info_error = None, str(error)
            self._warn(f"info {camera}", f"CameraInfo on {state.info_topic} cannot be used: {error}")
        self._pump()

    def _on_image(self, camera: str, message: Any) -> None:
        now = time.monotonic()
        self.cameras[camera].image_arrived(now)
        stamp = stamp_to_ns(message.header.stamp)
        jumps = self.sync.counters.resets["time_back"]
        sets = self.sync.add(camera, stamp, message, now)
        if self.sync.counters.resets["time_back"] > jumps:
            self._warn("time_back", f"time went back on {self.cameras[camera].image_topic}: starting anew")
            self.tree.forget_after(stamp)
            self.dropped["time_back"] += len(self._pending)
            self._pending.clear()
        self._take(sets, now)

    def _tick(self) -> None:
        now = time.monotonic()
        self._take(self.sync.expire(now), now)

    def _take(self, sets: list[FrameSet[Any]], now: float) -> None:
        """Queues new sets and works off what can be."""
        for images in sets:
            if images.missing:
                topics = ", ".join(self.cameras[c].image_topic for c in images.missing)
                self._warn("incomplete", f"no picture in time on {topics}: set dropped")
                self.dropped["incomplete"] += 1
            else:
                self._pending.append((images, now))
        while len(self._pending) > MAX_PENDING:
            self._pending.popleft()
            self.dropped["transform"] += 1
        self._pump()

    def _on_tf(self, message: TFMessage) -> None:
        for transform in message.transforms:
            pose = self._pose(transform, "/tf")
            if pose is not None:
                stamp = stamp_to_ns(transform.header.stamp)
                self.tree.insert(
                    _frame(transform.header.frame_id), _frame(transform.child_frame_id), stamp, pose
                )
        self._pump()

    def _on_tf_static(self, message: TFMessage) -> None:
        for transform in message.transforms:
            pose = self._pose(transform, "/tf_static")
            if pose is not None:
                self.tree.set_static(
                    _frame(transform.header.frame_id), _frame(transform.child_frame_id), pose
                )
        self._pump()

    def _pose(self, transform: Any, topic: str) -> Pose | None:
        try:
            return pose_from_transform(transform.transform)
        except DataError as error:
            name = f"{transform.header.frame_id} -> {transform.child_frame_id}"
            self._warn(f"tf {name}", f"{topic}: transform {name} is ignored: {error}")
            return None

    def _on_odometry(self, message: Odometry) -> None:
        try:
            pose = pose_from_message(message.pose.pose)
        except DataError as error:
            self._warn("odometry", f"odometry is ignored: {error}")
            return
        stamp = stamp_to_ns(message.header.stamp)
        # Only motion matters, so whatever frame the odometry is in serves as the fixed one.
        self.tree.insert(self._parameters.fixed_frame, self._parameters.base_frame, stamp, pose)
        self._pump()

    def _pump(self) -> None:
        """Turns waiting sets into jobs, oldest first, as far as their transforms and calibrations are there."""
        while self._pending:
            images, arrived = self._pending[0]
            patient = time.monotonic() - arrived < self._parameters.tf_timeout
            try:
                job = self._assemble(images, arrived)
            except TransformUnavailable as error:
                if error.wait and patient:
                    return
                self.dropped["transform"] += 1
                self._warn("transform", f"set dropped: {error}")
            except CalibrationError as error:
                # A camera's first pictures may overtake its first CameraInfo: topics are not ordered among each other.
                if patient and all(state.info_error is None for state in self.cameras.values()):
                    return
                self.dropped["calibration"] += 1
                self._warn("calibration", f"set dropped: {error}")
            else:
                self._pending.popleft()
                self._on_job(job)
                continue
            self._pending.popleft()

    def _assemble(self, images: FrameSet[Any], arrived: float) -> Job:
        fixed, base = self._parameters.fixed_frame, self._parameters.base_frame
        cameras = {}
        for name, (stamp, message, _) in images.images.items():
            state = self.cameras[name]
            if state.intrinsics is None:
                problem = f" ({state.info_error})" if state.info_error else ""
                raise CalibrationError(f"no usable CameraInfo on {state.info_topic}{problem}")
            sensor2ego = self._sensor_pose(name, message.header.frame_id, stamp)
            calibration = CameraCalibration(
                name, state.intrinsics.matrix, state.intrinsics.width, state.intrinsics.height, sensor2ego
            )  # fmt: skip
            cameras[name] = CameraJob(message, calibration, self.tree.lookup(fixed, base, stamp))
        reference = images.stamp_ns
        return Job(
            reference, images.spread_s, cameras, self.tree.lookup(fixed, base, reference),
            self._calibration.model
            or self.tree.lookup(base, self._parameters.model_frame, reference, rigid=True), arrived,
        )  # fmt: skip

    def _sensor_pose(self, camera: str, header_frame: str, stamp_ns: int) -> Pose:
        """Camera -> vehicle: the calibration file's, else that of the frame which the picture names."""
        if camera in self._calibration.extrinsics:
            return self._calibration.extrinsics[camera]
        frame = self._preset.image_frame(camera, header_frame)
        if not self.tree.has(frame):
            topic = self.cameras[camera].image_topic
            text = f"no transform names {frame!r}, the frame of the pictures on {topic}"
            raise TransformUnavailable(text, wait=True)
        return self.tree.lookup(self._parameters.base_frame, frame, stamp_ns, rigid=True)


def picture_of(message: Any, bridge: Any) -> memoryview | np.ndarray[Any, np.dtype[np.uint8]]:
    """Compressed bytes as they are; raw images as BGR through cv_bridge. Raises DataError where it cannot."""
    if isinstance(message, CompressedImage):
        return memoryview(message.data)
    if problem := encoding_problem(message.encoding):
        raise DataError(problem)
    try:
        return bridge.imgmsg_to_cv2(message, desired_encoding="bgr8")  # type: ignore[no-any-return]
    except Exception as error:  # cv_bridge raises its own, OpenCV's and KeyError
        text = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"encoding {message.encoding!r} cannot be read: {text}") from error


def _frame(name: str) -> str:
    """Frame names without the leading slash that old tools write."""
    return name.lstrip("/")
