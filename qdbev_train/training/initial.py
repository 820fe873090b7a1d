# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: random weights, a backbone's, or a whole model's."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.variant import Variant, load_variant
from qdbev_train.checkpoint import load_model
from qdbev_train.model import (
    BEVFormer,
    CheckpointError,
    build_model,
    load_imagenet_backbone,
    spread_references,
)
from qdbev_train.model.checkpoint import find_misfit, grouped
from qdbev_train.released.reading import read_released
from qdbev_train.training.config import TrainConfig
from qdbev_train.training.loop import TrainingData

BACKBONE = "backbone:"
# Where a backbone is inside a detector of mmdetection3d (FCOS3D), inside a BEVFormer, or when it is by itself.
PREFIXES = ("img_backbone.", "backbone.", "")


def starting_model(config: TrainConfig, data: TrainingData) -> tuple[BEVFormer, Variant, Any]:
    """(model, its variant, quantisation of a student or None) as `config.init` says; the same for the same seed.

    Stem and first stage of a float model are frozen, as in BEVFormer, and so is every BatchNorm.
    """
    variant = load_variant(config.variant)
    if config.init not in ("random", "imagenet") and not config.init.startswith(BACKBONE):
        model, own, metadata = load_model(config.init)
        if own != variant:
            raise ConfigError(f"{config.init}: holds another variant than {config.variant}")
        if "quantisation" in metadata:
            return model, variant, metadata["quantisation"]
        model.freeze_backbone(1)
        return model, variant, None
    torch.manual_seed(config.seed)
    model = build_model(variant)
    if config.init == "random":
        *_, batch = next(iter(data.open(0, 0, 1)))
        fit_batchnorm(model.img_backbone, batch.images.flatten(0, 1))
    elif config.init == "imagenet":
        load_imagenet_backbone(model)
        spread_references(model)
    else:
        path = Path(config.init.removeprefix(BACKBONE))
        said = load_backbone(model, path)
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, one speaks
            print(f"{path}: {said}")
    model.freeze_backbone(1)
    return model, variant, None


def load_backbone(model: BEVFormer, path: Path) -> str:
    """Fills the backbone from a PyTorch or safetensors file of a detector or of a backbone; says what was left out.

    CheckpointError where a tensor is missing or has another shape.
    """
    state = read_released(path).state_dict
    prefix = next(p for p in PREFIXES if any(key.startswith(p) for key in state))
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    wanted = model.img_backbone.state_dict()
    # The counter of batches was added to BatchNorm later than some of these files were written, and is of no use here.
    own = {k: v for k, v in wanted.items() if k.endswith("num_batches_tracked")} | own
    misfit = find_misfit(wanted, {key: own[key] for key in wanted if key in own})
    if misfit:
        raise CheckpointError(f"{path}: no backbone of variant {model.variant.name}: {misfit.summary()}")
    model.img_backbone.load_state_dict({key: own[key] for key in wanted})
    left = [key for key in state if key.removeprefix(prefix) not in wanted or not key.startswith(prefix)]
    said = (
        f"img_backbone has its {len(wanted)} tensors from here ({prefix or 'no prefix'}), all else is random"
    )
    return said + (f"; left out: {grouped(left)}" if left else "")


class _Measured(nn.Module):
    """Stands for a convolution and its BatchNorm: sets the running statistics to those of what comes through."""

    def __init__(self, conv: nn.Module, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        variance, mean = torch.var_mean(y, dim=(0, 2, 3))
        assert self.bn.running_mean is not None
        assert self.bn.running_var is not None
        self.bn.running_mean.copy_(mean)
        self.bn.running_var.copy_(variance)
        return self.bn(y)


@torch.no_grad()
def fit_batchnorm(backbone: nn.Module, images: Tensor) -> None:
    """Sets the frozen BatchNorms of a random backbone to the statistics of images (N, 3, H, W).

    Frozen at unit statistics they would let the signal of a random network grow or die from layer to layer.
    """
    pairs = []
    for parent in list(backbone.modules()):
        children = list(parent.named_children())
        for (conv_name, conv), (bn_name, bn) in pairwise(children):
            if isinstance(bn, nn.BatchNorm2d):
                pairs.append((parent, conv_name, conv, bn_name, bn))
    training = backbone.training
    backbone.eval()
    # conv_bn calls the convolution alone where the BatchNorm is nn.Identity.
    for parent, conv_name, conv, bn_name, bn in pairs:
        setattr(parent, conv_name, _Measured(conv, bn).eval())
        setattr(parent, bn_name, nn.Identity())
    backbone(images)
    for parent, conv_name, conv, bn_name, bn in pairs:
        setattr(parent, conv_name, conv)
        setattr(parent, bn_name, bn)
    backbone.train(training)
