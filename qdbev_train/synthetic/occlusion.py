# SPDX-License-Identifier: Apache-2.0
"""How much of each object the cameras see, from pictures in which every pixel names its object."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdbev_train.synthetic.catalogue import body
from qdbev_train.synthetic.layout import TownObject
from qdbev_train.synthetic.mesh import Array
from qdbev_train.synthetic.rig import Camera

SAMPLES = 192  # surface points per object
GRID = 8  # an object's bounding rectangle in an image is cut into GRID x GRID cells
LIDAR_CELL = 0.333 * 1.333  # square degrees per lidar point: 32 beams over 40 degrees, 1080 per turn
LEAST_PIXELS = 6  # an object with fewer visible pixels gets no lidar point, with more at least one
_AROUND = [(dv, du) for dv in (-1, 0, 1) for du in (-1, 0, 1)]


def surface_points(obj: TownObject, rng: np.random.Generator) -> Array:
    """(SAMPLES, 3) points spread evenly over an object's surface, in its frame (origin at the box's middle)."""
    mesh = body(obj.look.shape)[0]
    corners = (mesh.points * np.asarray(obj.look.size)).reshape(-1, 3, 3)
    edges = corners[:, 1:] - corners[:, :1]
    area = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
    chosen = rng.choice(len(area), SAMPLES, p=area / area.sum())
    a, b = rng.random((2, SAMPLES, 1))
    fold = a + b > 1
    a, b = np.where(fold, 1 - a, a), np.where(fold, 1 - b, b)
    return corners[chosen, 0] + a * edges[chosen, 0] + b * edges[chosen, 1]


class Occlusion:
    """Adds up, over the cameras of one frame, what is seen of each object.

    The visible share is an estimate of visible pixels over pixels if alone. The silhouette is made of the cells of a
    small grid that surface points fall into; a cell is seen where most of its points land on a pixel of their own
    object (or next to one: thin things are thinner than a pixel). A point on the far side counts as seen when the
    object itself covers it.
    """

    def __init__(self, surfaces: Array) -> None:
        """surfaces (n, SAMPLES, 3): `surface_points` of every object of the plan."""
        self._surfaces = surfaces
        count = len(surfaces)
        self.pixels = np.zeros(count, dtype=np.int64)
        self._area = np.zeros(count)  # visible square degrees
        self._whole = np.zeros(count)  # silhouettes, in pixels
        self._seen = np.zeros(count)

    def add(
        self, identities: NDArray[np.uint16], camera: Camera, town_to_camera: Array, poses: Array
    ) -> None:
        """One camera: identities (H, W) as drawn, poses (n, 4) x, y, middle's height, yaw at its stamp."""
        counts = np.bincount(identities.ravel(), minlength=len(poses) + 1)[1:]
        self.pixels += counts
        self._area += counts * np.degrees(1 / camera.intrinsic[0, 0]) ** 2
        c, s = np.cos(poses[:, 3]), np.sin(poses[:, 3])
        p = self._surfaces
        town = np.stack(
            [
                c[:, None] * p[..., 0] - s[:, None] * p[..., 1] + poses[:, :1],
                s[:, None] * p[..., 0] + c[:, None] * p[..., 1] + poses[:, 1:2],
                p[..., 2] + poses[:, 2:3],
            ],
            -1,
        )
        seen = town @ town_to_camera[:3, :3].T + town_to_camera[:3, 3]
        depth = np.maximum(seen[..., 2], 1e-6)
        u = np.round(camera.intrinsic[0, 0] * seen[..., 0] / depth + camera.intrinsic[0, 2])
        v = np.round(camera.intrinsic[1, 1] * seen[..., 1] / depth + camera.intrinsic[1, 2])
        height, width = identities.shape
        inside = (seen[..., 2] > 0.3) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        number, _ = np.nonzero(inside)
        rows, columns = v[inside].astype(np.int64) + 1, u[inside].astype(np.int64) + 1
        framed = np.pad(identities, 1)
        hit = np.zeros(len(number), dtype=bool)
        for dv, du in _AROUND:
            hit |= framed[rows + dv, columns + du] == number + 1
        self._vote(u, v, inside, hit)

    def _vote(self, u: Array, v: Array, inside: NDArray[np.bool_], hit: NDArray[np.bool_]) -> None:
        """Adds one camera's silhouettes: u, v, inside (n, SAMPLES), hit (K,) for the K points inside."""
        cell, area = np.zeros(u.shape, dtype=np.int64), np.ones(len(u))
        for axis in (u, v):
            low = np.where(inside, axis, np.inf).min(1)
            extent = (
                np.maximum(np.where(inside, axis, -np.inf).max(1) - low, 0) + 1
            )  # 1 where nothing is inside
            step = np.where(inside, axis - np.where(np.isfinite(low), low, 0)[:, None], 0) / extent[:, None]
            cell = cell * GRID + np.minimum((step * GRID).astype(np.int64), GRID - 1)
            area *= extent / GRID
        index = (np.arange(len(u))[:, None] * GRID**2 + cell)[inside]
        points = np.bincount(index, minlength=len(u) * GRID**2).reshape(-1, GRID**2)
        hits = np.bincount(index[hit], minlength=len(u) * GRID**2).reshape(-1, GRID**2)
        self._whole += (points > 0).sum(1) * area
        self._seen += ((points > 0) & (2 * hits >= points)).sum(1) * area

    def shares(self) -> Array:
        """(n,) visible share of each object's silhouette in 0..1; 0 where no pixel shows it."""
        return np.where(self.pixels > 0, self._seen / np.maximum(self._whole, 1e-9), 0.0)

    def lidar_points(self) -> NDArray[np.int64]:
        """(n,) how many points a 32-beam lidar would have on what is visible."""
        points = np.round(self._area / LIDAR_CELL).astype(np.int64)
        return np.where(self.pixels >= LEAST_PIXELS, np.maximum(points, 1), 0)


def visibility_token(share: float) -> str:
    """nuScenes' visibility levels: 0-40 %, 40-60 %, 60-80 %, 80-100 %."""
    return str(1 + int(share >= 0.4) + int(share >= 0.6) + int(share >= 0.8))
