# SPDX-License-Identifier: Apache-2.0
"""From bird's-eye cells to camera pixels, and which camera sees which cell (BEVFormer, spatial cross-attention).

Letters: N cameras, M cells that the busiest camera sees, P points of a pillar, K cameras that a cell can be seen by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.geometry import Array, CameraCalibration, Pose
from qdbev_ros.core.variant import BevSpec, ImageSpec

# A camera's list of visible cells is padded to a multiple of this, so that engines see few distinct shapes.
CELL_BLOCK = 32
MIN_DEPTH = 1e-5


def lidar_to_image(
    camera: CameraCalibration, lidar2ego: Pose, ego2global_at_camera: Pose, ego2global_at_reference: Pose
) -> Array:
    """(4, 4) LIDAR_TOP frame at the reference time -> homogeneous pixels of the camera's own picture.

    Goes lidar -> ego -> global at the reference time and global -> ego -> camera at the camera's stamp, so the ego
    motion between the two stamps is compensated (as in nuScenes' sensor2lidar). Row 2 is the depth in metres.
    """
    k = np.eye(4)
    k[:3, :3] = camera.intrinsics
    lidar2camera = (
        camera.sensor2ego.inverse() @ ego2global_at_camera.inverse() @ ego2global_at_reference @ lidar2ego
    )
    return k @ lidar2camera.matrix()


def scale_to_input(lidar2img: Array, camera: CameraCalibration, image: ImageSpec) -> Array:
    """Pixels of the camera's picture -> pixels of the network's input: diag(sx, sy, 1, 1) from the left."""
    return np.diag([image.width / camera.width, image.height / camera.height, 1.0, 1.0]) @ lidar2img


def pillar_points(bev: BevSpec) -> NDArray[np.float32]:
    """(cells, P, 3) anchor points in metres of the LIDAR_TOP frame: cell centres, heights 0.5 .. Z-0.5 of the range.

    In float32 and in BEVFormer's order of operations, so that a point on a picture's border falls on the same side.
    """
    x0, y0, z0, x1, y1, z1 = bev.pc_range
    x = np.float32(x1 - x0) * ((np.arange(bev.width, dtype=np.float32) + np.float32(0.5)) / bev.width) + x0
    y = np.float32(y1 - y0) * ((np.arange(bev.height, dtype=np.float32) + np.float32(0.5)) / bev.height) + y0
    z = np.float32(z1 - z0) * (_evenly(0.5, z1 - z0 - 0.5, bev.pillar_points) / np.float32(z1 - z0)) + z0
    grid = np.stack(np.broadcast_arrays(x[None, :, None], y[:, None, None], z[None, None, :]), axis=-1)
    return grid.reshape(bev.cells, bev.pillar_points, 3).astype(np.float32)


def _evenly(first: float, last: float, count: int) -> NDArray[np.float32]:
    """`count` numbers from `first` to `last`, counted from the nearer end as torch's linspace does."""
    index = np.arange(count, dtype=np.float32)
    step = np.float32(last - first) / np.float32(max(count - 1, 1))
    upward, downward = np.float32(first) + step * index, np.float32(last) - step * (count - 1 - index)
    return np.where(index < max(count // 2, 1), upward, downward).astype(np.float32)


@dataclass(frozen=True)
class VisibleCells:
    """Which cells each camera sees, as the gather tables of spatial cross-attention.

    points (N, M, P, 2) float32: the pillar's points in the padded picture, (u, v) in [0, 1] where visible
    cells  (N, M) int64: cell index of each gathered row; `bev.cells` in padding rows
    slots  (cells, K) int64: rows of the flattened (N*M) list that belong to a cell; N*M where there is none
    weights (cells, K) float32: 1 / number of cameras that see the cell, 0 where there is none
    mask   (N, cells) bool: camera n sees at least one point of the cell
    """

    points: NDArray[np.float32]
    cells: NDArray[np.int64]
    slots: NDArray[np.int64]
    weights: NDArray[np.float32]
    mask: NDArray[np.bool_]


def visible_cells(lidar2img: NDArray[np.floating[Any]], bev: BevSpec, image: ImageSpec) -> VisibleCells:
    """Projects every pillar into every camera.

    lidar2img (N, 4, 4) at the scale of the network's input. A camera whose matrix is all zeros sees nothing: that
    is how an absent camera is masked out. Visible means depth > 1e-5 and 0 < u, v < 1 of the padded picture.
    """
    x, y, z = np.moveaxis(pillar_points(bev), -1, 0)  # (cells, P) each
    m = np.asarray(lidar2img, np.float32)[..., None, None]  # (N, 4, 4, 1, 1)
    # Written out: a matrix product would add in another order, and a point on a border could change sides.
    camera_points = m[:, :3, 0] * x + m[:, :3, 1] * y + m[:, :3, 2] * z + m[:, :3, 3]  # (N, 3, cells, P)
    depth = camera_points[:, 2]
    uv = np.moveaxis(camera_points[:, :2], 1, -1) / np.maximum(depth, MIN_DEPTH)[..., None]
    uv = uv / np.array([image.padded_width, image.padded_height], np.float32)
    inside = (depth > MIN_DEPTH) & (uv > 0).all(-1) & (uv < 1).all(-1)
    mask = inside.any(-1)
    return _gather_tables(uv, mask)


def _gather_tables(uv: NDArray[np.float32], mask: NDArray[np.bool_]) -> VisibleCells:
    n_cameras, n_cells, n_points, _ = uv.shape
    longest = max(1, int(mask.sum(1).max()))
    m = -(-longest // CELL_BLOCK) * CELL_BLOCK
    points = np.zeros((n_cameras, m, n_points, 2), np.float32)
    cells = np.full((n_cameras, m), n_cells, np.int64)
    k = max(1, int(mask.sum(0).max()))
    slots = np.full((n_cells, k), n_cameras * m, np.int64)
    seen_by = np.zeros(n_cells, np.int64)
    for n in range(n_cameras):
        index = np.flatnonzero(mask[n])
        points[n, : len(index)] = uv[n, index]
        cells[n, : len(index)] = index
        slots[index, seen_by[index]] = n * m + np.arange(len(index))
        seen_by[index] += 1
    used = np.arange(k)[None] < seen_by[:, None]
    weights = (used / np.maximum(seen_by, 1)[:, None]).astype(np.float32)
    return VisibleCells(points, cells, slots, weights, mask)


def project_points(lidar2img: Array, points: Array) -> tuple[Array, Array]:
    """Pixels (..., 2) and depths (...) of LIDAR_TOP points (..., 3); pixels are meaningless at depth <= 0."""
    homogeneous = np.concatenate([points, np.ones_like(points[..., :1])], axis=-1)
    image = homogeneous @ lidar2img.T
    depth = image[..., 2]
    return image[..., :2] / np.where(np.abs(depth) < MIN_DEPTH, MIN_DEPTH, depth)[..., None], depth


def stack_lidar2img(matrices: Sequence[Array | None]) -> NDArray[np.float32]:
    """(N, 4, 4) float32 in camera order; zeros for a camera that is absent (None)."""
    return np.stack([np.zeros((4, 4)) if m is None else m for m in matrices]).astype(np.float32)
