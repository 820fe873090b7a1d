# SPDX-License-Identifier: Apache-2.0
"""Parts of the index: samples, key-frame readings and CAN bus, each a set of arrays made from a few tables.

Rows are samples in the order of scene.json and of each scene's chain: S samples, N scenes, 7 channels (LIDAR_TOP
first, then CAMERAS). Everything that frames are made of later is checked here, so that a damaged table is named before
anything begins.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.errors import CalibrationError, DataError
from qdbev_ros.core.geometry import Array, CameraCalibration, Pose
from qdbev_ros.core.variant import CAMERAS
from qdbev_train.data.array_file import Arrays, Texts, pack_texts
from qdbev_train.data.json_tables import Progress, Record, Tables, flags, integers, numbers, rotations, texts

Rows = dict[str, int]
Ints = NDArray[np.int64]

CHANNELS = ("LIDAR_TOP", *CAMERAS)


def build_samples(tables: Tables) -> Arrays:
    """scene (texts, N), sample (texts, S) tokens, sample_ends (N,) where each scene's rows end, time_us (S,)."""
    scenes = list(tables.read("scene").values())
    samples = tables.read("sample")
    names = tables.checked("scene", scenes, lambda rs: texts(rs, "name"))
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{tables.path('scene')}: two scenes have the name {name!r}")
    ordered: list[Record] = []
    ends = []
    for scene, name in zip(scenes, names):
        ordered += _chain(tables, scene, name, samples)
        ends.append(len(ordered))
    if len(ordered) < len(samples):
        reached = {sample["token"] for sample in ordered}
        token = next(token for token in samples if token not in reached)
        raise DataError(f"{tables.path('sample')}: sample {token} is in no scene's chain")
    times = tables.checked("sample", ordered, lambda rs: integers(rs, "timestamp"))
    return {
        **pack_texts("scene", names),
        **pack_texts("sample", [sample["token"] for sample in ordered]),
        "scene_ends": np.array(ends, np.int64),
        "time_us": times,
    }


def _chain(tables: Tables, scene: Record, name: str, samples: dict[str, Record]) -> list[Record]:
    """The samples of a scene, followed from token to token, each later than the one before."""
    path = tables.path("sample")
    token = tables.checked("scene", [scene], lambda rs: texts(rs, "first_sample_token"))[0]
    count = int(tables.checked("scene", [scene], lambda rs: integers(rs, "nbr_samples"))[0])
    chain: list[Record] = []
    wanted_by, time = f"scene {name}", -1
    while token and len(chain) <= count:
        if token not in samples:
            raise tables.dangling("sample", token, wanted_by)
        sample = samples[token]
        chain.append(sample)
        now = int(tables.checked("sample", [sample], lambda rs: integers(rs, "timestamp"))[0])
        if len(chain) <= count and now <= time:
            raise DataError(f"{path}: sample {token} isn't later than the sample before it")
        wanted_by, time = f"sample {token}", now
        token = tables.checked("sample", [sample], lambda rs: texts(rs, "next"))[0]
    if len(chain) > count:
        raise DataError(f"{path}: scene {name} goes on after its {count} samples")
    if len(chain) < count:
        raise DataError(
            f"{path}: scene {name} ends after {len(chain)} of its {count} samples, at {wanted_by}"
        )
    if not chain:
        raise DataError(f"{tables.path('scene')}: scene {name} has no samples")
    return chain


def sample_rows(samples: Arrays) -> Rows:
    """Row by sample token."""
    tokens = Texts(samples, "sample")
    return {tokens[row]: row for row in range(len(tokens))}


def build_readings(tables: Tables, samples: Arrays) -> Arrays:
    """Key-frame readings of the seven channels.

    stamp_us (S, 7) · ego_rotation (S, 7, 4), ego_translation (S, 7, 3): ego2global at that stamp · image: texts, 6 a
    sample · calibration (S, 7): row of sensor_channel, sensor_rotation (C, 4), sensor_translation (C, 3), intrinsics
    (C, 3, 3; zeros for the lidar), width and height (C,)
    """
    readings = _Readings(tables, samples)
    for records in tables.stream("sample_data"):
        readings.add([r for r, key in zip(records, _key_frames(tables, records)) if key])
    readings.require_all()
    rotation, translation = _ego_poses(tables, readings.poses, readings.tokens)
    pose = readings.pose
    return {
        "stamp_us": readings.stamp,
        "ego_rotation": rotation[pose],
        "ego_translation": translation[pose],
        "calibration": readings.calibration.astype(np.int32),
        **pack_texts("image", [name for row in readings.images for name in row]),
        **readings.calibrations(),
    }


def _key_frames(tables: Tables, records: list[Record]) -> list[bool]:
    return tables.checked("sample_data", records, lambda rs: flags(rs, "is_key_frame"))


class _Readings:
    """Collects key-frame records into (S, 7) arrays; -1 where nothing came yet."""

    def __init__(self, tables: Tables, samples: Arrays) -> None:
        self._tables, self._samples = tables, sample_rows(samples)
        count = len(self._samples)
        self.stamp = np.full((count, len(CHANNELS)), -1, np.int64)
        self.pose = np.full((count, len(CHANNELS)), -1, np.int64)
        self.calibration = np.full((count, len(CHANNELS)), -1, np.int64)
        self.images = [[""] * len(CAMERAS) for _ in range(count)]
        self.poses: Rows = {}
        self.tokens: list[str] = []  # by row of `poses`: a sample_data that refers to it
        self._calibrated = list(tables.read("calibrated_sensor").values())
        self._calibrated_rows = {record["token"]: row for row, record in enumerate(self._calibrated)}
        self._channel = self._channels()
        self._views: dict[tuple[int, int, int], int] = {}

    def _channels(self) -> Ints:
        """(calibrated sensors,) index into CHANNELS, -1 for others (radars)."""
        tables = self._tables
        sensors = list(tables.read("sensor").values())
        names = tables.checked("sensor", sensors, lambda rs: texts(rs, "channel"))
        index = np.array([CHANNELS.index(n) if n in CHANNELS else -1 for n in names], np.int64)
        known = {record["token"]: row for row, record in enumerate(sensors)}
        rows = tables.checked(
            "calibrated_sensor",
            self._calibrated,
            lambda rs: tables.rows("calibrated_sensor", rs, "sensor_token", "sensor", known),
        )
        return index[rows]

    def add(self, records: list[Record]) -> None:
        tables = self._tables
        rows, sensors = tables.checked("sample_data", records, self._places)
        wanted = np.flatnonzero(self._channel[sensors] >= 0)
        records = [records[i] for i in wanted]
        rows, sensors = rows[wanted], sensors[wanted]
        channels = self._channel[sensors]
        stamps, sizes, texts_ = tables.checked("sample_data", records, _reading_fields)
        for i, (row, channel) in enumerate(zip(rows.tolist(), channels.tolist())):
            token, pose, image = texts_[i]
            if self.pose[row, channel] >= 0:
                sample = records[i]["sample_token"]
                raise DataError(
                    f"{tables.path('sample_data')}: sample {sample} has two {CHANNELS[channel]} key frames,"
                    f" the second is {token}"
                )
            if pose not in self.poses:
                self.poses[pose] = len(self.tokens)
                self.tokens.append(token)
            self.pose[row, channel] = self.poses[pose]
            view = (int(sensors[i]), *sizes[i])
            self.calibration[row, channel] = self._views.setdefault(view, len(self._views))
            if channel:
                self.images[row][channel - 1] = image
        self.stamp[rows, channels] = stamps

    def _places(self, records: list[Record]) -> tuple[Ints, Ints]:
        rows = self._tables.rows("sample_data", records, "sample_token", "sample", self._samples)
        return rows, self._tables.rows(
            "sample_data", records, "calibrated_sensor_token", "calibrated_sensor", self._calibrated_rows
        )

    def require_all(self) -> None:
        missing = np.argwhere(self.pose < 0)
        if len(missing):
            row, channel = missing[0]
            sample = list(self._samples)[row]
            path = self._tables.path("sample_data")
            raise DataError(f"{path}: sample {sample} has no {CHANNELS[channel]} key frame")

    def calibrations(self) -> Arrays:
        """The calibrations in use, each with its picture's size."""
        records = [self._calibrated[sensor] for sensor, _, _ in self._views]
        sizes = np.array([view[1:] for view in self._views], np.int64).reshape(-1, 2)
        channel = np.array([self._channel[sensor] for sensor, _, _ in self._views], np.int64)
        intrinsics = np.zeros((len(records), 3, 3))
        check = self._tables.checked
        rotation = check("calibrated_sensor", records, rotations)
        translation = check("calibrated_sensor", records, lambda rs: numbers(rs, "translation", 3))
        for row in np.flatnonzero(channel):
            record, (width, height) = records[row], sizes[row].tolist()
            intrinsics[row] = check("calibrated_sensor", [record], _intrinsics)[0]
            try:
                # Refuses a matrix that cannot project and a picture without pixels.
                CameraCalibration(CHANNELS[channel[row]], intrinsics[row], width, height, Pose.identity())
            except CalibrationError as error:
                path = self._tables.path("calibrated_sensor")
                raise DataError(f"{path}: record {record['token']}: {error}") from error
        return {
            "sensor_channel": channel.astype(np.int8),
            "sensor_rotation": rotation,
            "sensor_translation": translation,
            "intrinsics": intrinsics,
            "size": sizes.astype(np.int32),
        }


def _reading_fields(
    records: list[Record],
) -> tuple[Ints, list[tuple[int, int]], list[tuple[str, str, str]]]:
    """Stamps, (width, height) and (token, ego pose token, file name) of readings."""
    names = texts(records, "filename")
    if not all(names):
        raise ValueError("'filename' is empty")
    sizes = list(zip(integers(records, "width").tolist(), integers(records, "height").tolist()))
    if any(max(abs(w), abs(h)) >= 1 << 31 for w, h in sizes):
        raise ValueError("'width' or 'height' is no picture's size")
    return (
        integers(records, "timestamp"),
        sizes,
        list(zip(texts(records, "token"), texts(records, "ego_pose_token"), names)),
    )


def _intrinsics(records: list[Record]) -> Array:
    """(len(records), 3, 3) camera matrices."""
    matrices = np.array([record["camera_intrinsic"] for record in records], np.float64)
    if matrices.shape != (len(records), 3, 3):
        raise ValueError("'camera_intrinsic' is not 3 rows of 3 numbers")
    return matrices


def _ego_poses(tables: Tables, wanted: Rows, readings: list[str]) -> tuple[Array, Array]:
    """(P, 4) rotations and (P, 3) translations of the poses that key frames refer to."""
    rotation, translation = np.zeros((len(wanted), 4)), np.zeros((len(wanted), 3))
    found = np.zeros(len(wanted), bool)
    for records in tables.stream("ego_pose"):
        tokens = tables.checked("ego_pose", records, lambda rs: texts(rs, "token"))
        kept = [record for record, token in zip(records, tokens) if token in wanted]
        rows = [wanted[record["token"]] for record in kept]
        if found[rows].any() or len(set(rows)) < len(rows):
            seen = set(np.flatnonzero(found).tolist())
            for record, row in zip(kept, rows):
                if row in seen:
                    raise tables.twice("ego_pose", record["token"])
                seen.add(row)
        found[rows] = True
        rotation[rows] = tables.checked("ego_pose", kept, rotations)
        translation[rows] = tables.checked("ego_pose", kept, lambda rs: numbers(rs, "translation", 3))
    if not found.all():
        row = int(np.argmin(found))
        token = list(wanted)[row]
        raise tables.dangling("ego_pose", token, f"sample_data {readings[row]}")
    return rotation, translation


def can_file(root: Path, scene: str) -> Path:
    return root / "can_bus" / f"{scene}_pose.json"


def build_can_bus(root: Path, samples: Arrays, progress: Progress) -> Arrays:
    """can_dynamics (S, 9): acceleration m/s2, rotation rate rad/s, velocity m/s · has_can (N,) scenes with a file.

    A sample gets the first message *after* it (20 ms late), as BEVFormer's converter does it and as released weights
    were trained; the last message where none comes after. Scenes without a file (nuScenes has some) have zeros.
    """
    names, ends, times = Texts(samples, "scene"), samples["scene_ends"], samples["time_us"]
    dynamics = np.zeros((len(times), 9))
    has_can = np.zeros(len(names), bool)
    begin = 0
    for number, end in enumerate(ends.tolist()):
        path = can_file(root, names[number])
        if path.is_file():
            stamps, messages = _can_messages(path)
            after = np.searchsorted(stamps, times[begin:end], side="right")
            dynamics[begin:end] = messages[np.minimum(after, len(stamps) - 1)]
            has_can[number] = True
            progress(path.stat().st_size)
        begin = end
    return {"can_dynamics": dynamics, "has_can": has_can}


def _can_messages(path: Path) -> tuple[Ints, Array]:
    """(M,) stamps in microseconds, ascending, and (M, 9) dynamics of a scene's "pose" messages."""
    try:
        messages = json.loads(path.read_bytes())
        stamps = integers(messages, "utime")
        fields = [numbers(messages, field, 3) for field in ("accel", "rotation_rate", "vel")]
        if not len(stamps):
            raise ValueError("no messages")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: not a CAN bus pose file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    order = np.argsort(stamps, kind="stable")
    return stamps[order], np.concatenate(fields, axis=1)[order]
