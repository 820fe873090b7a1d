# SPDX-License-Identifier: Apache-2.0
"""A bag and the node's answers to it as one Rerun recording (.rrd). Works without a running ROS.

Entities: world (the fixed frame), world/ego (the vehicle), world/model/{detections,motion}, world/truth and
world/CAM_X/image; below detections and truth, heading. Model frame and cameras stand in the fixed frame, where the
vehicle had them at the stamp of the answer and of the picture: it moves on between those, boxes and pictures must not.
"""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.drawing import COLORS, LAYOUT, TRUTH_COLOR
from qdbev_ros.core.encodings import raw_picture
from qdbev_ros.core.errors import ConfigError, DataError
from qdbev_ros.core.files import whole_file
from qdbev_ros.core.geometry import Pose
from qdbev_ros.core.pose_buffer import TransformUnavailable
from qdbev_ros.core.variant import CAMERAS, CLASSES
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.calibration_file import RigCalibration
from qdbev_ros.ros.encode import MOVING_ARROW
from qdbev_ros.ros.presets import TopicPreset
from qdbev_ros.ros.recording import (
    read_detections,
    read_intrinsics,
    read_motion,
    read_transforms,
    read_truth,
    stamp_ns,
)

INSTALL = "pip install --no-deps -r requirements/rerun.txt"
APPLICATION = "qdbev"
BACKGROUND = (24, 26, 30)
ARROW_RADIUS = 0.08  # m
AXES = 3.0  # m, of the vehicle
PICTURE_DISTANCE = 2.5  # m from a camera to where its picture hangs in 3D
ADVICE = "--calibration FILE can say what the bag does not"


def export(
    bag: BagReader,
    recording: BagReader,
    preset: TopicPreset,
    calibration: RigCalibration,
    node: str,
    threshold: float,
    out: Path,
) -> tuple[Counter[str], dict[str, str]]:
    """Writes pictures and ground truth of `bag` and the answers of `recording` to `out`.

    What it holds, counted; and camera -> why it is left out. What `calibration` holds wins over the bag. Answers below
    `threshold` are left out. Raises ConfigError without Rerun, DataError where there is nothing to show.
    """
    rerun = _rerun()
    answers = read_detections(recording, node)
    if not answers:
        raise DataError(f"recording {recording.path} holds no answers on /{node}/detections")
    bag.require_cameras(replace(preset, infos={}))
    places = _Places(bag, preset, calibration)
    try:
        places.model(min(answers))
    except TransformUnavailable as error:
        raise DataError(
            f"bag {bag.path}: nothing says where the model frame {preset.model_frame!r} is ({error}): {ADVICE}"
        ) from error
    stream = rerun.RecordingStream(APPLICATION, recording_id=bag.path.stem)
    writer = _Writer(rerun, stream, places, preset)
    with whole_file(out) as temporary:
        _save(stream, temporary)
        stream.log("world", rerun.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
        for stamp, boxes in sorted(answers.items()):
            writer.detections(stamp, boxes.select(boxes.scores >= threshold))
        for stamp, boxes in sorted(read_truth(bag, preset.annotations).items() if preset.annotations else ()):
            writer.truth(stamp, boxes)
        left_out = writer.pictures(bag, calibration)
        stream.disconnect()
    return writer.counts, left_out


class _Places:
    """Where vehicle, cameras and model frame are, as the node looks them up. All raise TransformUnavailable."""

    def __init__(self, bag: BagReader, preset: TopicPreset, calibration: RigCalibration) -> None:
        self._preset = preset
        self._calibration = calibration
        self._tree = read_transforms(bag)
        self.ego = read_motion(bag, preset, self._tree)

    def model(self, stamp: int) -> Pose:
        return self._calibration.model or self._mounting(self._preset.model_frame, stamp)

    def camera(self, camera: str, header: Any) -> Pose:
        """Of a picture with this header."""
        given = self._calibration.extrinsics.get(camera)
        return given or self._mounting(self._preset.image_frame(camera, header.frame_id), stamp_ns(header))

    def _mounting(self, frame: str, stamp: int) -> Pose:
        return self._tree.lookup(self._preset.base_frame, frame, stamp, rigid=True)


class _Writer:
    """Logs entities at their stamps, and counts them."""

    def __init__(self, rerun: ModuleType, stream: Any, places: _Places, preset: TopicPreset) -> None:
        self.counts: Counter[str] = Counter()
        self._rerun: Any = rerun
        self._stream = stream
        self._places = places
        self._preset = preset
        self._last_ego = Pose.identity()

    def detections(self, stamp: int, boxes: Boxes) -> None:
        """Boxes in the model frame, and arrows for the motion in one second."""
        rerun = self._rerun
        self._place("world/model", self._ego(stamp) @ self._places.model(stamp))
        colors = np.array([COLORS[CLASSES[label]][::-1] for label in boxes.labels], np.uint8).reshape(-1, 3)
        labels = [f"{CLASSES[label]} {score:.2f}" for label, score in zip(boxes.labels, boxes.scores)]
        self._boxes("world/model/detections", boxes, colors, labels, width=2.0)
        moves = np.hypot(*boxes.velocities.T) >= MOVING_ARROW
        motion = np.column_stack([boxes.velocities, np.zeros(len(boxes))])
        arrows = rerun.Arrows3D(
            origins=boxes.centers[moves], vectors=motion[moves], colors=colors[moves], radii=ARROW_RADIUS
        )
        self._stream.log("world/model/motion", arrows)
        self.counts["sets"] += 1
        self.counts["detections"] += len(boxes)

    def truth(self, stamp: int, boxes: Boxes) -> None:
        """Annotated boxes in the fixed frame."""
        self._time(stamp)
        colors = np.tile(np.array(TRUTH_COLOR, np.uint8), (len(boxes), 1))
        self._boxes("world/truth", boxes, colors, [CLASSES[label] for label in boxes.labels], width=1.0)
        self.counts["annotations"] += len(boxes)

    def pictures(self, bag: BagReader, calibration: RigCalibration) -> dict[str, str]:
        """Every camera's pictures, with calibration and place at their own stamps; camera -> why it is left out."""
        preset, rerun = self._preset, self._rerun
        intrinsics, left_out = read_intrinsics(bag, preset, calibration.intrinsics)
        cameras = {preset.image_topic(camera): camera for camera in CAMERAS if camera in intrinsics}
        messages = bag.messages(list(cameras))
        total = sum(bag.counts[topic] for topic in cameras)
        self._last_ego = Pose.identity()  # time starts again
        for topic, _, message in tqdm(messages, "pictures", total, disable=None):
            camera, stamp = cameras[topic], stamp_ns(message.header)
            known = intrinsics[camera]
            try:
                place = self._places.camera(camera, message.header)
            except TransformUnavailable as error:
                left_out[camera] = str(error)
                continue
            self._place(f"world/{camera}", self._ego(stamp) @ place)
            entity = f"world/{camera}/image"
            size = [known.width, known.height]
            pinhole = rerun.Pinhole(
                image_from_camera=known.matrix, resolution=size, image_plane_distance=PICTURE_DISTANCE
            )
            self._stream.log(entity, pinhole)
            data, kind = _encoded(message, preset.image_type)
            self._stream.log(entity, rerun.EncodedImage(contents=data, media_type=kind))
            self.counts["pictures"] += 1
        if left_out:
            self.counts["cameras left out"] = len(left_out)
        return left_out

    def _boxes(self, entity: str, boxes: Boxes, colors: Any, labels: list[str], width: float) -> None:
        """Boxes with their headings; `width` of the lines in points of the screen."""
        radii = self._rerun.Radius.ui_points(width / 2)
        self._stream.log(
            entity,
            self._rerun.Boxes3D(
                centers=boxes.centers, half_sizes=boxes.lengths_first() / 2, quaternions=boxes.poses()[:, 3:],
                colors=colors, labels=labels, show_labels=False, radii=radii,
            ),
        )  # fmt: skip
        headings = np.stack([boxes.centers, boxes.noses()], axis=1)
        self._stream.log(f"{entity}/heading", self._rerun.LineStrips3D(headings, colors=colors, radii=radii))

    def _ego(self, stamp: int) -> Pose:
        """Logs the vehicle's place and returns it; it stays where it was when nothing says where it is."""
        self._time(stamp)
        try:
            self._last_ego = self._places.ego(stamp)
        except TransformUnavailable:
            self.counts["stamps without ego motion"] += 1
        self._place("world/ego", self._last_ego, axis_length=AXES)
        return self._last_ego

    def _place(self, entity: str, pose: Pose, axis_length: float = 0.0) -> None:
        w, x, y, z = pose.rotation
        placed = self._rerun.Transform3D(
            translation=pose.translation, quaternion=[x, y, z, w], axis_length=axis_length
        )
        self._stream.log(entity, placed)

    def _time(self, stamp: int) -> None:
        self._stream.set_time("stamp", timestamp=np.datetime64(stamp, "ns"))


def _encoded(message: Any, image_type: str) -> tuple[bytes, str]:
    """A picture's bytes and media type; raw ones become JPEG."""
    if image_type == "compressed":
        data = bytes(np.asarray(message.data))
        return data, "image/png" if data[:4] == b"\x89PNG" else "image/jpeg"
    picture = raw_picture(message.data, message.width, message.height, message.step, message.encoding)
    pixels = picture.pixels[:, :, 2::-1] if picture.red_first else picture.pixels[:, :, :3]
    return cv2.imencode(".jpg", np.ascontiguousarray(pixels))[1].tobytes(), "image/jpeg"


def layout() -> Any:
    """Cameras as on a wall, boxes projected into them, above the vehicle and its surroundings."""
    views: Any = importlib.import_module("rerun.blueprint")
    boxes = ["/world/truth/**", "/world/model/detections/**", "/world/model/motion"]
    pictures = [
        views.Spatial2DView(
            origin=f"/world/{camera}/image", name=camera, contents=["$origin", *boxes], background=BACKGROUND
        )
        for row in LAYOUT
        for camera in row
    ]
    places = [str(picture.origin) for picture in pictures]
    world = views.Spatial3DView(
        origin="/world/ego",
        name="world",
        contents=["/world/ego", *boxes, *places],
        # No frustums: Rerun draws them where they would stand in /world.
        overrides={place: views.VisualizerOverrides("EncodedImage") for place in places},
        background=BACKGROUND,
        eye_controls=views.EyeControls3D(position=(-20.0, 0.0, 14.0), look_target=(8.0, 0.0, 0.0)),
    )
    grid = views.Grid(*pictures, grid_columns=3)
    time = views.TimePanel(state="collapsed", timeline="stamp")
    return views.Blueprint(views.Vertical(grid, world, row_shares=[11, 10]), time, collapse_panels=True)


def _save(stream: Any, path: Path) -> None:
    """Has the stream write to `path`. Raises ConfigError where nothing can be written there."""
    try:
        stream.save(path, default_blueprint=layout())
    except RuntimeError as error:  # Rerun's own
        raise ConfigError(f"{path.parent}: cannot be written to: {' '.join(str(error).split())}") from error


def _rerun() -> ModuleType:
    try:
        return importlib.import_module("rerun")
    except ImportError as error:
        raise ConfigError(f"Rerun is not installed ({error}): {INSTALL}") from error
