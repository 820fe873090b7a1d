# SPDX-License-Identifier: Apache-2.0
"""A model that is quick to quantise, and frames to calibrate it with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qdbev_ros.core.variant import BackboneSpec, Variant
from qdbev_train.model import BEVFormer, build_model
from tests import model_samples


@dataclass(frozen=True)
class Frames:
    """What calibration needs of a batch."""

    images: Tensor
    lidar2img: Tensor
    can_bus: Tensor
    is_first: Tensor


def small_variant() -> Variant:
    """The sample variant with the first seven blocks of its backbone only."""
    return replace(
        model_samples.small_variant(), backbone=BackboneSpec("mobilenet_v2", 0, "pytorch", (1, 2), (), 2)
    )


def small_model(seed: int = 0) -> BEVFormer:
    """A model of `small_variant` in which nothing is zero."""
    torch.manual_seed(seed)
    model = build_model(small_variant()).eval()
    model_samples.unsettle(model)
    return model


def frames(model: BEVFormer, count: int) -> list[Any]:
    """`count` frames of one drive, smooth pictures, the first one without history."""
    image = model.variant.image
    lidar2img, bus = model_samples.rig(model.variant)[None], model_samples.can_bus(3.0, 2.0)[None]
    batches = []
    for i in range(count):
        noise = torch.randn(6, 3, 4, 8, generator=torch.Generator().manual_seed(i))
        pictures = nn.functional.interpolate(noise, (image.height, image.width), mode="bilinear")
        batches.append(Frames(pictures[None], lidar2img, bus, torch.tensor([i == 0])))
    return batches
