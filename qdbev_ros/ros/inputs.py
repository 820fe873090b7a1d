# SPDX-License-Identifier: Apache-2.0
"""The detector's subscriptions: pictures, CameraInfo, transforms. Each job holds all that one inference needs."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Any

from nav_msgs.msg import Odometry
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.timer import Timer
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from tf2_msgs.msg import TFMessage

from qdbev_ros.core.encodings import raw_picture
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.geometry import Pose
from qdbev_ros.core.odometry import OdometryMotion
from qdbev_ros.core.pose_buffer import TransformTree, TransformUnavailable
from qdbev_ros.core.preprocess import RawPicture
from qdbev_ros.core.synchroniser import FrameSet, Synchroniser, SyncSettings
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.assembly import Assembler, Frames, Job
from qdbev_ros.ros.calibration_file import RigCalibration
from qdbev_ros.ros.camera_state import CameraState, check_intrinsics
from qdbev_ros.ros.messages import pose_from_message, pose_from_transform, stamp_to_ns
from qdbev_ros.ros.mountings import Mountings
from qdbev_ros.ros.parameters import DetectorParameters
from qdbev_ros.ros.presets import TopicPreset
from qdbev_ros.ros.throttle import Throttled
from qdbev_ros.ros.timers import every

MAX_PENDING = 20  # sets that wait for transforms or calibrations
TICK_S = 0.02  # how often deadlines are looked at


class Inputs:
    """Collects messages in the executor's thread and hands whole jobs to `on_job`, in order."""

    def __init__(
        self,
        node: Node,
        parameters: DetectorParameters,
        preset: TopicPreset,
        calibration: RigCalibration,
        on_job: Callable[[Job], None],
        on_refusal: Callable[[str, str], None],
        on_error: Callable[[str, Exception], None],
    ) -> None:
        """on_job takes each set that can be answered, on_refusal(kind, text) hears of each that cannot, and
        on_error(place, error) of errors that nothing should have raised.
        """
        self._node = node
        self._parameters = parameters
        self._on_job = on_job
        self._on_refusal = on_refusal
        self._on_error = on_error
        self.refused: Counter[str] = Counter()  # kind of message -> those that could not be used
        self._preset = preset
        self._calibration = calibration  # what a calibration file gives wins over the topics
        self.cameras = {c: CameraState(c, preset.image_topic(c), preset.info_topic(c)) for c in CAMERAS}
        for camera, intrinsics in calibration.intrinsics.items():
            self.cameras[camera].intrinsics = intrinsics
        self.sync: Synchroniser[Any] = Synchroniser(CAMERAS, _sync_settings(parameters))
        self.tree = TransformTree()
        fixed, base = parameters.fixed_frame, parameters.base_frame
        self._odometry = OdometryMotion(preset.odometry, base, self.tree)
        from_tf = parameters.ego_motion == "tf"
        ego_pose = partial(self.tree.lookup, fixed, base) if from_tf else self._odometry.lookup
        frames = Frames(base, parameters.model_frame)
        self._assembler = Assembler(
            self.tree, self.cameras, frames, calibration, self._picture_frame, ego_pose, parameters.tf_timeout
        )
        self._mountings = Mountings(node, preset, calibration, frames)
        self._pending: deque[tuple[FrameSet[Any], float]] = deque()
        self._warn = Throttled(node.get_logger())
        self._subscriptions: list[Any] = []
        self._timer: Timer | None = None

    @property
    def pending(self) -> int:
        """Sets that wait for transforms or calibrations."""
        return len(self._pending)

    def configure(self, parameters: DetectorParameters) -> None:
        """Takes changed parameters, of which only live ones may differ."""
        self._parameters = parameters
        self.sync.configure(_sync_settings(parameters))
        self._assembler.timeout_s = parameters.tf_timeout

    def close(self) -> None:
        """Ends all subscriptions, also those of a `listen` that failed half-way."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        if self._timer is not None:
            self._node.destroy_timer(self._timer)
        self._mountings.close()

    def listen(self) -> None:
        """Subscribes to everything. Raises what rclpy does for topics that cannot be listened to."""
        kind = CompressedImage if self._preset.image_type == "compressed" else Image
        reliable = self._parameters.image_reliability == "reliable"
        reliability = ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT
        images = QoSProfile(depth=10, reliability=reliability)
        infos = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
        for camera, state in self.cameras.items():
            self._listen("pictures", kind, state.image_topic, partial(self._on_image, camera), images)
            if camera not in self._calibration.intrinsics:
                self._listen(
                    "camera_info", CameraInfo, state.info_topic, partial(self._on_info, camera), infos
                )
        latched = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._listen("tf", TFMessage, "/tf_static", self._on_tf_static, latched)
        # With odometry, too: some tools send where the sensors are on /tf alone.
        self._listen("tf", TFMessage, "/tf", self._on_tf, QoSProfile(depth=200))
        if self._parameters.ego_motion == "odometry":
            quality = QoSProfile(depth=200, reliability=ReliabilityPolicy.BEST_EFFORT)
            self._listen("odometry", Odometry, self._preset.odometry, self._on_odometry, quality)
        self._timer = every(self._node, TICK_S, self._guarded("tick", self._tick))

    def _listen(
        self, place: str, kind: Any, topic: str, callback: Callable[[Any], None], quality: QoSProfile
    ) -> None:
        guarded = self._guarded(place, callback)
        self._subscriptions.append(self._node.create_subscription(kind, topic, guarded, quality))

    def _guarded(self, place: str, callback: Callable[..., None]) -> Callable[..., None]:
        """The callback, whose errors would end the process: what waits may be in no order any more, and goes."""

        def call(*message: Any) -> None:
            try:
                callback(*message)
            except Exception as error:
                self.sync.reset("failure")
                self._drop_pending("failure", f"{type(error).__name__}: {error}")
                self._on_error(place, error)

        return call

    def _drop_pending(self, kind: str, text: str) -> None:
        while self._pending:
            self._pending.popleft()
            self._on_refusal(kind, text)

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
            self._odometry.forget_after(stamp)
            self._drop_pending("time_back", "time went back")
        self._take(sets, now)

    def _tick(self) -> None:
        now = time.monotonic()
        self._take(self.sync.expire(now), now)
        if any(state.images for state in self.cameras.values()):  # a bag's transforms come with its pictures
            self._mountings.look(self.tree, now, self._parameters.tf_timeout)

    def _take(self, sets: list[FrameSet[Any]], now: float) -> None:
        """Queues new sets and works off what can be."""
        self._pending += [(images, now) for images in sets]
        while len(self._pending) > MAX_PENDING:
            self._pending.popleft()
            self._refuse("transform", f"{MAX_PENDING} younger sets wait for transforms already")
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
            self.refused["tf"] += 1
            name = f"{transform.header.frame_id} -> {transform.child_frame_id}"
            self._warn(f"tf {name}", f"{topic}: transform {name} is ignored: {error}")
            return None

    def _on_odometry(self, message: Odometry) -> None:
        try:
            pose = pose_from_message(message.pose.pose)
        except DataError as error:
            self.refused["odometry"] += 1
            self._warn("odometry", f"odometry is ignored: {error}")
            return
        self._odometry.insert(_frame(message.child_frame_id), stamp_to_ns(message.header.stamp), pose)
        self._pump()

    def _pump(self) -> None:
        """Turns waiting sets into jobs, oldest first, as far as their transforms and calibrations are there."""
        while self._pending:
            images, since = self._pending[0]
            try:
                job = self._assembler.assemble(images, time.monotonic() - since)
            except TransformUnavailable as error:
                self._pending.popleft()
                self._refuse("transform", str(error))
                continue
            if job is None:
                return
            self._pending.popleft()
            for camera, reason in job.missing.items():
                topic = self.cameras[camera].image_topic
                self._warn(f"missing {camera}", f"camera {camera} is left out: {topic}: {reason}")
            if job.ego_problem is not None:
                self._warn("ego motion", f"no ego motion, so no memory: {job.ego_problem}")
            self._on_job(job)

    def _refuse(self, kind: str, text: str) -> None:
        self._warn(kind, f"set dropped: {text}")
        self._on_refusal(kind, text)

    def _picture_frame(self, camera: str, message: Any) -> str:
        return self._preset.image_frame(camera, message.header.frame_id)


def _sync_settings(parameters: DetectorParameters) -> SyncSettings:
    return SyncSettings(parameters.max_spread, parameters.sync_deadline, anchor=parameters.sync_anchor)


def picture_of(message: Any) -> memoryview | RawPicture:
    """Compressed bytes or raw pixels, both where they lie. Raises DataError where pixels cannot be used."""
    if isinstance(message, CompressedImage):
        return memoryview(message.data)
    return raw_picture(message.data, message.width, message.height, message.step, message.encoding)


def _frame(name: str) -> str:
    """Frame names without the leading slash that old tools write."""
    return name.lstrip("/")
