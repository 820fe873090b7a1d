# SPDX-License-Identifier: Apache-2.0
"""A rig in the test's own process: sends sets of pictures to a running node over DDS and hears its answers.

Nothing here depends on how fast the machine is: each answer is waited for before anything else is sent.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import rclpy
import yaml
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import TransformStamped
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from tf2_msgs.msg import TFMessage

from qdbev_ros.core.geometry import Pose, quaternion_multiply, yaw_quaternion
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.diagnostics import CAMERA, PIPELINE
from qdbev_ros.ros.messages import ns_to_stamp, stamp_to_ns
from tests.ros.drive import HEIGHT, LIDAR2EGO, OFFSETS_MS, OPTICAL, START_NS, WIDTH, YAWS
from tests.ros.graph import Graph, Running

NODE = "/qdbev_detector"
MS = 1_000_000
FOCAL = 316.0
Edit = Callable[[str, Any, Any], int]  # (camera, CameraInfo, picture) -> how often they are sent
PATIENCE_S = 120.0  # busy machines are slow
LONG_S = (
    10.0  # the node's patience with pictures and transforms, longer than a busy machine takes to send a set
)
TIMING = {"sync_deadline": LONG_S, "tf_timeout": LONG_S, "stale_after": 60.0, "queue_size": 10}


def patient(folder: Path) -> str:
    """The argument of bringup and launch that makes the node as patient as TIMING."""
    path = folder / "patient.yaml"
    parameters = {**TIMING, "image_reliability": "reliable"}
    path.write_text(yaml.safe_dump({"qdbev_detector": {"ros__parameters": parameters}}))
    return f"params:={path}"


class Rig:
    """Six cameras, a vehicle that drives 5 m/s straight on, and all that they publish. A context manager."""

    def __init__(self, graph: Graph, node: Running, raw: bool = False, mounted: bool = True) -> None:
        """raw: pictures as preset raw has them. mounted: whether it is known where the cameras are."""
        self._process = node
        self._context = Context()
        rclpy.init(context=self._context, domain_id=graph.domain)
        self.node = rclpy.create_node("rig", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        reliable = QoSProfile(depth=50)
        latched = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        make = self.node.create_publisher
        self._raw = raw
        kind, topic = (Image, "image_rect") if raw else (CompressedImage, "image_rect_compressed")
        self._images = {c: make(kind, f"/{c}/{topic}", reliable) for c in CAMERAS}
        self._infos = {c: make(CameraInfo, f"/{c}/camera_info", reliable) for c in CAMERAS}
        self._tf, self._tf_static = make(TFMessage, "/tf", reliable), make(TFMessage, "/tf_static", latched)
        self.answers: dict[int, Any] = {}
        self.statuses: dict[str, Any] = {}  # name -> last DiagnosticStatus
        self.now_ns = START_NS
        from qdbev_msgs.msg import DetectedObjectArray

        listen = self.node.create_subscription
        self._listeners = [
            listen(DetectedObjectArray, f"{NODE}/objects", self._on_answer, reliable),
            listen(DiagnosticArray, "/diagnostics", self._on_diagnostics, reliable),
        ]
        self._picture = np.random.default_rng(1).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        ok, data = cv2.imencode(".jpg", self._picture)
        assert ok
        self.jpeg = data.tobytes()
        if mounted:
            self.mount({})

    def __enter__(self) -> Rig:
        self.until(lambda: PIPELINE in self.statuses, "no diagnostics")
        self.until_heard()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._executor.shutdown()
        self.node.destroy_node()
        self._context.try_shutdown()

    def watch(self, node: Running) -> None:
        """Another process is the node from here on."""
        self._process = node

    def until_heard(self) -> None:
        """Waits until the node listens to every topic."""
        topics = [*self._images.values(), *self._infos.values(), self._tf]
        self.until(lambda: all(p.get_subscription_count() for p in topics), "the node never subscribed")

    def until(self, condition: Callable[[], bool], complaint: str) -> None:
        """Spins until `condition`; fails with `complaint` and what the node printed."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            late = time.monotonic() > deadline or self._process.process.poll() is not None
            assert not late, f"{complaint}\n{self._process.output}"
            self._executor.spin_once(timeout_sec=0.05)

    def call(self, kind: Any, name: str, request: Any) -> Any:
        """The answer of a service of the node."""
        client = self.node.create_client(kind, f"{NODE}/{name}")
        self.until(client.service_is_ready, f"no service {name}")
        future = client.call_async(request)
        self.until(future.done, f"service {name} never answered")
        self.node.destroy_client(client)
        return future.result()

    def mount(self, moved: dict[str, float], frames: dict[str, str] | None = None) -> None:
        """Sends where the cameras are; `moved` puts some of them metres ahead, `frames` names some otherwise."""
        transforms = [transform("base_link", "LIDAR_TOP", 0, LIDAR2EGO)]
        for camera in CAMERAS:
            rotation = quaternion_multiply(yaw_quaternion(float(YAWS[camera])), OPTICAL)
            x, y = 1.2 * np.cos(YAWS[camera]), 0.5 * np.sin(YAWS[camera])
            position = np.array([x + moved.get(camera, 0.0), y, 1.5])
            child = (frames or {}).get(camera, camera)
            transforms.append(transform("base_link", child, 0, Pose(rotation, position)))
        self._tf_static.publish(TFMessage(transforms=transforms))

    def send(
        self,
        period_s: float = 0.5,
        without: Iterable[str] = (),
        pictures: dict[str, bytes] | None = None,
        focal: dict[str, float] | None = None,
        offset_s: float = 0.0,
        tf: bool = True,
        jump_m: float = 0.0,
        edit: Edit | None = None,
    ) -> int:
        """Sends a set `period_s` after the last one; the stamp that its answer will have.

        without: cameras that send nothing. pictures, focal: other bytes and focal lengths for some. offset_s: all
        stamps are later by so much. tf: whether the vehicle's motion is known. jump_m: the vehicle is elsewhere.
        edit: changes each camera's messages, and says how often they are sent.
        """
        self.now_ns += round(period_s * 1e9)
        stamp = self.now_ns + round(offset_s * 1e9)
        if tf:
            self.move(stamp, jump_m)
        sent = [camera for camera in CAMERAS if camera not in set(without)]
        for camera in sorted(sent, key=OFFSETS_MS.__getitem__):
            at = stamp + OFFSETS_MS[camera] * MS
            self.send_camera(camera, at, (pictures or {}).get(camera), (focal or {}).get(camera, FOCAL), edit)
        return stamp + max(OFFSETS_MS[camera] for camera in sent) * MS

    def answer(self, stamp: int) -> Any:
        """The node's answer to the set of `stamp`."""
        self.until(lambda: stamp in self.answers, f"no answer to the set of {stamp}")
        return self.answers[stamp]

    def ask(self, **how: Any) -> Any:
        """Sends a set and waits for the answer."""
        return self.answer(self.send(**how))

    def ask_in_vain(self, patience: str, **how: Any) -> Any:
        """Sends a set that lacks something and waits for its answer.

        The node's `patience`, one of its parameters, is cut short only when all that was sent is known to be there:
        what is slow on a busy machine is not taken for missing.
        """
        sent = [camera for camera in CAMERAS if camera not in how.get("without", ())]
        before = {camera: int(self.values(camera)["pictures"]) for camera in sent}
        stamp = self.send(**how)
        self.until(
            lambda: all(int(self.values(camera)["pictures"]) > before[camera] for camera in sent),
            "the pictures never came",
        )
        assert stamp not in self.answers
        assert self.set_parameter(patience, 0.01).successful
        answer = self.answer(stamp)
        assert self.set_parameter(patience, LONG_S).successful
        return answer

    def set_parameter(self, name: str, value: float | int | str | bool) -> Any:
        """What the node answers to a change of a parameter."""
        kinds = {
            int: (ParameterType.PARAMETER_INTEGER, "integer_value"),
            float: (ParameterType.PARAMETER_DOUBLE, "double_value"),
            str: (ParameterType.PARAMETER_STRING, "string_value"),
            bool: (ParameterType.PARAMETER_BOOL, "bool_value"),
        }
        kind, key = kinds[type(value)]
        given = Parameter(name=name, value=ParameterValue(type=kind, **{key: value}))
        request = SetParameters.Request(parameters=[given])
        return self.call(SetParameters, "set_parameters", request).results[0]

    def whole(self) -> None:
        """A new scene of four whole sets, after which the node is running."""
        self.now_ns += 100_000_000_000
        for _ in range(4):
            self.ask()
        self.until_state("running")

    def until_state(self, state: str, text: str = "") -> None:
        """Waits until diagnostics say so."""

        def said() -> bool:
            status = self.statuses[PIPELINE]
            return self.values()["state"] == state and text in status.message

        self.until(said, f"diagnostics never said {state} {text}; last: {self.statuses[PIPELINE].message}")

    def values(self, camera: str = "") -> dict[str, str]:
        """The last status of the whole, or of a camera, as a mapping."""
        status = self.statuses[CAMERA + camera if camera else PIPELINE]
        return {pair.key: pair.value for pair in status.values}

    def _ego(self, stamp: int, jump_m: float) -> TransformStamped:
        x = 5.0 * (stamp - START_NS) * 1e-9 + jump_m
        return transform("map", "base_link", stamp, Pose(np.array([1.0, 0, 0, 0]), np.array([x, 0.0, 0.0])))

    def move(self, stamp: int, jump_m: float = 0.0) -> None:
        """Sends where the vehicle is around `stamp`."""
        poses = [self._ego(stamp + 10 * MS * k, jump_m) for k in range(-6, 2)]
        self._tf.publish(TFMessage(transforms=poses))

    def send_transform(self, parent: str, child: str, pose: Pose) -> None:
        """Sends one transform of now on /tf."""
        self._tf.publish(TFMessage(transforms=[transform(parent, child, self.now_ns, pose)]))

    def send_camera(
        self, camera: str, stamp: int, picture: bytes | None = None, focal: float = FOCAL, edit: Edit | None = None
    ) -> None:  # fmt: skip
        """Sends one camera's CameraInfo and picture."""
        k = [focal, 0.0, WIDTH / 2, 0.0, focal, HEIGHT / 2, 0.0, 0.0, 1.0]
        info = CameraInfo(width=WIDTH, height=HEIGHT, k=k, p=[*k[:3], 0.0, *k[3:6], 0.0, *k[6:], 0.0])
        if self._raw:
            data = array("B", self._picture.tobytes())
            image = Image(width=WIDTH, height=HEIGHT, encoding="bgr8", step=3 * WIDTH, data=data)
        else:
            image = CompressedImage(format="jpeg", data=self.jpeg if picture is None else picture)
        for message in (info, image):
            message.header.stamp, message.header.frame_id = ns_to_stamp(stamp), camera
        for _ in range(1 if edit is None else edit(camera, info, image)):
            self._infos[camera].publish(info)
            self._images[camera].publish(image)

    def _on_answer(self, message: Any) -> None:
        self.answers[stamp_to_ns(message.header.stamp)] = message

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        self.statuses |= {status.name: status for status in message.status}


def transform(parent: str, child: str, stamp_ns: int, pose: Pose) -> TransformStamped:
    message = TransformStamped(child_frame_id=child)
    message.header.frame_id, message.header.stamp = parent, ns_to_stamp(stamp_ns)
    t, r = message.transform.translation, message.transform.rotation
    t.x, t.y, t.z = (float(v) for v in pose.translation)
    r.w, r.x, r.y, r.z = (float(v) for v in pose.rotation)
    return message
