# SPDX-License-Identifier: Apache-2.0
"""The float teacher beside a training student: same pictures, a memory of its own, no gradient, no dropout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qdbev_train.data.dataset import Batch
from qdbev_train.model import BEVFormer, Output


@dataclass(frozen=True)
class Seen:
    """image_features [(B, N, C, h_l, w_l)], bev (B, cells, C), mask (B, N, cells) bool: camera n sees the cell."""

    image_features: list[Tensor]
    bev: Tensor
    mask: Tensor


class Teacher:
    """Runs a float model over the batches that a student learns from."""

    def __init__(self, model: BEVFormer) -> None:
        self.model = model.eval().requires_grad_(False)
        self._previous: Tensor | None = None

    @torch.no_grad()
    def see(self, history: Sequence[Batch], batch: Batch) -> Seen:
        """The teacher's maps of `batch`. Its past is `history` where that is given, else the batch seen before."""
        if history:
            self._previous = None
        for frames in (*history, batch):
            out = self._look(frames)
        mask = self.model.camera_tables(batch.lidar2img).mask
        return Seen(out.image_features, out.bev, mask.to(out.bev.device))

    def _look(self, batch: Batch) -> Output:
        device = next(self.model.parameters()).device
        previous = self._previous
        out: Output = self.model(
            batch.images.to(device),
            batch.lidar2img.to(device),
            batch.can_bus.to(device),
            previous,
            has_prev=None if previous is None else ~batch.is_first.to(device),
        )
        self._previous = out.bev
        return out
