# SPDX-License-Identifier: Apache-2.0
"""Boxes: the network's code of ten numbers, decoding, frames and nuScenes attributes.

The code is cx, cy, log w, log l, cz, log h, sin r, cos r, vx, vy in metres of the LIDAR_TOP frame, with cz the
geometric centre and r the old SECOND angle, r = -yaw - pi/2. Outside this file only yaw exists: the angle about +z
from the frame's x axis to the box's length axis, as in nuScenes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.geometry import Array, Pose, quaternion_to_matrix
from qdbev_ros.core.variant import CLASSES

MAX_DETECTIONS = 300
CENTER_RANGE = np.array([-61.2, -61.2, -10.0, 61.2, 61.2, 10.0])
MOVING_SPEED = 0.2  # metres per second, above which the attribute says so


@dataclass(frozen=True)
class Boxes:
    """K boxes in one frame, best score first.

    centers (K, 3) geometric centres in metres · sizes (K, 3) width, length, height in metres · yaws (K,) radians ·
    velocities (K, 2) m/s · scores (K,) in [0, 1] · labels (K,) indices into CLASSES
    """

    centers: Array
    sizes: Array
    yaws: Array
    velocities: Array
    scores: Array
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        k = len(self.scores)
        shapes = {"centers": (k, 3), "sizes": (k, 3), "yaws": (k,), "velocities": (k, 2), "labels": (k,)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise DataError(f"boxes: {name} has shape {getattr(self, name).shape}, expected {shape}")

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, keep: NDArray[np.bool_] | NDArray[np.int64] | slice) -> Boxes:
        """The boxes at `keep`, an index or mask over K."""
        return Boxes(
            self.centers[keep],
            self.sizes[keep],
            self.yaws[keep],
            self.velocities[keep],
            self.scores[keep],
            self.labels[keep],
        )

    def transformed(self, pose: Pose) -> Boxes:
        """The same boxes in the parent frame of `pose`; velocities turn with it, sizes stay."""
        rotation = quaternion_to_matrix(pose.rotation)
        heading = (
            np.stack([np.cos(self.yaws), np.sin(self.yaws), np.zeros_like(self.yaws)], axis=-1) @ rotation.T
        )
        velocity = np.concatenate([self.velocities, np.zeros((len(self), 1))], axis=-1) @ rotation.T
        # Contiguous: for strided arrays numpy takes one of two arctan2, which differ in the last bit, by their address.
        cos, sin = np.ascontiguousarray(heading.T[:2])
        return Boxes(
            self.centers @ rotation.T + pose.translation,
            self.sizes,
            np.arctan2(sin, cos),
            velocity[:, :2],
            self.scores,
            self.labels,
        )

    def poses(self) -> Array:
        """(K, 7) as ROS has them: position, quaternion x, y, z, w of the heading; a box's x axis points forward."""
        half, zero = np.ascontiguousarray(self.yaws) / 2, np.zeros(len(self))
        return np.column_stack([self.centers, zero, zero, np.sin(half), np.cos(half)])

    def lengths_first(self) -> Array:
        """(K, 3) sizes as ROS has them: x length, y width, z height in metres."""
        return self.sizes[:, [1, 0, 2]]

    def noses(self) -> Array:
        """(K, 3) half a metre before the middle of the front: where a line from the centre shows the heading."""
        reach = self.sizes[:, 1] / 2 + 0.5
        ahead = np.column_stack([reach * np.cos(self.yaws), reach * np.sin(self.yaws), np.zeros(len(self))])
        return self.centers + ahead

    def corners(self) -> Array:
        """(K, 8, 3): front left, front right, back right, back left of the bottom, then the same of the top."""
        w, length, h = self.sizes.T
        x = np.stack([length, length, -length, -length] * 2, axis=1) / 2
        y = np.stack([w, -w, -w, w] * 2, axis=1) / 2
        z = np.stack([-h] * 4 + [h] * 4, axis=1) / 2
        cos, sin = np.cos(self.yaws)[:, None], np.sin(self.yaws)[:, None]
        return np.stack([x * cos - y * sin, x * sin + y * cos, z], axis=-1) + self.centers[:, None]


def empty_boxes() -> Boxes:
    three, one = np.zeros((0, 3)), np.zeros(0)
    return Boxes(three, three, one, np.zeros((0, 2)), one, np.zeros(0, np.int64))


def encode_boxes(centers: Array, sizes: Array, yaws: Array, velocities: Array) -> NDArray[np.float32]:
    """(K, 10) codes of boxes in the LIDAR_TOP frame; unknown (NaN) velocities become 0 as in the reference."""
    angle = -yaws - np.pi / 2
    w, length, h = np.log(sizes).T
    cx, cy, cz = centers.T
    vx, vy = np.nan_to_num(velocities).T
    return np.stack([cx, cy, w, length, cz, h, np.sin(angle), np.cos(angle), vx, vy], axis=-1).astype(
        np.float32
    )


def decode_boxes(class_logits: NDArray[np.floating[Any]], codes: NDArray[np.floating[Any]]) -> Boxes:
    """The best boxes of one frame (as BEVFormer's NMS-free coder does).

    class_logits (Q, 10) and codes (Q, 10) of the last decoder layer. Takes the best 300 of all query-class pairs, so
    a query may appear with several classes; drops centres outside CENTER_RANGE; no threshold, no suppression.
    """
    n_classes = class_logits.shape[1]
    scores = 1.0 / (1.0 + np.exp(-class_logits.astype(np.float64))).reshape(-1)
    # A stable sort: equal scores keep their query order, so that two runs agree.
    order = np.argsort(-scores, kind="stable")[:MAX_DETECTIONS]
    code = codes[order // n_classes].astype(np.float64)
    centers = code[:, [0, 1, 4]]
    sin, cos = np.ascontiguousarray(code.T[6:8])  # see Boxes.transformed
    boxes = Boxes(
        centers=centers,
        sizes=np.exp(np.clip(code[:, [2, 3, 5]], -5.0, 5.0)),
        yaws=(-np.arctan2(sin, cos) - np.pi / 2 + np.pi) % (2 * np.pi) - np.pi,
        velocities=code[:, 8:10],
        scores=scores[order],
        labels=(order % n_classes).astype(np.int64),
    )
    finite = np.isfinite(code).all(-1) & np.isfinite(scores[order])
    inside = (centers >= CENTER_RANGE[:3]).all(-1) & (centers <= CENTER_RANGE[3:]).all(-1)
    return boxes.select(finite & inside)


def attribute_name(label: int, velocity: Array) -> str:
    """nuScenes attribute of a box from its class and speed, by BEVFormer's rules; empty for static objects."""
    name = CLASSES[label]
    if float(np.hypot(velocity[0], velocity[1])) > MOVING_SPEED:
        if name in ("car", "construction_vehicle", "bus", "truck", "trailer"):
            return "vehicle.moving"
        if name in ("bicycle", "motorcycle"):
            return "cycle.with_rider"
        return "pedestrian.moving" if name == "pedestrian" else ""
    resting = {
        "pedestrian": "pedestrian.standing",
        "bus": "vehicle.stopped",
        "car": "vehicle.parked",
        "truck": "vehicle.parked",
        "trailer": "vehicle.parked",
        "construction_vehicle": "vehicle.parked",
        "bicycle": "cycle.without_rider",
        "motorcycle": "cycle.without_rider",
    }
    return resting.get(name, "")
