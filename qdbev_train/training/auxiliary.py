# SPDX-License-Identifier: Apache-2.0
"""Training-only helps: nothing here is part of the deployed graph.

A plain BEVFormer learns slowly from few samples. Three additions shorten that, all thrown away after training:
further groups of queries matched on their own (Group DETR), denoising queries that start at perturbed true boxes
(DN-DETR), and dense centre heat maps on the BEV map and on the image features (CenterNet, CenterPoint).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdbev_ros.core.variant import Variant
from qdbev_train.model import ExtraQueries
from qdbev_train.training.dense_heads import DenseHeads
from qdbev_train.training.losses import Targets, assigned_loss, detection_loss

CENTER_NOISE = 0.5  # metres per metre of box size


@dataclass(frozen=True)
class DenoisingLayout:
    """Where the denoising queries of a batch stand: `groups` times `padded` of them, the first T of each are real."""

    groups: int
    padded: int


class TrainingHelps(nn.Module):
    """The extra queries and dense heads of one model. `extra_queries` before the model, `losses` after it."""

    def __init__(self, variant: Variant, query_groups: int, denoising_groups: int, dense_heads: bool) -> None:
        super().__init__()
        c, classes = variant.transformer.channels, len(variant.classes)
        self.variant = variant
        self.query_groups, self.denoising_groups, self.dense_heads = (
            query_groups,
            denoising_groups,
            dense_heads,
        )
        q = variant.transformer.queries
        self.group_embedding = nn.Embedding(max(1, query_groups * q), 2 * c)
        self.group_reference = nn.Parameter(torch.rand(max(1, query_groups * q), 3))
        self.denoising_content = nn.Sequential(nn.Linear(10 + classes, c), nn.ReLU(), nn.Linear(c, c))
        self.denoising_position = nn.Sequential(nn.Linear(3, c), nn.ReLU(), nn.Linear(c, c))
        self.dense = DenseHeads(variant)

    # --- extra queries ---------------------------------------------------------------------------------------------
    def extra_queries(self, targets: Sequence[Targets]) -> tuple[ExtraQueries, DenoisingLayout]:
        """Group queries, then denoising queries, with a mask that keeps every group to itself."""
        batch, device = len(targets), self.group_reference.device
        q, c = self.variant.transformer.queries, self.variant.transformer.channels
        n_group = self.query_groups * q
        embedding = self.group_embedding.weight[:n_group]
        position, content = embedding[:, :c], embedding[:, c:]
        reference = self.group_reference[:n_group].clamp(0.01, 0.99)
        # Never none: a process whose frames have no box must have the losses and gradients of the others.
        layout = DenoisingLayout(self.denoising_groups, max(1, *(len(t.labels) for t in targets)))
        noised, classes = self._noised_boxes(targets, layout)
        centers = self._normalised(noised[..., [0, 1, 4]])
        dn_content = self.denoising_content(torch.cat([self._scaled(noised), classes], -1))
        extra = ExtraQueries(
            content=torch.cat([content.expand(batch, -1, -1), dn_content], 1),
            position=torch.cat([position.expand(batch, -1, -1), self.denoising_position(centers)], 1),
            reference=torch.cat([reference.expand(batch, -1, -1), centers], 1),
            may_attend=self._mask(q, layout).to(device),
        )
        return extra, layout

    def _mask(self, q: int, layout: DenoisingLayout) -> Tensor:
        """(Q + G, Q + G) bool, True where attention is allowed: each block sees itself only."""
        blocks = [q] * (1 + self.query_groups) + [layout.padded] * layout.groups
        owner = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(blocks))
        return owner[:, None] == owner[None]

    def _noised_boxes(self, targets: Sequence[Targets], layout: DenoisingLayout) -> tuple[Tensor, Tensor]:
        """(B, groups * padded, 10) perturbed codes and (B, groups * padded, classes) partly wrong one-hot labels."""
        device, n_classes = self.group_reference.device, len(self.variant.classes)
        codes = torch.zeros(len(targets), layout.groups, layout.padded, 10, device=device)
        classes = torch.zeros(len(targets), layout.groups, layout.padded, n_classes, device=device)
        for b, target in enumerate(targets):
            t = len(target.labels)
            wrong = torch.rand(layout.groups, t, device=device) < 0.1
            labels = torch.where(
                wrong, torch.randint(n_classes, (layout.groups, t), device=device), target.labels
            )
            classes[b, :, :t] = F.one_hot(labels, n_classes).float()
            noise = torch.rand(layout.groups, t, 10, device=device) * 2 - 1
            reach = target.codes[:, [2, 3]].exp().amax(-1).clamp(1.0, 6.0) * CENTER_NOISE
            code = target.codes + noise * 0.2
            code[..., [0, 1]] = target.codes[:, [0, 1]] + noise[..., [0, 1]] * reach[:, None]
            code[..., 6:] = 0.0  # angle and velocity are to be found, not copied
            codes[b, :, :t] = code
        return codes.flatten(1, 2), classes.flatten(1, 2)

    def _normalised(self, centers: Tensor) -> Tensor:
        low, high = self._range(centers)
        return ((centers - low) / (high - low)).clamp(0.01, 0.99)

    def _scaled(self, codes: Tensor) -> Tensor:
        return codes * codes.new_tensor([0.02, 0.02, 1, 1, 0.2, 1, 1, 1, 0.1, 0.1])

    def _range(self, like: Tensor) -> tuple[Tensor, Tensor]:
        pc_range = self.variant.bev.pc_range
        return like.new_tensor(pc_range[:3]), like.new_tensor(pc_range[3:])

    # --- losses ----------------------------------------------------------------------------------------------------
    def losses(
        self,
        class_logits: Tensor,
        codes: Tensor,
        bev: Tensor,
        image_features: Tensor,
        lidar2img: Tensor,
        targets: Sequence[Targets],
        layout: DenoisingLayout,
        positives: Tensor,
        code_weights: Tensor,
    ) -> dict[str, Tensor]:
        """Every help's loss. class_logits and codes (L, B, Q + G, 10) of all queries, bev (B, cells, C),
        image_features (B, N, C, H, W) of the finest level, lidar2img (B, N, 4, 4) at the input's scale."""
        q = self.variant.transformer.queries
        result: dict[str, Tensor] = {}
        if self.query_groups:
            spans = [slice(g * q, (g + 1) * q) for g in range(1, self.query_groups + 1)]
            groups = [
                detection_loss(class_logits[:, :, s], codes[:, :, s], targets, positives, code_weights)
                for s in spans
            ]
            result["group"] = (
                sum((g["class"] + g["box"] for g in groups), codes.new_zeros(())) / self.query_groups
            )
        if layout.groups:
            start = (1 + self.query_groups) * q
            result["denoising"] = self._denoising_loss(
                class_logits[:, :, start:], codes[:, :, start:], targets, layout, positives, code_weights
            )
        if self.dense_heads:
            size = (self.variant.image.padded_height, self.variant.image.padded_width)
            result |= self.dense.bev_losses(bev, targets, positives, code_weights)
            result |= self.dense.image_losses(image_features, lidar2img, targets, positives, size)
        return result

    def _denoising_loss(
        self,
        logits: Tensor,
        codes: Tensor,
        targets: Sequence[Targets],
        layout: DenoisingLayout,
        positives: Tensor,
        code_weights: Tensor,
    ) -> Tensor:
        repeated = [
            Targets(t.labels.repeat(layout.groups), t.codes.repeat(layout.groups, 1)) for t in targets
        ]
        pairs, real = [], torch.zeros(logits.shape[1], logits.shape[2], 1, device=logits.device)
        for b, target in enumerate(targets):
            t = len(target.labels)
            index = torch.cat([torch.arange(t) + g * layout.padded for g in range(layout.groups)]).to(
                logits.device
            )
            real[b, index] = 1.0
            pairs.append((index, torch.arange(t * layout.groups, device=logits.device)))
        total = codes.new_zeros(())
        for layer_logits, layer_codes in zip(logits, codes, strict=True):
            # Padding queries say "nothing" with certainty, so they cost nothing.
            masked = layer_logits * real + (real - 1) * 20.0
            class_loss, box_loss = assigned_loss(
                masked, layer_codes, repeated, pairs, positives * layout.groups, code_weights
            )
            total = total + class_loss + box_loss
        return total
