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
from qdbev_train.training.losses import CODE_WEIGHTS, Targets, assigned_loss, detection_loss

HEAT_WEIGHT, DENSE_BOX_WEIGHT = 1.0, 0.25
CENTER_NOISE = 0.5  # metres per metre of box size
NO_DEPTH = 0.5  # metres; centres nearer to the camera than this are left out


@dataclass(frozen=True)
class DenoisingLayout:
    """Where the denoising queries of a batch stand: `groups` times `padded` of them, the first T of each are real."""

    groups: int
    padded: int


def gaussian_focal_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """CenterNet's penalty-reduced focal loss, summed; heat holds 1 at centres and less around them."""
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    positive = heat.eq(1).float()
    loss = positive * (1 - p) ** 2 * p.log() + (1 - positive) * (1 - heat) ** 4 * p**2 * (1 - p).log()
    return -loss.sum()


def draw_gaussians(shape: tuple[int, ...], labels: Tensor, centers: Tensor, sigma: float) -> Tensor:
    """Heat map (classes, H, W) with a peak of 1 in the cell of each centre (x, y in cells)."""
    heat = torch.zeros(shape)
    ys, xs = torch.arange(shape[1]), torch.arange(shape[2])
    for label, (x, y) in zip(labels.tolist(), centers.floor().tolist(), strict=True):
        bump = torch.exp(-((ys - y) ** 2)[:, None] / (2 * sigma**2) - ((xs - x) ** 2)[None] / (2 * sigma**2))
        heat[label] = torch.maximum(heat[label], bump)
    return heat


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
        self.bev_head = _dense_head(c, classes, 10)
        self.image_head = _dense_head(c, classes, 1)

    # --- extra queries ---------------------------------------------------------------------------------------------
    def extra_queries(self, targets: Sequence[Targets]) -> tuple[ExtraQueries, DenoisingLayout]:
        """Group queries, then denoising queries, with a mask that keeps every group to itself."""
        batch, device = len(targets), self.group_reference.device
        q, c = self.variant.transformer.queries, self.variant.transformer.channels
        n_group = self.query_groups * q
        embedding = self.group_embedding.weight[:n_group]
        position, content = embedding[:, :c], embedding[:, c:]
        reference = self.group_reference[:n_group].clamp(0.01, 0.99)
        layout = DenoisingLayout(self.denoising_groups, max(len(t.labels) for t in targets))
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
    ) -> dict[str, Tensor]:
        """Every help's loss. class_logits and codes (L, B, Q + G, 10) of all queries, bev (B, cells, C),
        image_features (B, N, C, H, W) of the finest level, lidar2img (B, N, 4, 4) at the input's scale."""
        q = self.variant.transformer.queries
        result: dict[str, Tensor] = {}
        if self.query_groups:
            spans = [slice(g * q, (g + 1) * q) for g in range(1, self.query_groups + 1)]
            groups = [
                detection_loss(class_logits[:, :, s], codes[:, :, s], targets, positives) for s in spans
            ]
            result["group"] = (
                sum((g["class"] + g["box"] for g in groups), codes.new_zeros(())) / self.query_groups
            )
        if layout.groups and layout.padded:
            start = (1 + self.query_groups) * q
            result["denoising"] = self._denoising_loss(
                class_logits[:, :, start:], codes[:, :, start:], targets, layout, positives
            )
        if self.dense_heads:
            result["bev_dense"] = self._bev_loss(bev, targets, positives)
            result["image_dense"] = self._image_loss(image_features, lidar2img, targets, positives)
        return result

    def _denoising_loss(
        self,
        logits: Tensor,
        codes: Tensor,
        targets: Sequence[Targets],
        layout: DenoisingLayout,
        positives: Tensor,
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
                masked, layer_codes, repeated, pairs, positives * layout.groups
            )
            total = total + class_loss + box_loss
        return total

    def _bev_loss(self, bev: Tensor, targets: Sequence[Targets], positives: Tensor) -> Tensor:
        spec, classes = self.variant.bev, len(self.variant.classes)
        maps = self.bev_head(bev.transpose(1, 2).reshape(len(targets), -1, spec.height, spec.width))
        total = maps.new_zeros(())
        for b, target in enumerate(targets):
            low, high = self._range(target.codes)
            cell = (high - low)[:2] / target.codes.new_tensor([spec.width, spec.height])
            centers = (target.codes[:, :2] - low[:2]) / cell
            heat = draw_gaussians((classes, spec.height, spec.width), target.labels.cpu(), centers.cpu(), 0.8)
            total = total + HEAT_WEIGHT * gaussian_focal_loss(maps[b, :classes], heat.to(maps.device))
            column = centers[:, 0].long().clamp(0, spec.width - 1)
            row = centers[:, 1].long().clamp(0, spec.height - 1)
            wanted = target.codes.clone()
            wanted[:, :2] -= (torch.stack([column, row], -1) + 0.5) * cell + low[:2]
            difference = (maps[b, classes:, row, column].T - wanted).abs() * wanted.new_tensor(CODE_WEIGHTS)
            total = total + DENSE_BOX_WEIGHT * difference.sum()
        return total / positives

    def _image_loss(
        self, features: Tensor, lidar2img: Tensor, targets: Sequence[Targets], positives: Tensor
    ) -> Tensor:
        batch, cameras, _, height, width = features.shape
        classes, image = len(self.variant.classes), self.variant.image
        maps = self.image_head(features.flatten(0, 1)).unflatten(0, (batch, cameras))
        scale = features.new_tensor([width / image.padded_width, height / image.padded_height])
        heats, total = [], maps.new_zeros(())
        for b, target in enumerate(targets):
            points = F.pad(target.codes[:, [0, 1, 4]], (0, 1), value=1.0)
            projected = torch.einsum("nij,tj->nti", lidar2img[b], points)
            depth = projected[..., 2]
            centers = projected[..., :2] / depth.clamp(min=NO_DEPTH)[..., None] * scale
            size = centers.new_tensor([width, height])
            inside = (depth > NO_DEPTH) & (centers >= 0).all(-1) & (centers < size).all(-1)
            for n in range(cameras):
                keep = inside[n]
                here = centers[n][keep]
                heats.append(
                    draw_gaussians((classes, height, width), target.labels[keep].cpu(), here.cpu(), 0.7)
                )
                column, row = here.long().unbind(-1)
                predicted = maps[b, n, classes, row, column]
                total = total + DENSE_BOX_WEIGHT * (predicted - depth[n][keep].log()).abs().sum()
        heat = torch.stack(heats).to(maps.device).unflatten(0, (batch, cameras))
        return (total + HEAT_WEIGHT * gaussian_focal_loss(maps[:, :, :classes], heat)) / positives


def _dense_head(channels: int, classes: int, regressed: int) -> nn.Sequential:
    last = nn.Conv2d(channels, classes + regressed, 1)
    # Heat maps start near zero everywhere: a uniform 0.5 would drown the first steps.
    bias = torch.zeros(classes + regressed)
    bias[:classes] = -2.19
    last.bias = nn.Parameter(bias)
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), last)
