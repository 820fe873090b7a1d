# SPDX-License-Identifier: Apache-2.0
"""The deformable sampling kernel: deformable.c on raw buffers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine.native import Team, load

MOST_DEPTH = 256  # as in the source


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("tokens", "queries", "heads", "depth", "levels", "points")
    ]


class DeformableKernel:
    """Samples on raw float32 buffers, on `threads` threads.

    artefact: SHA-256 of the compiled file
    """

    def __init__(self, threads: int | None = None) -> None:
        library, self.artefact = load("deformable")
        self._function = library.qdbev_deformable
        self._function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 2
        self._function.restype = None
        self._team = Team(threads, "sampling")

    def __call__(
        self,
        buffers: tuple[int, int, int, int],
        value_shape: Sequence[int],
        locations_shape: Sequence[int],
        weights_shape: Sequence[int],
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        """Samples the first three buffers into the last.

        buffers: addresses of contiguous float32 arrays: value, locations, weights, and the result (B, Q, heads * depth)
        value_shape (B, S, heads, depth) · locations_shape (B, Q, heads, levels, points, 2) · weights_shape (B, Q,
        heads, levels, points) · sizes (height, width) of the levels.
        Raises EngineError where these do not fit each other.
        """
        batch, queries, heads, levels, points = weights_shape
        tokens, depth = value_shape[1], value_shape[3]
        fits = (value_shape[0], value_shape[2], levels) == (batch, heads, len(sizes))
        fits = fits and list(locations_shape) == [*weights_shape, 2] and depth <= MOST_DEPTH
        # Sizes below one could make up for others that are too large.
        if not fits or min(map(min, sizes)) < 1 or tokens != sum(h * w for h, w in sizes):
            raise EngineError(
                f"value {list(value_shape)}, locations {list(locations_shape)}, weights {list(weights_shape)} and maps "
                f"{list(sizes)} do not fit"
            )
        shape = _Shape(tokens, queries, heads, depth, levels, points)
        flat = (ctypes.c_int32 * (2 * levels))(*(side for size in sizes for side in size))
        arguments = ctypes.byref(shape), flat, *buffers
        self._team.share(batch * queries, lambda _, first, last: self._function(*arguments, first, last))
