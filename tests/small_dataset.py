# SPDX-License-Identifier: Apache-2.0
"""A data set in nuScenes format small enough to write in a test: two scenes, four frames, simple motion.

The ego drives straight along global x at 4 m/s from the origin; a car drives 10 m ahead of it at the same speed, a
pedestrian stands at (12, 3), a cone without any lidar point at (20, -4), a stroller (no detection class) beside it.
Scene names are of the official split mini_val, so the devkit scores it. Pictures are plain grey.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

VERSION = "v1.0-mini"
SCENES = ("scene-0103", "scene-0916")
FRAMES = 4
SPEED = 4.0
WIDTH, HEIGHT = 320, 180
START_US = {"scene-0103": 1_500_000_000_000_000, "scene-0916": 1_500_000_100_000_000}
# camera: heading of its optical axis in the ego frame (degrees), microseconds before the lidar
CAMERAS = {
    "CAM_FRONT": (0, 35_000),
    "CAM_FRONT_RIGHT": (-55, 27_000),
    "CAM_FRONT_LEFT": (55, 42_000),
    "CAM_BACK": (180, 10_000),
    "CAM_BACK_LEFT": (110, 0),
    "CAM_BACK_RIGHT": (-110, 19_000),
}
CATEGORIES = (
    "vehicle.car",
    "human.pedestrian.adult",
    "movable_object.trafficcone",
    "human.pedestrian.stroller",
)
ATTRIBUTES = ("vehicle.moving", "pedestrian.standing")
SIZES = ([2.0, 4.5, 1.6], [0.6, 0.7, 1.8], [0.4, 0.4, 0.8], [0.6, 0.9, 1.0])  # width, length, height


def write_small_dataset(root: Path) -> None:
    """Writes tables, pictures and a map below `root`."""
    tables: dict[str, list[dict[str, Any]]] = _fixed_tables()
    for name in SCENES:
        _add_scene(tables, name, root)
    folder = root / VERSION
    folder.mkdir(parents=True)
    for name, records in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    (root / "maps").mkdir()
    cv2.imwrite(str(root / "maps" / "map.png"), np.zeros((8, 8), np.uint8))


def _fixed_tables() -> dict[str, list[dict[str, Any]]]:
    half = np.radians(45)
    lidar = [float(np.cos(half)), 0.0, 0.0, float(-np.sin(half))]  # x right, y forward
    k = [[WIDTH / 2, 0, WIDTH / 2], [0, WIDTH / 2, HEIGHT / 2], [0, 0, 1]]
    calibrated = [_calibrated("LIDAR_TOP", [1.0, 0.0, 1.8], lidar, [])]
    for camera, (heading, _) in CAMERAS.items():
        calibrated.append(_calibrated(camera, [1.0, 0.0, 1.5], _looking(heading), k))
    return {
        "log": [{"token": "log", "logfile": "", "vehicle": "v", "date_captured": "", "location": "town"}],
        "map": [
            {"token": "map", "log_tokens": ["log"], "category": "semantic_prior", "filename": "maps/map.png"}
        ],
        "category": [{"token": c, "name": c, "description": ""} for c in CATEGORIES],
        "attribute": [{"token": a, "name": a, "description": ""} for a in ATTRIBUTES],
        "visibility": [{"token": str(v), "level": "", "description": ""} for v in range(1, 5)],
        "sensor": [{"token": s, "channel": s, "modality": _modality(s)} for s in ["LIDAR_TOP", *CAMERAS]],
        "calibrated_sensor": calibrated,
        "scene": [],
        "sample": [],
        "sample_data": [],
        "ego_pose": [],
        "instance": [],
        "sample_annotation": [],
    }


def _modality(channel: str) -> str:
    return "lidar" if channel == "LIDAR_TOP" else "camera"


def _calibrated(
    channel: str, translation: list[float], rotation: list[float], k: list[Any]
) -> dict[str, Any]:
    pose = {"translation": translation, "rotation": rotation}
    return {"token": channel, "sensor_token": channel, "camera_intrinsic": k} | pose


def _looking(heading: float) -> list[float]:
    """Quaternion of a camera (x right, y down, z forward) whose axis points to `heading` degrees left of ahead."""
    angle = np.radians(heading)
    ahead = np.array([np.cos(angle), np.sin(angle), 0.0])
    right = np.array([np.sin(angle), -np.cos(angle), 0.0])
    m = np.stack([right, [0.0, 0.0, -1.0], ahead], axis=1)
    # The rotation's quaternion is the eigenvector of this matrix (Bar-Itzhack), which has no special cases.
    trace = np.array(
        [
            [m[0, 0] - m[1, 1] - m[2, 2], 0, 0, 0],
            [m[1, 0] + m[0, 1], m[1, 1] - m[0, 0] - m[2, 2], 0, 0],
            [m[2, 0] + m[0, 2], m[2, 1] + m[1, 2], m[2, 2] - m[0, 0] - m[1, 1], 0],
            [m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], m.trace()],
        ]
    )
    x, y, z, w = np.linalg.eigh(trace)[1][:, -1]
    return [float(w), float(x), float(y), float(z)]


def _add_scene(tables: dict[str, list[dict[str, Any]]], name: str, root: Path) -> None:
    samples = [f"{name}-{i}" for i in range(FRAMES)]
    ends = {"first_sample_token": samples[0], "last_sample_token": samples[-1]}
    scene = {"token": name, "name": name, "log_token": "log", "nbr_samples": FRAMES, "description": ""}
    tables["scene"].append(scene | ends)
    for i, token in enumerate(samples):
        stamp = START_US[name] + 500_000 * i
        links = {"prev": samples[i - 1] if i else "", "next": samples[i + 1] if i + 1 < FRAMES else ""}
        tables["sample"].append({"token": token, "timestamp": stamp, "scene_token": name} | links)
        for channel in ("LIDAR_TOP", *CAMERAS):
            _add_reading(
                tables, root, token, channel, stamp - CAMERAS.get(channel, (0, 0))[1], START_US[name]
            )
    for number, category in enumerate(CATEGORIES):
        _add_object(tables, name, samples, number, category)


def _add_reading(
    tables: dict[str, list[dict[str, Any]]], root: Path, sample: str, channel: str, stamp: int, start: int
) -> None:
    token, camera = f"{sample}-{channel}", channel in CAMERAS
    file = f"samples/{channel}/{token}.{'jpg' if camera else 'bin'}"
    x = SPEED * (stamp - start) * 1e-6
    pose = {
        "token": token,
        "timestamp": stamp,
        "translation": [x, 0.0, 0.0],
        "rotation": [1.0, 0.0, 0.0, 0.0],
    }
    tables["ego_pose"].append(pose)
    size = {"width": WIDTH if camera else 0, "height": HEIGHT if camera else 0}
    tokens = {
        "token": token,
        "sample_token": sample,
        "ego_pose_token": token,
        "calibrated_sensor_token": channel,
    }
    kind = {"fileformat": "jpg" if camera else "bin", "is_key_frame": True, "prev": "", "next": ""}
    tables["sample_data"].append(tokens | size | kind | {"timestamp": stamp, "filename": file})
    if camera:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shade = np.full((HEIGHT, WIDTH, 3), 40 + 30 * list(CAMERAS).index(channel), np.uint8)
        cv2.imwrite(str(root / file), shade)


def _add_object(
    tables: dict[str, list[dict[str, Any]]], scene: str, samples: list[str], number: int, category: str
) -> None:
    instance = f"{scene}-object{number}"
    tokens = [f"{instance}-{i}" for i in range(len(samples))]
    ends = {"first_annotation_token": tokens[0], "last_annotation_token": tokens[-1]}
    record = {"token": instance, "category_token": category, "nbr_annotations": len(samples)}
    tables["instance"].append(record | ends)
    for i, token in enumerate(tokens):
        place = ([10.0 + SPEED * 0.5 * i, 0.0, 0.8], [12.0, 3.0, 0.9], [20.0, -4.0, 0.4], [21.0, -4.0, 0.5])[
            number
        ]
        links = {"prev": tokens[i - 1] if i else "", "next": tokens[i + 1] if i + 1 < len(tokens) else ""}
        counts = {"num_lidar_pts": 0 if number == 2 else 5, "num_radar_pts": 0}
        names = {
            "token": token,
            "sample_token": samples[i],
            "instance_token": instance,
            "visibility_token": "4",
        }
        attributes = {"attribute_tokens": [ATTRIBUTES[number]] if number < len(ATTRIBUTES) else []}
        shape = {"translation": place, "size": SIZES[number], "rotation": [1.0, 0.0, 0.0, 0.0]}
        tables["sample_annotation"].append(names | attributes | shape | counts | links)
