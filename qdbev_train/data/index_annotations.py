# SPDX-License-Identifier: Apache-2.0
"""The index's largest part: annotated boxes of the ten detection classes in the global frame, with velocities."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.geometry import Array
from qdbev_ros.core.variant import CLASSES
from qdbev_train.data.array_file import Arrays, pack_texts
from qdbev_train.data.index_parts import sample_rows
from qdbev_train.data.json_tables import Record, Tables, integers, numbers, rotations, texts

Ints = NDArray[np.int64]
Tokens = NDArray[np.bytes_]

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
TABLE = "sample_annotation"


def build_annotations(tables: Tables, samples: Arrays) -> Arrays:
    """A boxes sorted by sample, in the table's order within one; positions and headings in the global frame.

    annotation_ends (S,) where each sample's rows end · center (A, 3) m · box_size (A, 3) width, length, height m ·
    yaw (A,) rad · velocity (A, 2) m/s, NaN where unknown · label, points, visibility (A,) · attribute (A,) row of
    attribute_name (texts), -1 for none · instance (A,) row of instance_token (texts)
    """
    reader = _Reader(tables, samples)
    chunks = [reader.columns(records) for records in tables.stream(TABLE)]
    # Column by column, so that not everything is there twice.
    columns = {name: np.concatenate([chunk.pop(name) for chunk in chunks]) for name in list(chunks[0])}
    row = columns.pop("sample_row")
    velocity = _velocities(tables, columns, samples["time_us"][row])
    order = np.argsort(row, kind="stable")
    arrays: Arrays = {name: column[order] for name, column in columns.items() if column.dtype.kind != "S"}
    return {
        **arrays,
        "velocity": velocity[order],
        "annotation_ends": np.cumsum(np.bincount(row, minlength=len(samples["time_us"])), dtype=np.int64),
        **pack_texts("attribute_name", reader.attribute_names),
        **pack_texts("instance_token", list(reader.instances)),
    }


class _Reader:
    """Turns annotation records into columns, with the small tables that they refer to at hand."""

    def __init__(self, tables: Tables, samples: Arrays) -> None:
        self._tables, self._samples = tables, sample_rows(samples)
        instances = tables.read("instance")
        self.instances = {token: row for row, token in enumerate(instances)}
        self._labels = _labels(tables, list(instances.values()))
        attributes = tables.read("attribute")
        self._attributes = {token: row for row, token in enumerate(attributes)}
        records = list(attributes.values())
        self.attribute_names = tables.checked("attribute", records, lambda rs: texts(rs, "name"))

    def columns(self, records: list[Record]) -> dict[str, NDArray[np.generic]]:
        """The columns of those records that are of the ten classes."""
        instances = self._tables.checked(TABLE, records, self._instances)
        kept = np.flatnonzero(self._labels[instances] >= 0)
        records, instances = [records[i] for i in kept], instances[kept]
        columns = self._tables.checked(TABLE, records, self._fields)
        return {
            **columns,
            "instance": instances.astype(np.int32),
            "label": self._labels[instances].astype(np.int8),
        }

    def _instances(self, records: list[Record]) -> Ints:
        self._tables.rows(TABLE, records, "sample_token", "sample", self._samples)
        return self._tables.rows(TABLE, records, "instance_token", "instance", self.instances)

    def _fields(self, records: list[Record]) -> dict[str, NDArray[np.generic]]:
        w, x, y, z = rotations(records).T
        sizes = numbers(records, "size", 3)
        if not (sizes > 0).all():
            raise ValueError("'size' is not positive")
        return {
            "sample_row": self._tables.rows(TABLE, records, "sample_token", "sample", self._samples),
            "center": numbers(records, "translation", 3),
            "box_size": sizes,
            "yaw": np.arctan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z)),
            "points": integers(records, "num_lidar_pts") + integers(records, "num_radar_pts"),
            "visibility": np.array([_visibility(record) for record in records], np.int8),
            "attribute": np.array([self._attribute(record) for record in records], np.int16),
            "token": digests(texts(records, "token")),
            "prev": digests(texts(records, "prev")),
            "next": digests(texts(records, "next")),
        }

    def _attribute(self, record: Record) -> int:
        tokens = record["attribute_tokens"]
        if not tokens:
            return -1
        if tokens[0] not in self._attributes:
            raise self._tables.dangling("attribute", tokens[0], f"{TABLE} {record['token']}")
        return self._attributes[tokens[0]]


def _visibility(record: Record) -> int:
    level = int(record["visibility_token"] or 0)
    if not 0 <= level < 128:
        raise ValueError(f"'visibility_token' is {level}")
    return level


def _labels(tables: Tables, instances: list[Record]) -> Ints:
    """(instances,) index into CLASSES by the category, -1 for other categories."""
    categories = tables.read("category")
    records = list(categories.values())
    names = tables.checked("category", records, lambda rs: texts(rs, "name"))
    labels = [CLASSES.index(CATEGORY_TO_CLASS[n]) if n in CATEGORY_TO_CLASS else -1 for n in names]
    known = {token: row for row, token in enumerate(categories)}
    rows = tables.checked(
        "instance", instances, lambda rs: tables.rows("instance", rs, "category_token", "category", known)
    )
    return np.array(labels, np.int64)[rows]


def digests(tokens: list[str]) -> Tokens:
    """(len(tokens),) 16 bytes of each: a million tokens as texts in a dict would take ten times that."""
    joined = b"".join(hashlib.blake2b(token.encode(), digest_size=16).digest() for token in tokens)
    return np.frombuffer(joined, "S16")


def _velocities(tables: Tables, columns: dict[str, NDArray[np.generic]], time_us: Ints) -> Array:
    """(A, 2) m/s in global axes as the devkit's box_velocity: NaN where no neighbour is near enough in time."""
    tokens: Tokens = columns["token"]  # type: ignore[assignment]
    order = np.argsort(tokens)
    same = np.flatnonzero(tokens[order][1:] == tokens[order][:-1])
    if len(same):
        raise tables.twice(TABLE, _record_with(tables, "token", tokens[order[same[0]]])["token"])
    first, last = (_neighbours(tables, columns, field, order) for field in ("prev", "next"))
    time = 1e-6 * time_us
    position: Array = columns["center"][:, :2]  # type: ignore[assignment]
    here = np.arange(len(tokens))
    limit = np.where((first != here) & (last != here), 2 * MAX_VELOCITY_GAP_S, MAX_VELOCITY_GAP_S)
    elapsed = time[last] - time[first]
    known = (first != last) & (elapsed <= limit)
    velocity = (position[last] - position[first]) / np.where(known, elapsed, 1.0)[:, None]
    return np.where(known[:, None], velocity, np.nan)


def _neighbours(tables: Tables, columns: dict[str, NDArray[np.generic]], field: str, order: Ints) -> Ints:
    """(A,) row of the annotation before or after, its own row where there is none."""
    tokens, wanted = columns["token"], columns[field]
    rows = np.arange(len(tokens))
    refers = np.flatnonzero(wanted != digests([""])[0])
    if not len(refers):
        return rows
    place = np.minimum(np.searchsorted(tokens, wanted[refers], sorter=order), len(tokens) - 1)
    found = order[place]
    lost = np.flatnonzero(tokens[found] != wanted[refers])
    if len(lost):
        record = _record_with(tables, field, wanted[refers[lost[0]]])
        raise tables.dangling(TABLE, record[field], f"{TABLE} {record['token']}")
    rows[refers] = found
    return rows


def _record_with(tables: Tables, field: str, digest: np.bytes_) -> Record:
    """The first record whose field has this digest, read again: texts aren't kept for the sake of an error."""
    for records in tables.stream(TABLE):
        for record, found in zip(records, digests(texts(records, field))):
            if found == digest:
                return record
    raise DataError(f"{tables.path(TABLE)}: changed while it was read")
