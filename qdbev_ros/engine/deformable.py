# SPDX-License-Identifier: Apache-2.0
"""The kernel of deformable attention: deformable.c on raw buffers."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine.native import Team, load

MOST_DEPTH, MOST_SAMPLES = 256, 1024  # as in the source
_MOST_NUMBERS = 2**31  # of a map's tokens, which the source counts in 32 bits
Sizes = Sequence[tuple[int, int]]


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("tokens", "queries", "heads", "depth", "levels", "points"),
            *("raw_rows", "maps", "pillar", "most"),
        )
    ]


class DeformableKernel:
    """Samples on raw float32 buffers, on `threads` threads.

    artefact: SHA-256 of the compiled file
    """

    def __init__(self, threads: int | None = None) -> None:
        library, self.artefact = load("deformable")
        self._sample, self._attend = library.qdbev_deformable, library.qdbev_attend
        for function, buffers in ((self._sample, 4), (self._attend, 7)):
            function.argtypes = [ctypes.c_void_p] * (2 + buffers) + [ctypes.c_int64] * 2
            function.restype = None
        self._team = Team(threads, "sampling")

    def __call__(
        self,
        buffers: tuple[int, int, int, int],
        value_shape: Sequence[int],
        locations_shape: Sequence[int],
        weights_shape: Sequence[int],
        sizes: Sizes,
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
        if not fits or list(locations_shape) != [*weights_shape, 2] or not _fits(value_shape, points, sizes):
            raise EngineError(
                f"value {list(value_shape)}, locations {list(locations_shape)}, weights {list(weights_shape)} and maps "
                f"{list(sizes)} do not fit"
            )
        shape = _Shape(tokens, queries, heads, depth, levels, points)
        arguments = ctypes.byref(shape), _flat(sizes), *buffers
        self._team.share(batch * queries, lambda _, first, last: self._sample(*arguments, first, last))

    def attend(
        self,
        buffers: tuple[int, int, int, int, int | None, int | None, int],
        value_shape: Sequence[int],
        raw_rows: int,
        references: int,
        outputs: int,
        most: int,
        points: int,
        sizes: Sizes,
    ) -> None:
        """Samples as the linear layers of an attention say it, and sums them up.

        buffers: addresses of contiguous arrays: value, offsets, logits, references, slots and shares or None, and the
        result (outputs, heads * depth), as deformable.c describes them; slots are int64, all others float32 ·
        value_shape (B, S, heads, depth) · raw_rows: of offsets and logits; without slots there are as many outputs,
        each the mean of the `most` maps that a raw row speaks of, which are one or those of the whole batch, with slots
        raw rows speak of one map · references: how many places there are, one or several for each row · most: rows that
        an output is made of · points of a level and head · sizes (height, width).
        Raises EngineError where these do not fit each other.
        """
        batch, tokens, heads, depth = value_shape
        maps = most if buffers[4] is None else 1
        rows = raw_rows * maps
        fits = min(rows, most, batch, references) > 0 and rows % batch == 0 and references % rows == 0
        fits = fits and points % (references // rows) == 0 and maps in (1, batch)
        if not fits or (buffers[4] is None and outputs != raw_rows) or not _fits(value_shape, points, sizes):
            raise EngineError(
                f"value {list(value_shape)}, {raw_rows} rows on {maps} maps, {references} places, {outputs} results of "
                f"{most} and maps {list(sizes)} do not fit"
            )
        queries, pillar = rows // batch, references // rows
        shape = _Shape(tokens, queries, heads, depth, len(sizes), points, raw_rows, maps, pillar, most)
        arguments = ctypes.byref(shape), _flat(sizes), *buffers
        self._team.share(outputs, lambda _, first, last: self._attend(*arguments, first, last))


def _fits(value_shape: Sequence[int], points: int, sizes: Sizes) -> bool:
    _, tokens, heads, depth = value_shape
    # Sizes below one could make up for others that are too large.
    whole = min(map(min, sizes)) > 0 and tokens == sum(h * w for h, w in sizes)
    few = depth <= MOST_DEPTH and heads * len(sizes) * points <= MOST_SAMPLES
    return whole and few and math.prod(value_shape[1:]) < _MOST_NUMBERS


def _flat(sizes: Sizes) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * (2 * len(sizes)))(*(side for size in sizes for side in size))
