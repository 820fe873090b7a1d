# SPDX-License-Identifier: Apache-2.0
"""The float teacher beside a training student: same pictures, a memory of its own, no gradient, no dropout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qdbev_train.data.dataset import Batch
from qdbev_train.model import BEVFormer


@dataclass(frozen=True)
class Seen:
    """image_features [(B, N, C, h_l, w_l)], bev (B, cells, C), mask (B, N, cells) bool: camera n sees the cell."""

    image_features: list[Tensor]
    bev: Tensor
    mask: Tensor


class Teacher:
    """Runs a float model over the frames that a student learns from. `memory` is its own last map (B, cells, C)."""

    def __init__(self, model: BEVFormer) -> None:
        self.model = model.eval().requires_grad_(False)
        self.memory: Tensor | None = None

    def remember(self, history: Sequence[Batch], device: torch.device) -> None:
        """Takes a queue's past frames, oldest first, for the memory, whatever was seen before."""
        self.memory = None
        for batch in history:
            images, lidar2img, can_bus = (
                t.to(device) for t in (batch.images, batch.lidar2img, batch.can_bus)
            )
            self.see(images, lidar2img, can_bus, ~batch.is_first.to(device))

    @torch.no_grad()
    def see(self, images: Tensor, lidar2img: Tensor, can_bus: Tensor, has_prev: Tensor | None) -> Seen:
        """The teacher's maps of a frame; the arguments are those of the model. Its BEV map becomes the memory."""
        model = self.model.to(images.device)
        tables = model.camera_tables(lidar2img, images.shape[-2:])
        has_prev = None if self.memory is None else has_prev
        inputs = model.encoder_inputs(images, tables, can_bus, self.memory, has_prev)
        features = model.image_features(images)
        self.memory = model.pts_bbox_head.encode(features, *inputs)
        return Seen(features, self.memory, tables.mask.to(images.device))
