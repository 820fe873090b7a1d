# SPDX-License-Identifier: Apache-2.0
"""Boxes of one moment as entries of a nuScenes result file (BEVFormer's conversion, to the letter)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qdbev_ros.core.boxes import Boxes, attribute_name
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.files import write_json
from qdbev_ros.core.geometry import Pose, yaw_quaternion
from qdbev_ros.core.variant import CLASSES

Entry = dict[str, Any]  # one box as nuScenes' result format has it

MAX_BOXES = 500  # for a sample, the devkit's limit
CLASS_RANGE = {  # metres from the ego beyond which a class is not evaluated
    "car": 50.0,
    "truck": 50.0,
    "construction_vehicle": 50.0,
    "bus": 50.0,
    "trailer": 50.0,
    "barrier": 30.0,
    "motorcycle": 40.0,
    "bicycle": 40.0,
    "pedestrian": 40.0,
    "traffic_cone": 30.0,
}
_RANGES = np.array([CLASS_RANGE[name] for name in CLASSES])


def result_entries(
    token: str, boxes: Boxes, frame2ego: Pose, ego2global: Pose, attributes: Sequence[str] | None = None
) -> list[Entry]:
    """The entries of sample `token` from boxes in a frame that `frame2ego` places on the vehicle.

    Boxes farther from the ego than their class's range are left out, the best 500 kept. `attributes` (K,) replace
    those that follow from class and speed. Sizes are width, length, height; velocities are those of the global frame.
    """
    in_ego = boxes.transformed(frame2ego)
    near = np.flatnonzero(np.hypot(*in_ego.centers[:, :2].T) <= _RANGES[in_ego.labels])
    kept = near[np.argsort(-in_ego.scores[near], kind="stable")][:MAX_BOXES]
    in_global = boxes.select(kept).transformed(ego2global @ frame2ego)
    entries = []
    for row, index in enumerate(kept):
        label, velocity = int(in_global.labels[row]), in_global.velocities[row]
        attribute = attribute_name(label, velocity) if attributes is None else attributes[index]
        entries.append(
            {
                "sample_token": token,
                "translation": in_global.centers[row].tolist(),
                "size": in_global.sizes[row].tolist(),
                "rotation": yaw_quaternion(float(in_global.yaws[row])).tolist(),
                "velocity": velocity.tolist(),
                "detection_name": CLASSES[label],
                "detection_score": float(in_global.scores[row]),
                "attribute_name": attribute,
            }
        )
    return entries


def write_results(path: Path, results: Mapping[str, list[Entry]]) -> None:
    """A nuScenes result file: sample token -> entries; every sample of the split must be in it."""
    meta = {
        "use_camera": True,
        "use_lidar": False,
        "use_radar": False,
        "use_map": False,
        "use_external": True,
    }
    write_json(path, {"meta": meta, "results": dict(results)}, indent=None)


def read_results(path: Path, tokens: Sequence[str], split: str) -> tuple[dict[str, list[Entry]], int]:
    """(the entries of the samples `tokens`, number of other samples in the file) of a nuScenes result file.

    Raises DataError where it is no such file, lacks one of the samples or has no list of boxes for it.
    """
    try:
        results = json.loads(path.read_bytes())["results"]
        found = {token: results[token] for token in tokens if token in results}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a nuScenes result file (JSON with meta and results)") from error
    lacking = [token for token in tokens if token not in found]
    if lacking:
        raise DataError(
            f"{path}: lacks {len(lacking)} of the {len(tokens)} samples of {split}, first {lacking[0]}; every sample "
            "needs a list, an empty one where nothing was seen"
        )
    for token, entries in found.items():
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{path}: sample {token} holds no list of boxes but {str(entries)[:40]}")
    return found, len(results) - len(found)
