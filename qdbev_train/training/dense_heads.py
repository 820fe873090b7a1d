# SPDX-License-Identifier: Apache-2.0
"""Dense heads on the BEV map and on the image features: training-only helps, thrown away afterwards.

Every cell or pixel at an object's centre says what it is and how it stands there (CenterPoint on the map, FCOS3D on the
pictures), so that backbone and encoder learn from the first step on, not only through the few queries that matched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdbev_ros.core.variant import CLASSES, BevSpec, Variant
from qdbev_train.training.losses import Targets

HEAT_WEIGHT, BOX_WEIGHT, BIN_WEIGHT = 1.0, 0.25, 0.5
NO_DEPTH = 0.5  # metres; centres nearer to the camera than this are left out
HEADINGS = 12  # bins of a full turn
SPEEDS = (0.3, 2.0, 5.0, 9.0)  # metres per second, borders between five bins
# They stand still; their two ends look the same, or all sides do.
MOTIONLESS = [CLASSES.index("barrier"), CLASSES.index("traffic_cone")]
IMAGE_CODES = 4  # log depth, log width, log length, log height


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


def headings(codes: Tensor) -> Tensor:
    """(T,) angle about z of the boxes' length axis against x, in radians, from codes (T, 10)."""
    return -torch.atan2(codes[:, 6], codes[:, 7]) - math.pi / 2


def heading_loss(logits: Tensor, angles: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (T, HEADINGS) against the bins of angles (T,), summed; MOTIONLESS classes are free.

    An L1 loss on sine and cosine stays where it is as long as an axis could point either way; bins do not.
    """
    bins = (angles / (2 * math.pi) * HEADINGS).floor().long() % HEADINGS
    return _bin_loss(logits, bins, labels)


def speed_loss(logits: Tensor, codes: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (T, bins) against the speeds in codes (T, 10), summed; MOTIONLESS classes are free.

    Of velocity as of headings: the middle between parked and driving is L1's answer where either may be.
    """
    return _bin_loss(logits, torch.bucketize(codes[:, 8:10].norm(dim=-1), codes.new_tensor(SPEEDS)), labels)


def _bin_loss(logits: Tensor, bins: Tensor, labels: Tensor) -> Tensor:
    counted = ~torch.isin(labels, labels.new_tensor(MOTIONLESS))
    return BIN_WEIGHT * F.cross_entropy(logits[counted], bins[counted], reduction="sum")


def camera_centres(lidar2img: Tensor) -> Tensor:
    """(N, 3) where the cameras stand in the LIDAR_TOP frame, from projections (N, 4, 4)."""
    matrices, offsets = lidar2img[:, :3, :3].double(), lidar2img[:, :3, 3:].double()
    return -torch.linalg.solve(matrices, offsets)[..., 0].float()


class DenseHeads(nn.Module):
    """Both heads of one model and their losses."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        c, self.classes = variant.transformer.channels, len(variant.classes)
        self.bev: BevSpec = variant.bev
        self.bev_head = _head(c, self.classes, 10 + HEADINGS + len(SPEEDS) + 1)
        self.image_head = _head(c, self.classes, IMAGE_CODES + HEADINGS)

    def bev_losses(
        self, bev: Tensor, targets: Sequence[Targets], positives: Tensor, code_weights: Tensor
    ) -> dict[str, Tensor]:
        """From the BEV map (B, cells, C); the heading is that in the LIDAR_TOP frame. Speed shows in the map
        alone, which has a past."""
        spec, low = self.bev, bev.new_tensor(self.bev.pc_range[:2])
        cell = (bev.new_tensor(spec.pc_range[3:5]) - low) / bev.new_tensor([spec.width, spec.height])
        maps = self.bev_head(bev.transpose(1, 2).unflatten(-1, (spec.height, spec.width)))
        heat_loss, box_loss, turn_loss, speeds_loss = bev.new_zeros(4)
        for b, target in enumerate(targets):
            centers = (target.codes[:, :2] - low) / cell
            heat = draw_gaussians(
                (self.classes, spec.height, spec.width), target.labels.cpu(), centers.cpu(), 0.8
            )
            heat_loss = heat_loss + gaussian_focal_loss(maps[b, : self.classes], heat.to(maps.device))
            column = centers[:, 0].long().clamp(0, spec.width - 1)
            row = centers[:, 1].long().clamp(0, spec.height - 1)
            wanted = target.codes.clone()
            wanted[:, :2] -= (torch.stack([column, row], -1) + 0.5) * cell + low
            found = maps[b, self.classes :, row, column].T
            box_loss = box_loss + ((found[:, :10] - wanted).abs() * code_weights).sum()
            turns, speeds = found[:, 10 : 10 + HEADINGS], found[:, 10 + HEADINGS :]
            turn_loss = turn_loss + heading_loss(turns, headings(target.codes), target.labels)
            speeds_loss = speeds_loss + speed_loss(speeds, target.codes, target.labels)
        dense = (HEAT_WEIGHT * heat_loss + BOX_WEIGHT * box_loss) / positives
        return {
            "bev_dense": dense,
            "bev_heading": turn_loss / positives,
            "bev_speed": speeds_loss / positives,
        }

    def image_losses(
        self,
        features: Tensor,
        lidar2img: Tensor,
        targets: Sequence[Targets],
        positives: Tensor,
        size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """From image features (B, N, C, h, w); lidar2img (B, N, 4, 4) at the pictures' `size` (height, width).

        The heading is the angle against the camera's line of sight, which is what a picture shows.
        """
        batch, cameras, _, height, width = features.shape
        maps = self.image_head(features.flatten(0, 1)).unflatten(0, (batch, cameras))
        scale = features.new_tensor([width / size[1], height / size[0]])
        heat_loss, box_loss, turn_loss = features.new_zeros(3)
        for b, target in enumerate(targets):
            points = F.pad(target.codes[:, [0, 1, 4]], (0, 1), value=1.0)
            projected = torch.einsum("nij,tj->nti", lidar2img[b], points)
            depth = projected[..., 2]
            centers = projected[..., :2] / depth.clamp(min=NO_DEPTH)[..., None] * scale
            limits = centers.new_tensor([width, height])
            inside = (depth > NO_DEPTH) & (centers >= 0).all(-1) & (centers < limits).all(-1)
            eyes = camera_centres(lidar2img[b])
            for n in range(cameras):
                keep = inside[n]
                here, codes, labels = centers[n][keep], target.codes[keep], target.labels[keep]
                heat = draw_gaussians((self.classes, height, width), labels.cpu(), here.cpu(), 0.7)
                heat_loss = heat_loss + gaussian_focal_loss(maps[b, n, : self.classes], heat.to(maps.device))
                column, row = here.long().unbind(-1)
                found = maps[b, n, self.classes :, row, column].T
                wanted = torch.cat([depth[n][keep, None].log(), codes[:, [2, 3, 5]]], dim=1)
                box_loss = box_loss + (found[:, :IMAGE_CODES] - wanted).abs().sum()
                sight = codes[:, :2] - eyes[n, :2]
                angles = headings(codes) - torch.atan2(sight[:, 1], sight[:, 0])
                turn_loss = turn_loss + heading_loss(found[:, IMAGE_CODES:], angles, labels)
        dense = (HEAT_WEIGHT * heat_loss + BOX_WEIGHT * box_loss) / positives
        return {"image_dense": dense, "image_heading": turn_loss / positives}


def _head(channels: int, classes: int, regressed: int) -> nn.Sequential:
    last = nn.Conv2d(channels, classes + regressed, 1)
    # Heat maps start near zero everywhere: a uniform 0.5 would drown the first steps.
    bias = torch.zeros(classes + regressed)
    bias[:classes] = -2.19
    last.bias = nn.Parameter(bias)
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), last)
