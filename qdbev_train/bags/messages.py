# SPDX-License-Identifier: Apache-2.0
"""ROS 2 messages of a scene, as rosbags' Jazzy types. map is nuScenes' global frame, base_link its ego."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from rosbags.typesys import Stores, get_typestore

from qdbev_ros.core.geometry import (
    Array,
    CameraCalibration,
    Pose,
    quaternion_to_matrix,
    wrap_angle,
    yaw_quaternion,
)
from qdbev_ros.core.variant import CLASSES
from qdbev_train.data.frames import Frame

STORE = get_typestore(Stores.ROS2_JAZZY)
TYPES = STORE.types

MAP, BASE = "map", "base_link"

TRUTH_COLOUR = (1.0, 1.0, 1.0)  # red, green, blue; what is detected is coloured by class


@dataclass(frozen=True)
class EgoPose:
    """ego2global `pose` at `stamp_ns` with the twist in base_link: (vx, vy, vz) m/s and yaw rate rad/s."""

    stamp_ns: int
    pose: Pose
    velocity: Array
    yaw_rate: float


def _message(name: str, **fields: Any) -> Any:
    return TYPES[name](**fields)


def time(stamp_ns: int) -> Any:
    return _message("builtin_interfaces/msg/Time", sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9)


def header(stamp_ns: int, frame_id: str) -> Any:
    return _message("std_msgs/msg/Header", stamp=time(stamp_ns), frame_id=frame_id)


def vector(values: Array | tuple[float, float, float]) -> Any:
    x, y, z = (float(v) for v in values)
    return _message("geometry_msgs/msg/Vector3", x=x, y=y, z=z)


def quaternion(rotation: Array) -> Any:
    """(w, x, y, z) -> ROS's x, y, z, w."""
    w, x, y, z = (float(v) for v in rotation)
    return _message("geometry_msgs/msg/Quaternion", x=x, y=y, z=z, w=w)


def pose_message(pose: Pose) -> Any:
    x, y, z = (float(v) for v in pose.translation)
    position = _message("geometry_msgs/msg/Point", x=x, y=y, z=z)
    return _message("geometry_msgs/msg/Pose", position=position, orientation=quaternion(pose.rotation))


def transform(stamp_ns: int, parent: str, child: str, pose: Pose) -> Any:
    """geometry_msgs/TransformStamped child -> parent."""
    return _message(
        "geometry_msgs/msg/TransformStamped",
        header=header(stamp_ns, parent),
        child_frame_id=child,
        transform=_message(
            "geometry_msgs/msg/Transform",
            translation=vector(pose.translation),
            rotation=quaternion(pose.rotation),
        ),
    )


def tf(transforms: list[Any]) -> Any:
    return _message("tf2_msgs/msg/TFMessage", transforms=transforms)


def odometry(ego: EgoPose) -> Any:
    """nav_msgs/Odometry map -> base_link; covariances are zero: nothing is known about them."""
    twist = _message(
        "geometry_msgs/msg/Twist", linear=vector(ego.velocity), angular=vector((0.0, 0.0, ego.yaw_rate))
    )
    no_covariance = np.zeros(36)
    return _message(
        "nav_msgs/msg/Odometry",
        header=header(ego.stamp_ns, MAP),
        child_frame_id=BASE,
        pose=_message(
            "geometry_msgs/msg/PoseWithCovariance", pose=pose_message(ego.pose), covariance=no_covariance
        ),
        twist=_message("geometry_msgs/msg/TwistWithCovariance", twist=twist, covariance=no_covariance),
    )


def image(stamp_ns: int, camera: str, jpeg: bytes) -> Any:
    data = np.frombuffer(jpeg, np.uint8)
    return _message(
        "sensor_msgs/msg/CompressedImage", header=header(stamp_ns, camera), format="jpeg", data=data
    )


def camera_info(stamp_ns: int, calibration: CameraCalibration) -> Any:
    """sensor_msgs/CameraInfo of a rectified picture: no distortion, P = [K | 0]."""
    k = calibration.intrinsics
    roi = _message(
        "sensor_msgs/msg/RegionOfInterest", x_offset=0, y_offset=0, height=0, width=0, do_rectify=False
    )
    return _message(
        "sensor_msgs/msg/CameraInfo",
        header=header(stamp_ns, calibration.name),
        height=calibration.height,
        width=calibration.width,
        distortion_model="plumb_bob",
        d=np.zeros(5),
        k=k.reshape(-1).copy(),
        r=np.eye(3).reshape(-1),
        p=np.hstack([k, np.zeros((3, 1))]).reshape(-1),
        binning_x=0,
        binning_y=0,
        roi=roi,
    )


def annotation_markers(frame: Frame, numbers: dict[str, int]) -> Any:
    """visualization_msgs/MarkerArray of the boxes that count in the evaluation (a lidar or radar point inside).

    `numbers` gives each instance token its number, the same in every frame; new ones are added. The first marker
    deletes those of the frame before; every marker's text is the sample token.
    """
    kept = np.flatnonzero(frame.annotations.points > 0)
    boxes = frame.annotations.boxes.select(kept).transformed(frame.lidar2global)
    markers = [_marker(frame, action=3)]
    for row, index in enumerate(kept):
        name = CLASSES[boxes.labels[row]]
        width, length, height = boxes.sizes[row]
        number = numbers.setdefault(frame.annotations.instances[index], len(numbers))
        pose = Pose(yaw_quaternion(float(boxes.yaws[row])), boxes.centers[row])
        markers.append(_marker(frame, 0, name, number, pose, (length, width, height)))
    return _message("visualization_msgs/msg/MarkerArray", markers=markers)


def _marker(
    frame: Frame,
    action: int,  # 0 adds, 3 deletes all
    namespace: str = "",
    number: int = 0,
    pose: Pose | None = None,
    scale: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Any:
    red, green, blue = TRUTH_COLOUR
    return _message(
        "visualization_msgs/msg/Marker",
        header=header(frame.stamp_ns, MAP),
        ns=namespace,
        id=number,
        type=1,  # CUBE
        action=action,
        pose=pose_message(pose or Pose.identity()),
        scale=vector(scale),
        color=_message("std_msgs/msg/ColorRGBA", r=red, g=green, b=blue, a=0.4),
        lifetime=_message("builtin_interfaces/msg/Duration", sec=0, nanosec=0),
        frame_locked=False,
        points=[],
        colors=[],
        texture_resource="",
        texture=_no_picture(),
        uv_coordinates=[],
        text=frame.sample_token,
        mesh_resource="",
        mesh_file=_message("visualization_msgs/msg/MeshFile", filename="", data=np.zeros(0, np.uint8)),
        mesh_use_embedded_materials=False,
    )


def _no_picture() -> Any:
    """The empty texture of a marker that has none."""
    return _message(
        "sensor_msgs/msg/CompressedImage", header=header(0, ""), format="", data=np.zeros(0, np.uint8)
    )


def ego_poses(frames: tuple[Frame, ...]) -> list[EgoPose]:
    """Every ego pose of a scene (each camera's and the lidar's), in time order, one for a stamp.

    The twist of a frame is the difference to its neighbours' reference poses; its cameras share it.
    """
    by_stamp: dict[int, EgoPose] = {}
    for i, frame in enumerate(frames):
        before, after = frames[max(i - 1, 0)], frames[min(i + 1, len(frames) - 1)]
        elapsed = (after.stamp_ns - before.stamp_ns) * 1e-9
        moved, turned = np.zeros(3), 0.0
        if elapsed > 0:
            moved = (after.ego2global.translation - before.ego2global.translation) / elapsed
            turned = wrap_angle(after.ego2global.yaw() - before.ego2global.yaw()) / elapsed
        stamped = [(c.stamp_ns, c.ego2global) for c in frame.cameras] + [(frame.stamp_ns, frame.ego2global)]
        for stamp, pose in stamped:
            velocity = quaternion_to_matrix(pose.rotation).T @ moved
            by_stamp[stamp] = EgoPose(stamp, pose, velocity, turned)
    return [by_stamp[stamp] for stamp in sorted(by_stamp)]
