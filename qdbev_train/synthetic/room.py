# SPDX-License-Identifier: Apache-2.0
"""Keeps the things of a town out of each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdbev_train.synthetic.paths import BEFORE, TICK, Array, Track

STRIDE = 4  # every fourth tick is looked at: 0.2 s


def rectangles(xy: Array, yaw: Array, length: float, width: float) -> Array:
    """(T, 4, 2) corners of a footprint along a track."""
    along = np.stack([np.cos(yaw), np.sin(yaw)], -1) * length / 2
    left = np.stack([-np.sin(yaw), np.cos(yaw)], -1) * width / 2
    return xy[:, None] + np.stack([along + left, -along + left, -along - left, along - left], 1)


def overlap(first: Array, second: Array) -> NDArray[np.bool_]:
    """(T,) whether rectangles (T, 4, 2) and (T, 4, 2) intersect: no edge direction separates them."""
    apart = np.zeros(len(first), dtype=bool)
    for corners in (first, second):
        for edge in (corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 1]):
            a = np.einsum("tkd,td->tk", first, edge)
            b = np.einsum("tkd,td->tk", second, edge)
            apart |= (a.max(1) < b.min(1)) | (b.max(1) < a.min(1))
    return ~apart


class Room:
    """The space taken so far, over the whole scene."""

    def __init__(self) -> None:
        self._corners: list[Array] = []  # each (T, 4, 2)
        self._centres: list[Array] = []  # each (T, 2)
        self._radii: list[float] = []

    def take(self, track: Track, length: float, width: float, margin: float, force: bool = False) -> bool:
        """Claims a footprint with a margin (metres) around it; False where something is already."""
        xy, yaw = track.xy[::STRIDE], track.yaw[::STRIDE]
        corners = rectangles(xy, yaw, length + 2 * margin, width + 2 * margin)
        radius = float(np.hypot(length, width) / 2 + margin)
        if not force and self._centres:
            distance = np.linalg.norm(np.stack(self._centres) - xy, axis=-1)
            near = distance < np.asarray(self._radii)[:, None] + radius
            for other in np.flatnonzero(near.any(1)):
                when = near[other]
                if overlap(corners[when], self._corners[other][when]).any():
                    return False
        # what is kept has no margin: the newcomer's is enough
        self._corners.append(rectangles(xy, yaw, length, width))
        self._centres.append(xy)
        self._radii.append(float(np.hypot(length, width) / 2))
        return True

    def snapshot(self, t: float) -> Array:
        """(n, 4, 2) footprints at about t seconds."""
        index = round((t + BEFORE) / TICK / STRIDE)
        return np.stack([c[index] for c in self._corners])
