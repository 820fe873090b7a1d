# SPDX-License-Identifier: Apache-2.0
"""Rows of the nuScenes tables: those of one scene, those that all scenes share, and how they become files."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qdbev_ros.core.files import write_text
from qdbev_ros.core.geometry import yaw_quaternion
from qdbev_train.synthetic.catalogue import CATEGORY
from qdbev_train.synthetic.layout import KEYFRAME, Town, TownObject
from qdbev_train.synthetic.plan import ScenePlan
from qdbev_train.synthetic.rig import LIDAR_ROTATION, LIDAR_TRANSLATION, Camera, unit_quaternion

Row = dict[str, Any]
SCENE_TABLES = (
    "log",
    "map",
    "scene",
    "sample",
    "sample_data",
    "ego_pose",
    "calibrated_sensor",
    "sample_annotation",
    "instance",
)
LIDAR = "LIDAR_TOP"
EPOCH_US = 1_600_000_000_000_000
ANNOTATED_WITHIN = 60.0  # metres from the ego car
STOPPED = 0.2  # m/s; slower is standing
ATTRIBUTES = (
    "vehicle.moving",
    "vehicle.stopped",
    "vehicle.parked",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "pedestrian.moving",
)


def token(*parts: object) -> str:
    """A nuScenes token: 32 hex digits that depend on the parts alone."""
    return hashlib.md5("/".join(map(str, ("town", *parts))).encode(), usedforsecurity=False).hexdigest()


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(content, separators=(",", ":")))


def first_stamp(scene: str) -> int:
    """The stamp (us) of a scene's first sample; scenes are 1000 s apart."""
    return EPOCH_US + int(scene.split("-")[1]) * 1_000_000_000


def sample_stamp(scene: str, frame: int) -> int:
    return first_stamp(scene) + round(frame * KEYFRAME * 1e6)


def shared_tables(channels: list[str]) -> dict[str, list[Row]]:
    """The tables that do not depend on the scenes."""
    levels = ("v0-40", "v40-60", "v60-80", "v80-100")
    return {
        "sensor": [
            {"token": token("sensor", c), "channel": c, "modality": "lidar" if c == LIDAR else "camera"}
            for c in channels
        ],
        "category": [
            {
                "token": token("category", name),
                "name": name,
                "description": f"Synthetic {cls.replace('_', ' ')}.",
            }
            for cls, name in CATEGORY.items()
        ],
        "attribute": [
            {"token": token("attribute", name), "name": name, "description": ""} for name in ATTRIBUTES
        ],
        "visibility": [
            {
                "token": str(i + 1),
                "level": level,
                "description": f"visibility of whole object is between {level[1:].replace('-', ' and ')}%",
            }
            for i, level in enumerate(levels)
        ],
    }


def frame_tables(plan: ScenePlan, rig: list[Camera], size: tuple[int, int]) -> dict[str, list[Row]]:
    """Everything of one scene but its annotations."""
    name = plan.name
    last = plan.frames - 1
    scene, log = token("scene", name), token("log", name)
    samples = [token("sample", name, k) for k in range(plan.frames)]
    rows: dict[str, list[Row]] = {table: [] for table in SCENE_TABLES}
    rows["log"].append(
        {
            "token": log,
            "logfile": f"town-{name}",
            "vehicle": "town",
            "date_captured": "2020-09-13",
            "location": "synthetic-town",
        }
    )
    rows["map"].append(
        {
            "token": token("map", name),
            "log_tokens": [log],
            "category": "semantic_prior",
            "filename": map_file(name),
        }
    )
    rows["scene"].append(
        {
            "token": scene,
            "log_token": log,
            "nbr_samples": plan.frames,
            "first_sample_token": samples[0],
            "last_sample_token": samples[last],
            "name": name,
            "description": "Synthetic town",
        }
    )
    for k, sample in enumerate(samples):
        rows["sample"].append(
            {
                "token": sample,
                "timestamp": sample_stamp(name, k),
                "scene_token": scene,
                "prev": samples[k - 1] if k else "",
                "next": samples[k + 1] if k < last else "",
            }
        )
    for channel, camera in [(LIDAR, None), *((c.channel, c) for c in rig)]:
        rows["calibrated_sensor"].append(_calibration(name, channel, camera))
        for k in range(plan.frames):
            pose, data = _sensor_data(plan, channel, camera, k, size)
            rows["ego_pose"].append(pose)
            rows["sample_data"].append(data)
    return rows


def map_file(scene: str) -> str:
    return f"maps/{token('map', scene)}.png"


def image_file(scene: str, camera: Camera, frame: int) -> str:
    stamp = sample_stamp(scene, frame) + camera.offset_us
    return f"samples/{camera.channel}/{scene}__{camera.channel}__{stamp}.jpg"


def _calibration(scene: str, channel: str, camera: Camera | None) -> Row:
    row: Row = {"token": token("calibrated_sensor", scene, channel), "sensor_token": token("sensor", channel)}
    if camera is None:
        return {
            **row,
            "translation": list(LIDAR_TRANSLATION),
            "rotation": unit_quaternion(LIDAR_ROTATION).tolist(),
            "camera_intrinsic": [],
        }
    return {
        **row,
        "translation": camera.translation.tolist(),
        "rotation": camera.quaternion.tolist(),
        "camera_intrinsic": camera.intrinsic.tolist(),
    }


def _sensor_data(
    plan: ScenePlan, channel: str, camera: Camera | None, k: int, size: tuple[int, int]
) -> tuple[Row, Row]:
    """The ego_pose and sample_data rows of one sensor in one frame."""
    name = plan.name
    stamp = sample_stamp(name, k) + (camera.offset_us if camera else 0)
    x, y, yaw = plan.town.ego.pose((stamp - first_stamp(name)) * 1e-6)
    this = token("sample_data", name, channel, k)
    pose = {
        "token": this,
        "timestamp": stamp,
        "rotation": yaw_quaternion(yaw).tolist(),
        "translation": [x, y, 0.0],
    }
    file = image_file(name, camera, k) if camera else f"samples/{LIDAR}/{name}__{LIDAR}__{stamp}.pcd.bin"
    data = {
        "token": this,
        "sample_token": token("sample", name, k),
        "ego_pose_token": this,
        "calibrated_sensor_token": token("calibrated_sensor", name, channel),
        "timestamp": stamp,
        "fileformat": "jpg" if camera else "pcd",
        "is_key_frame": True,
        "height": size[1] if camera else 0,
        "width": size[0] if camera else 0,
        "filename": file,
        "prev": token("sample_data", name, channel, k - 1) if k else "",
        "next": token("sample_data", name, channel, k + 1) if k < plan.frames - 1 else "",
    }
    return pose, data


def attribute(obj: TownObject, t: float) -> str | None:
    """The nuScenes attribute of an object at t seconds, None for barriers and cones."""
    moving = abs(obj.track.speed_at(t)) > STOPPED
    if obj.cls in ("motorcycle", "bicycle"):
        return "cycle.with_rider" if obj.look.shape.endswith("ridden") else "cycle.without_rider"
    if obj.cls == "pedestrian":
        return "pedestrian.moving" if moving else "pedestrian.standing"
    if obj.cls in ("barrier", "traffic_cone"):
        return None
    return "vehicle.parked" if obj.parked else "vehicle.moving" if moving else "vehicle.stopped"


def annotation(plan: ScenePlan, number: int, k: int, visibility: str, points: int) -> Row | None:
    """The row of object `number` in frame k without its chain; None where it is too far from the ego car."""
    obj, t = plan.objects[number], k * KEYFRAME
    x, y, yaw = obj.track.pose(t)
    ego = plan.town.ego.pose(t)
    if np.hypot(x - ego[0], y - ego[1]) > ANNOTATED_WITHIN:
        return None
    length, width, height = obj.look.size
    name = attribute(obj, t)
    return {
        "token": token("annotation", plan.name, number, k),
        "sample_token": token("sample", plan.name, k),
        "instance_token": token("instance", plan.name, number),
        "visibility_token": visibility,
        "attribute_tokens": [token("attribute", name)] if name else [],
        "translation": [x, y, height / 2],
        "size": [width, length, height],
        "rotation": yaw_quaternion(yaw).tolist(),
        "prev": "",
        "next": "",
        "num_lidar_pts": points,
        "num_radar_pts": 0,
    }


def chain(plan: ScenePlan, annotations: dict[int, list[Row]]) -> dict[str, list[Row]]:
    """Links each object's annotations (in time order) and makes its instance row."""
    instances, rows = [], []
    for number, own in annotations.items():
        for before, after in pairwise(own):
            before["next"], after["prev"] = after["token"], before["token"]
        rows += own
        instances.append(
            {
                "token": token("instance", plan.name, number),
                "nbr_annotations": len(own),
                "category_token": token("category", CATEGORY[plan.objects[number].cls]),
                "first_annotation_token": own[0]["token"],
                "last_annotation_token": own[-1]["token"],
            }
        )
    return {"sample_annotation": rows, "instance": instances}


def can_bus_poses(town: Town, scene: str) -> list[Row]:
    """nuScenes' CAN pose messages at 50 Hz, from half a second before the first sample to as long after the last."""
    rows = []
    step = 0.02
    for t in np.arange(-0.5, town.duration + 0.5, step):
        x, y, yaw = town.ego.pose(t)
        before, after = town.ego.pose(t - step), town.ego.pose(t + step)
        speed, rate = town.ego.speed_at(t), (after[2] - before[2]) / (2 * step)
        acceleration = (town.ego.speed_at(t + step) - town.ego.speed_at(t - step)) / (2 * step)
        rows.append(
            {
                "accel": [acceleration, speed * rate, 9.81],
                "orientation": yaw_quaternion(yaw).tolist(),
                "pos": [x, y, 0.0],
                "rotation_rate": [0.0, 0.0, rate],
                "utime": first_stamp(scene) + round(t * 1e6),
                "vel": [speed, 0.0, 0.0],
            }
        )
    return rows


def assemble(version_folder: Path, channels: list[str]) -> int:
    """Joins the part files of all finished scenes to the 13 tables; returns how many scenes there are."""
    tables = shared_tables(channels)
    tables.update({name: [] for name in SCENE_TABLES})
    parts = sorted((version_folder / ".parts").glob("*.json"))
    for part in parts:
        for name, rows in json.loads(part.read_text())["tables"].items():
            tables[name] += rows
    for name, rows in tables.items():
        write_json(version_folder / f"{name}.json", rows)
    return len(parts)
