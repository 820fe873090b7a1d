# SPDX-License-Identifier: Apache-2.0
"""Starting points for training from ImageNet weights instead of from a released checkpoint."""

from __future__ import annotations

import torch

from qdbev_ros.core.errors import ConfigError
from qdbev_train.model.bevformer import BEVFormer
from qdbev_train.model.mobilenet import MobileNetV2
from qdbev_train.model.mobilenet import load_imagenet_backbone as fill_backbone

# Steps of the R2 sequence (Roberts 2018), which spreads any number of points evenly over a square.
R2_STEPS = (0.7548776662466927, 0.5698402909980532)


def load_imagenet_backbone(model: BEVFormer) -> None:
    """ImageNet weights into the backbone of a mobilenet_v2 variant. Raises DataError where they are not installed."""
    if not isinstance(model.img_backbone, MobileNetV2):
        raise ConfigError(f"variant {model.variant.name}: ImageNet weights are known for mobilenet_v2 only")
    fill_backbone(model.img_backbone)


def spread_references(model: BEVFormer) -> None:
    """Makes the queries' first reference points cover the BEV evenly, at half the height of the range.

    Only the position halves of the query embedding move, each by the least amount that puts its reference in place.
    """
    head = model.pts_bbox_head
    linear, channels = head.transformer.reference_points, model.variant.transformer.channels
    index = torch.arange(1, head.query_embedding.num_embeddings + 1, dtype=torch.float64)
    xy = torch.stack([(0.5 + step * index) % 1.0 for step in R2_STEPS], dim=-1)
    target = torch.cat([xy, torch.full_like(xy[:, :1], 0.5)], dim=-1).clamp(0.01, 0.99).logit().float()
    with torch.no_grad():
        position = head.query_embedding.weight[:, :channels]
        position += (target - linear(position)) @ torch.linalg.pinv(linear.weight).T
