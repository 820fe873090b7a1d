# SPDX-License-Identifier: Apache-2.0
"""From a set of pictures to a job: each camera's calibration and all poses, or the reason for doing without. No ROS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from qdbev_ros.core.geometry import CameraCalibration, Pose
from qdbev_ros.core.pose_buffer import TransformTree, TransformUnavailable
from qdbev_ros.core.synchroniser import FrameSet
from qdbev_ros.ros.calibration_file import RigCalibration
from qdbev_ros.ros.camera_state import CameraState

NO_PICTURE = "no picture in time"


@dataclass(frozen=True)
class Frames:
    """Names of the vehicle's and the model's frame."""

    base: str
    model: str


@dataclass(frozen=True)
class CameraJob:
    """One camera's message with its calibration and the vehicle's pose at the message's stamp."""

    message: Any  # sensor_msgs/CompressedImage or Image
    calibration: CameraCalibration
    ego2global: Pose


@dataclass(frozen=True)
class Job:
    """A set with every pose it needs. missing: camera -> why it is left out. `arrived` is when its last picture came.

    ego_problem: why the vehicle's motion is unknown, or None; all ego2global are the identity then.
    """

    stamp_ns: int
    spread_s: float
    cameras: dict[str, CameraJob]
    missing: dict[str, str]
    ego2global: Pose
    lidar2ego: Pose
    ego_problem: str | None
    arrived: float


class Assembler:
    """Makes jobs. What may still arrive is waited for, up to `timeout_s` for each set, but in vain only once: what did
    not come (a camera's CameraInfo, the ego motion) delays no further set until it is there or almost up to date.
    """

    def __init__(
        self,
        tree: TransformTree,
        cameras: Mapping[str, CameraState],
        frames: Frames,
        calibration: RigCalibration,
        frame_of: Callable[[str, Any], str],
        ego_pose: Callable[[int], Pose],
        timeout_s: float,
    ) -> None:
        """frame_of(camera, message) names the frame of a picture; `calibration` wins over topics. ego_pose(stamp_ns)
        is where the vehicle is, and raises TransformUnavailable.
        """
        self._tree = tree
        self._cameras = cameras
        self._frames = frames
        self._calibration = calibration
        self._frame_of = frame_of
        self._ego_pose = ego_pose
        self.timeout_s = timeout_s
        self._in_vain: set[str] = set()

    def assemble(self, images: FrameSet[Any], waited_s: float) -> Job | None:
        """The job of a set that has waited for `waited_s`, or None: it should wait on.

        Raises TransformUnavailable where no set can be answered: nothing says where the model frame is.
        """
        missing = dict.fromkeys(images.missing, NO_PICTURE)
        calibrations = {}
        try:
            lidar2ego = self._or_wait("model frame", waited_s, partial(self._model_pose, images.stamp_ns))
            for name, image in images.images.items():
                try:
                    make = partial(self._calibrate, name, image.payload, image.stamp_ns)
                    calibrations[name] = self._or_wait(name, waited_s, make)
                except TransformUnavailable as error:
                    missing[name] = str(error)
            ego, ego_problem = self._ego_poses(images, waited_s)
        except _Wait:
            return None
        cameras = {
            name: CameraJob(images.images[name].payload, calibration, ego[images.images[name].stamp_ns])
            for name, calibration in calibrations.items()
        }
        arrived = max(image.arrived_s for image in images.images.values())
        return Job(
            images.stamp_ns, images.spread_s, cameras, missing, ego[images.stamp_ns], lidar2ego, ego_problem, arrived
        )  # fmt: skip

    def _or_wait(self, key: str, waited_s: float, make: Callable[[], Any]) -> Any:
        """What `make` gives. Raises _Wait while its TransformUnavailable may pass, and then that."""
        try:
            made = make()
        except TransformUnavailable as error:
            hopeful = key not in self._in_vain or 0 < error.late_s <= self.timeout_s
            if error.wait and hopeful and waited_s < self.timeout_s:
                raise _Wait from error
            self._in_vain.add(key)
            raise
        self._in_vain.discard(key)
        return made

    def _model_pose(self, stamp_ns: int) -> Pose:
        frames = self._frames
        return self._calibration.model or self._tree.lookup(frames.base, frames.model, stamp_ns, rigid=True)

    def _calibrate(self, camera: str, message: Any, stamp_ns: int) -> CameraCalibration:
        """Intrinsics and mounting of a camera. Raises TransformUnavailable where either is lacking."""
        state = self._cameras[camera]
        if state.intrinsics is None:
            problem = state.info_error or "no CameraInfo"
            raise TransformUnavailable(f"{state.info_topic}: {problem}", wait=state.info_error is None)
        known, mounted = state.intrinsics, self._calibration.extrinsics.get(camera)
        if mounted is None:
            frame = self._frame_of(camera, message)
            if not self._tree.has(frame):
                text = f"no transform names {frame!r}, the frame of the pictures on {state.image_topic}"
                raise TransformUnavailable(text, wait=True)
            mounted = self._tree.lookup(self._frames.base, frame, stamp_ns, rigid=True)
        return CameraCalibration(camera, known.matrix, known.width, known.height, mounted)

    def _ego_poses(self, images: FrameSet[Any], waited_s: float) -> tuple[dict[int, Pose], str | None]:
        """The vehicle's pose at every stamp of the set; identities and the reason where one is not to be had."""
        stamps = {image.stamp_ns for image in images.images.values()}
        try:
            poses = self._or_wait(
                "ego motion", waited_s, lambda: {stamp: self._ego_pose(stamp) for stamp in stamps}
            )
        except TransformUnavailable as error:
            return dict.fromkeys(stamps, Pose.identity()), str(error)
        return poses, None


class _Wait(Exception):
    """Something may still arrive."""
