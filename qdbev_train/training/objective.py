# SPDX-License-Identifier: Apache-2.0
"""What a run minimises: the losses of one frame as the output of one module, which is what DDP takes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from qdbev_train.data.dataset import Batch
from qdbev_train.model import BEVFormer, Output
from qdbev_train.training.auxiliary import TrainingHelps
from qdbev_train.training.config import TrainConfig
from qdbev_train.training.losses import Targets, detection_loss


class ExtraLoss(Protocol):
    """A further loss beside those of detection, such as a teacher's guidance; each process has its own."""

    def remember(self, history: Sequence[Batch], device: torch.device) -> None:
        """The past frames of a queue, oldest first, before the call for its last one; never called with streams."""

    def __call__(
        self, out: Output, images: Tensor, lidar2img: Tensor, can_bus: Tensor, has_prev: Tensor, task: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(weighted losses, numbers to log) by name. From the model's output and its inputs; `task` is the sum of all
        other losses, with its graph."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, of the same shapes on every process."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""


class Objective(nn.Module):
    """Model, training-only helps and an optional further loss: a batch's tensors in, its losses out."""

    def __init__(
        self, model: BEVFormer, helps: TrainingHelps, config: TrainConfig, extra_loss: ExtraLoss | None
    ) -> None:
        super().__init__()
        self.model, self.helps, self.extra_loss = model, helps, extra_loss
        self.bf16 = config.precision == "bf16"
        # Part of the model, as in released checkpoints.
        with torch.no_grad():
            model.pts_bbox_head.code_weights[6:8] = config.angle_weight
            model.pts_bbox_head.code_weights[8:] = config.velocity_weight
        off = {
            "group_": not config.query_groups,
            "denoising_": not config.denoising_groups,
            "dense.": not config.dense_heads,
        }
        for name, parameter in helps.named_parameters():
            if any(unused and name.startswith(prefix) for prefix, unused in off.items()):
                parameter.requires_grad_(False)

    def forward(
        self,
        images: Tensor,
        lidar2img: Tensor,
        can_bus: Tensor,
        labels: list[Tensor],
        codes: list[Tensor],
        positives: Tensor,
        prev_bev: Tensor | None,
        has_prev: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """(weighted losses, numbers that are only logged, the BEV map (B, cells, C) without gradient).

        The arguments are those of the model and of a Batch, on its device; positives: boxes in the batch of a process,
        on average over all of them.
        """
        targets = [Targets(k, c) for k, c in zip(labels, codes, strict=True)]
        extra, layout = self.helps.extra_queries(targets)
        with self.precision(images.device):
            out = self.model(
                images,
                lidar2img,
                can_bus,
                prev_bev,
                has_prev=has_prev,
                extra_queries=extra if extra.content.shape[1] else None,
            )
        q = self.helps.variant.transformer.queries
        weights = self.model.pts_bbox_head.code_weights
        losses = detection_loss(out.class_logits[:, :, :q], out.boxes[:, :, :q], targets, positives, weights)
        features = out.image_features[0].float()
        losses |= self.helps.losses(
            out.class_logits, out.boxes, out.bev, features, lidar2img, targets, layout, positives, weights
        )
        numbers: dict[str, Tensor] = {}
        if self.extra_loss is not None:
            task = torch.stack(list(losses.values())).sum()
            further, numbers = self.extra_loss(out, images, lidar2img, can_bus, has_prev, task)
            losses |= further
        return losses, {k: v.detach() for k, v in numbers.items()}, out.bev.detach()

    def precision(self, device: torch.device) -> AbstractContextManager[object]:
        """Where the network runs in bf16. Its losses are outside: they are float32."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def remember(self, history: Sequence[Batch]) -> Tensor:
        """The BEV map (B, cells, C) after the frames of a queue, computed as in deployment: no dropout, no gradient."""
        self.model.eval()
        device = next(self.model.parameters()).device
        bev: Tensor | None = None
        for batch in history:
            has_prev = None if bev is None else ~batch.is_first.to(device)
            images, lidar2img, can_bus = (
                t.to(device) for t in (batch.images, batch.lidar2img, batch.can_bus)
            )
            with self.precision(device):
                bev = self.model.remember(images, lidar2img, can_bus, bev, has_prev)
        self.model.train()
        if self.extra_loss is not None:
            self.extra_loss.remember(history, device)
        assert bev is not None
        return bev
