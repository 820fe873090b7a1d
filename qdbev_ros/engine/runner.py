# SPDX-License-Identifier: Apache-2.0
"""What a backend has to offer."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.preprocess import PictureGrid

Floats = NDArray[np.float32]


class Runner(Protocol):
    """One compiled network: named arrays in, named arrays out. Not for several threads at once.

    It is made from a master with stage outputs (`stage_outputs.with_stage_outputs`), and `run` answers with
    class_logits, boxes, bev and, where `stage_outputs` is set, with those. It takes the inputs of the master
    (docs/package_format.md); one that `turns_memory` takes in place of `prev_bev` the last frame's map as it was,
    `memory` (cells, C), and `sources` (1, cells), see core.ego_motion.rotation_sources. `images` may be codes where
    there is a `picture_grid`.
    """

    description: str
    turns_memory: bool
    stage_outputs: bool
    picture_grid: PictureGrid | None

    def run(self, tensors: dict[str, NDArray[Any]]) -> dict[str, Floats]: ...
