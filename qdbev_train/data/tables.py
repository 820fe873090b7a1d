# SPDX-License-Identifier: Apache-2.0
"""Reads the tables of a data set in nuScenes format into frames. numpy alone: no devkit, no torch.

Conventions are those of BEVFormer's converter and of the devkit: the reference time is LIDAR_TOP's, velocities are
centred differences as in the devkit's box_velocity, CAN messages keep the reference's one-message skew.
"""

from __future__ import annotations

import gc
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.geometry import Array, CameraCalibration, Pose
from qdbev_ros.core.variant import CAMERAS, CLASSES
from qdbev_train.data.frames import Annotations, CameraFrame, Frame

Record = dict[str, Any]

LIDAR = "LIDAR_TOP"
MAX_VELOCITY_GAP_S = 1.5  # the devkit's box_velocity; twice that for centred differences

# The ten detection classes by nuScenes category; every other category is no detection target.
CATEGORY_TO_CLASS = {
    "movable_object.barrier": "barrier",
    "movable_object.trafficcone": "traffic_cone",
    "vehicle.bicycle": "bicycle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.car": "car",
    "vehicle.construction": "construction_vehicle",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.trailer": "trailer",
    "vehicle.truck": "truck",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
}


def load_scenes(
    root: Path, version: str, split: str | None = None, scenes: Sequence[str] | None = None
) -> dict[str, tuple[Frame, ...]]:
    """Frames by scene name, scenes in the order of scene.json, frames in time order.

    root / version holds the tables. `scenes` names the scenes wanted, `split` those of a split that are in the tables;
    with both a scene must be in both, with neither all are read. Raises DataError naming the table and the token.
    """
    with _without_garbage_collection():
        return _load_scenes(Path(root), version, split, scenes)


def all_frames(scenes: dict[str, tuple[Frame, ...]]) -> list[Frame]:
    """The frames of all scenes, scene after scene."""
    return [frame for frames in scenes.values() for frame in frames]


def split_scenes(tables: Path, split: str) -> list[str]:
    """Scene names of a split, found as the devkit finds them: the official lists (which come with nuscenes-devkit)
    first, then splits.json beside the tables."""
    try:
        from nuscenes.utils.splits import create_splits_scenes

        official: dict[str, list[str]] = create_splits_scenes()
    except ImportError:
        official = {}
    if split in official:
        return official[split]
    custom = tables / "splits.json"
    names = json.loads(custom.read_bytes()).get(split) if custom.is_file() else None
    if names is not None:
        return list(names)
    if not official:
        raise DataError(
            f"split {split!r}: the official lists come with nuscenes-devkit, which isn't installed here"
        )
    raise DataError(f"no split {split!r}: neither in {custom} nor official ({', '.join(sorted(official))})")


class _Tables:
    """The JSON tables of one version, each read once, looked up by token."""

    def __init__(self, root: Path, version: str) -> None:
        self.folder = root / version
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; give the data root that holds {version}/ and samples/")
        if not self.folder.is_dir():
            versions = sorted(p.parent.name for p in root.glob("*/scene.json"))
            found = f"versions here: {', '.join(versions)}" if versions else "no version with tables here"
            raise DataError(f"{self.folder}: no such folder of tables; {found}")
        self._by_token: dict[str, dict[str, Record]] = {}

    def read(self, name: str) -> list[Record]:
        """All records of a table."""
        path = self.folder / f"{name}.json"
        try:
            records = json.loads(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path}: table cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise DataError(f"{path}: not JSON: {error}") from error
        if not isinstance(records, list):
            raise DataError(f"{path}: a table must be a list of records")
        return records

    def get(self, name: str, token: str, wanted_by: str) -> Record:
        """The record with `token`; `wanted_by` names the record that refers to it."""
        if name not in self._by_token:
            self._by_token[name] = {r["token"]: r for r in self.read(name)}
        record = self._by_token[name].get(token)
        if record is None:
            raise DataError(f"{self.folder / name}.json: no record {token!r}, which {wanted_by} refers to")
        return record

    def records(self, name: str) -> dict[str, Record]:
        """All records of a table by token."""
        if name not in self._by_token:
            self._by_token[name] = {r["token"]: r for r in self.read(name)}
        return self._by_token[name]


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Reading makes many small records and no garbage: the collector would only search in vain."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _load_scenes(
    root: Path, version: str, split: str | None, names: Sequence[str] | None
) -> dict[str, tuple[Frame, ...]]:
    tables = _Tables(root, version)
    try:
        records = _wanted_scenes(tables, split, names)
        samples = {r["name"]: _scene_samples(tables, r) for r in records}
        tokens = {s["token"] for scene in samples.values() for s in scene}
        sensors = _SensorReader(tables, root, tokens)
        annotations = _annotations_by_sample(tables, tokens)
        scenes = {}
        for name, scene in samples.items():
            can = _CanBus.read(root / "can_bus" / f"{name}_pose.json")
            scenes[name] = tuple(_frame(s, name, sensors, annotations, can) for s in scene)
        return scenes
    except KeyError as error:
        raise DataError(
            f"{tables.folder}: a record has no field {error}; are these nuScenes tables?"
        ) from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{tables.folder}: a record cannot be used: {error}") from error


def _wanted_scenes(tables: _Tables, split: str | None, names: Sequence[str] | None) -> list[Record]:
    records = tables.read("scene")
    known = {r["name"] for r in records}
    missing = [n for n in names or () if n not in known]
    if missing:
        some = ", ".join(sorted(known)[:5])
        raise DataError(
            f"{tables.folder}/scene.json: no scene {missing[0]!r}; there are {len(known)}: {some} ..."
        )
    if split is not None:
        listed = set(split_scenes(tables.folder, split))
        records = [r for r in records if r["name"] in listed]
    if names is not None:
        records = [r for r in records if r["name"] in set(names)]
    if not records:
        raise DataError(f"{tables.folder}/scene.json: none of its {len(known)} scenes is in split {split!r}")
    return records


def _scene_samples(tables: _Tables, scene: Record) -> list[Record]:
    """The samples of a scene in time order, followed from token to token."""
    samples: list[Record] = []
    token, origin = scene["first_sample_token"], f"scene {scene['name']}"
    while token:
        sample = tables.get("sample", token, origin)
        samples.append(sample)
        token, origin = sample["next"], f"sample {token}"
        if len(samples) > scene["nbr_samples"]:
            raise DataError(
                f"{tables.folder}/sample.json: scene {scene['name']} goes on after its {scene['nbr_samples']} samples"
            )
    return samples


class _SensorReader:
    """Key-frame sensor readings by sample and channel, with their calibrations and ego poses."""

    def __init__(self, tables: _Tables, root: Path, sample_tokens: set[str]) -> None:
        self._tables, self._root = tables, root
        self._calibrations: dict[tuple[str, int, int], CameraCalibration] = {}
        self._channel: dict[str, str] = {}
        self._by_sample: dict[str, dict[str, Record]] = defaultdict(dict)
        for record in tables.read("sample_data"):
            if record["is_key_frame"] and record["sample_token"] in sample_tokens:
                channel = self._channel_of(record["calibrated_sensor_token"], record["token"])
                self._by_sample[record["sample_token"]][channel] = record

    def _channel_of(self, calibrated_token: str, data_token: str) -> str:
        if calibrated_token not in self._channel:
            calibrated = self._tables.get("calibrated_sensor", calibrated_token, f"sample_data {data_token}")
            sensor = self._tables.get(
                "sensor", calibrated["sensor_token"], f"calibrated_sensor {calibrated_token}"
            )
            self._channel[calibrated_token] = sensor["channel"]
        return self._channel[calibrated_token]

    def record(self, sample_token: str, channel: str) -> Record:
        record = self._by_sample[sample_token].get(channel)
        if record is None:
            raise DataError(
                f"{self._tables.folder}/sample_data.json: sample {sample_token} has no {channel} key frame"
            )
        return record

    def ego2global(self, record: Record) -> Pose:
        return _pose(self._tables.get("ego_pose", record["ego_pose_token"], f"sample_data {record['token']}"))

    def sensor2ego(self, record: Record) -> Pose:
        return _pose(self._tables.records("calibrated_sensor")[record["calibrated_sensor_token"]])

    def camera(self, sample_token: str, channel: str) -> CameraFrame:
        record = self.record(sample_token, channel)
        key = (record["calibrated_sensor_token"], record["width"], record["height"])
        if key not in self._calibrations:
            calibrated = self._tables.records("calibrated_sensor")[key[0]]
            intrinsics = np.array(calibrated["camera_intrinsic"], np.float64)
            self._calibrations[key] = CameraCalibration(
                channel, intrinsics, key[1], key[2], _pose(calibrated)
            )
        return CameraFrame(
            self._calibrations[key],
            self._root / record["filename"],
            record["timestamp"] * 1000,
            self.ego2global(record),
        )


def _pose(record: Record) -> Pose:
    return Pose(np.array(record["rotation"]), np.array(record["translation"]))


def _frame(
    sample: Record, scene: str, sensors: _SensorReader, annotations: _AnnotationTable, can: _CanBus | None
) -> Frame:
    token = sample["token"]
    lidar = sensors.record(token, LIDAR)
    lidar2ego, ego2global = sensors.sensor2ego(lidar), sensors.ego2global(lidar)
    return Frame(
        sample_token=token,
        scene=scene,
        stamp_ns=lidar["timestamp"] * 1000,
        lidar2ego=lidar2ego,
        ego2global=ego2global,
        cameras=tuple(sensors.camera(token, channel) for channel in CAMERAS),
        annotations=annotations.of_sample(token, (ego2global @ lidar2ego).inverse()),
        can_dynamics=None if can is None else can.dynamics(sample["timestamp"]),
    )


class _AnnotationTable:
    """Annotations of the ten classes as arrays over all A records, and which rows belong to a sample."""

    def __init__(self, tables: _Tables, records: list[Record], velocities: Array, labels: list[int]) -> None:
        attribute = {t: r["name"] for t, r in tables.records("attribute").items()}
        self._rows: dict[str, list[int]] = defaultdict(list)
        for row, record in enumerate(records):
            self._rows[record["sample_token"]].append(row)
        count = len(records)
        self._centers = np.array([r["translation"] for r in records], np.float64).reshape(count, 3)
        self._sizes = np.array([r["size"] for r in records], np.float64).reshape(count, 3)
        w, x, y, z = np.array([r["rotation"] for r in records], np.float64).reshape(count, 4).T
        self._yaws = np.arctan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z))
        self._velocities, self._labels = velocities, np.array(labels, np.int64)
        self._points = np.array([r["num_lidar_pts"] + r["num_radar_pts"] for r in records], np.int64)
        self._visibility = np.array([int(r["visibility_token"] or 0) for r in records], np.int64)
        self._instances = [r["instance_token"] for r in records]
        self._attributes = [
            attribute[r["attribute_tokens"][0]] if r["attribute_tokens"] else "" for r in records
        ]

    def of_sample(self, token: str, global2lidar: Pose) -> Annotations:
        rows = self._rows.get(token, [])
        boxes = Boxes(
            self._centers[rows],
            self._sizes[rows],
            self._yaws[rows],
            self._velocities[rows],
            np.ones(len(rows)),
            self._labels[rows],
        )
        return Annotations(
            boxes.transformed(global2lidar),
            tuple(self._instances[r] for r in rows),
            tuple(self._attributes[r] for r in rows),
            self._points[rows],
            self._visibility[rows],
        )


def _annotations_by_sample(tables: _Tables, sample_tokens: set[str]) -> _AnnotationTable:
    everything = [r for r in tables.read("sample_annotation") if r["sample_token"] in sample_tokens]
    labels = {token: _label(tables, record) for token, record in tables.records("instance").items()}
    kept, kept_labels = [], []
    for record in everything:
        if record["instance_token"] not in labels:
            tables.get("instance", record["instance_token"], f"sample_annotation {record['token']}")
        label = labels[record["instance_token"]]
        if label is not None:
            kept.append(record)
            kept_labels.append(label)
    return _AnnotationTable(tables, kept, _velocities(tables, kept), kept_labels)


def _label(tables: _Tables, instance: Record) -> int | None:
    category = tables.get("category", instance["category_token"], f"instance {instance['token']}")["name"]
    name = CATEGORY_TO_CLASS.get(category)
    return None if name is None else CLASSES.index(name)


def _velocities(tables: _Tables, records: list[Record]) -> Array:
    """(A, 2) m/s in global axes as the devkit's box_velocity: NaN where no neighbour is near enough in time."""
    row = {r["token"]: i for i, r in enumerate(records)}

    def neighbours(field: str) -> NDArray[np.int64]:
        rows = np.arange(len(records))
        for i, record in enumerate(records):
            token = record[field]
            if token:
                if token not in row:
                    raise DataError(
                        f"{tables.folder}/sample_annotation.json: no record {token!r},"
                        f" which sample_annotation {record['token']} refers to"
                    )
                rows[i] = row[token]
        return rows

    first, last = neighbours("prev"), neighbours("next")
    samples = tables.records("sample")
    time = np.array([1e-6 * samples[r["sample_token"]]["timestamp"] for r in records], np.float64)
    position = np.array([r["translation"] for r in records], np.float64).reshape(-1, 3)[:, :2]
    here = np.arange(len(records))
    limit = np.where((first != here) & (last != here), 2 * MAX_VELOCITY_GAP_S, MAX_VELOCITY_GAP_S)
    elapsed = time[last] - time[first]
    known = (first != last) & (elapsed <= limit)
    velocity = (position[last] - position[first]) / np.where(known, elapsed, 1.0)[:, None]
    return np.where(known[:, None], velocity, np.nan)


class _CanBus:
    """The "pose" messages of a scene's CAN bus file."""

    def __init__(self, utimes: NDArray[np.int64], dynamics: Array) -> None:
        self._utimes, self._dynamics = utimes, dynamics

    @staticmethod
    def read(path: Path) -> _CanBus | None:
        """The messages of can_bus/<scene>_pose.json; None where the scene has no such file, as some in nuScenes."""
        if not path.is_file():
            return None
        try:
            messages = json.loads(path.read_bytes())
            utimes = np.array([m["utime"] for m in messages], np.int64)
            dynamics = np.array([m["accel"] + m["rotation_rate"] + m["vel"] for m in messages], np.float64)
            if dynamics.shape != (len(utimes), 9) or not len(utimes):
                raise ValueError(f"{len(utimes)} messages with {dynamics.shape[1:]} numbers, expected 9")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not a CAN bus pose file: {error}") from error
        return _CanBus(utimes, dynamics)

    def dynamics(self, timestamp_us: int) -> Array:
        """(9,) of a sample: BEVFormer's converter takes them from the first message *after* the sample (20 ms late),
        and released weights were trained so; the last message where none comes after."""
        index = int(np.searchsorted(self._utimes, timestamp_us, side="right"))
        return self._dynamics[min(index, len(self._utimes) - 1)]
