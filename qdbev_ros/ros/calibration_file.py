# SPDX-License-Identifier: Apache-2.0
"""Calibration of a rig as one YAML file, for bags and vehicles without usable CameraInfo or transforms.

cameras.NAME.intrinsics {width, height, fx, fy, cx, cy}: pixels of the rectified picture. cameras.NAME.extrinsics and
model_frame {x, y, z, qw, qx, qy, qz}: metres and unit quaternion, optical frame (x right, y down, z forward) or model
frame (x right, y forward, z up) -> vehicle frame (x forward, y left, z up). Every part may be left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.files import write_text
from qdbev_ros.core.geometry import CameraCalibration, Pose
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.camera_state import Intrinsics
from qdbev_ros.ros.presets import TopicPreset

PIXELS = ("width", "height", "fx", "fy", "cx", "cy")
POSE = ("x", "y", "z", "qw", "qx", "qy", "qz")


@dataclass(frozen=True)
class RigCalibration:
    """What a calibration file holds; cameras that it leaves out have theirs from topics."""

    intrinsics: dict[str, Intrinsics] = field(default_factory=dict)
    extrinsics: dict[str, Pose] = field(default_factory=dict)  # camera -> vehicle frame
    model: Pose | None = None  # model frame -> vehicle frame
    path: str = ""  # of the file


def load_calibration(path: str | Path) -> RigCalibration:
    """Reads a calibration file. Raises ConfigError: one line that names the file and the key."""
    path = Path(path).expanduser()
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such calibration file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    content = _mapping(path, "", content, ("cameras", "model_frame"))
    intrinsics, extrinsics = {}, {}
    for camera, parts in _mapping(path, "cameras", content.get("cameras") or {}, CAMERAS).items():
        key = f"cameras.{camera}"
        parts = _mapping(path, key, parts, ("intrinsics", "extrinsics"))
        if "intrinsics" in parts:
            intrinsics[camera] = _intrinsics(path, f"{key}.intrinsics", parts["intrinsics"])
        if "extrinsics" in parts:
            extrinsics[camera] = _pose(path, f"{key}.extrinsics", parts["extrinsics"])
    model = _pose(path, "model_frame", content["model_frame"]) if "model_frame" in content else None
    return RigCalibration(intrinsics, extrinsics, model, str(path))


def calibration_for(preset: TopicPreset, path: str) -> RigCalibration:
    """The calibration file `path`, or none where that is empty. Raises ConfigError where a camera has no intrinsics."""
    calibration = load_calibration(path) if path else RigCalibration()
    without = [c for c in CAMERAS if not preset.info_topic(c) and c not in calibration.intrinsics]
    if without:
        raise ConfigError(
            f"preset {preset.name} has no CameraInfo: parameter calibration must name a file that holds the "
            f"intrinsics of {', '.join(without)}"
        )
    return calibration


def write_calibration(path: Path, cameras: Mapping[str, CameraCalibration], model: Pose) -> None:
    """Writes the calibration of a rig, readable by load_calibration. Raises DataError where it cannot."""
    content = {
        "model_frame": _pose_numbers(model),
        "cameras": {
            name: {
                "intrinsics": dict(zip(PIXELS, _intrinsic_numbers(camera), strict=True)),
                "extrinsics": _pose_numbers(camera.sensor2ego),
            }
            for name, camera in cameras.items()
        },
    }
    write_text(path, yaml.safe_dump(content, sort_keys=False))


def _intrinsic_numbers(camera: CameraCalibration) -> list[float]:
    k = camera.intrinsics
    return [camera.width, camera.height, *(float(v) for v in (k[0, 0], k[1, 1], k[0, 2], k[1, 2]))]


def _pose_numbers(pose: Pose) -> dict[str, float]:
    return dict(zip(POSE, (float(v) for v in (*pose.translation, *pose.rotation)), strict=True))


def _mapping(path: Path, key: str, value: Any, known: tuple[str, ...]) -> dict[str, Any]:
    where = f"{path}: key {key!r}" if key else f"{path}"
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a mapping with {', '.join(known)}")
    for name in value:
        if name not in known:
            full = f"{key}.{name}" if key else str(name)
            raise ConfigError(f"{path}: unknown key {full!r}; known: {', '.join(known)}")
    return value


def _numbers(path: Path, key: str, value: Any, names: tuple[str, ...]) -> list[float]:
    value = _mapping(path, key, value, names)
    numbers = []
    for name in names:
        number = value.get(name)
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ConfigError(f"{path}: key '{key}.{name}' must be a number, got {number!r}")
        numbers.append(float(number))
    return numbers


def _intrinsics(path: Path, key: str, value: Any) -> Intrinsics:
    width, height, fx, fy, cx, cy = _numbers(path, key, value, PIXELS)
    for name, number in zip(PIXELS[:4], (width, height, fx, fy)):
        if number <= 0 or (name in ("width", "height") and number != int(number)):
            raise ConfigError(
                f"{path}: key '{key}.{name}' must be positive (whole pixels for a size): {number:g}"
            )
    return Intrinsics(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), int(width), int(height))


def _pose(path: Path, key: str, value: Any) -> Pose:
    x, y, z, *rotation = _numbers(path, key, value, POSE)
    length = math.hypot(*rotation)
    if abs(length - 1) > 1e-2:
        raise ConfigError(
            f"{path}: key '{key}': the quaternion qw qx qy qz has length {length:.3f} instead of 1"
        )
    return Pose(np.array(rotation), np.array([x, y, z]))
