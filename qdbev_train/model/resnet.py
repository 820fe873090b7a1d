# SPDX-License-Identifier: Apache-2.0
"""ResNet-50/101 with frozen BatchNorm, in "pytorch" and "caffe" style, with DCNv2 where asked."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from qdbev_ros.core.variant import BackboneSpec
from qdbev_train.model.dcn import ModulatedDeformConv2d
from qdbev_train.model.layers import conv_bn, frozen_batchnorm

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut: (B, in, H, W) -> (B, 4 * width, H / stride, W / stride)."""

    def __init__(self, in_channels: int, width: int, stride: int, style: str, deformable: bool) -> None:
        super().__init__()
        # The stride sits in the first 1x1 of Caffe's own models and in the 3x3 of torchvision's.
        first, second = (stride, 1) if style == "caffe" else (1, stride)
        out_channels = width * EXPANSION
        self.conv1 = nn.Conv2d(in_channels, width, 1, first, bias=False)
        self.bn1 = frozen_batchnorm(width)
        self.conv2: nn.Module = (
            ModulatedDeformConv2d(width, width, second)
            if deformable
            else nn.Conv2d(width, width, 3, second, padding=1, bias=False)
        )
        self.bn2 = frozen_batchnorm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = frozen_batchnorm(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, frozen_batchnorm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else conv_bn(x, self.downsample[0], self.downsample[1])
        y = F.relu(conv_bn(x, self.conv1, self.bn1))
        y = F.relu(conv_bn(y, self.conv2, self.bn2))
        return F.relu(conv_bn(y, self.conv3, self.bn3) + shortcut)


class ResNet(nn.Module):
    """Images (B, 3, H, W) -> feature maps of `spec.out_stages`: C2 (256, stride 4) .. C5 (2048, stride 32).

    Stages behind the last one asked for are not built.
    """

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.out_stages = spec.out_stages
        self.out_channels = [64 * 2 ** (stage - 1) * EXPANSION for stage in spec.out_stages]
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = frozen_batchnorm(64)
        channels = 64
        for stage in range(1, max(spec.out_stages) + 1):
            width = 64 * 2 ** (stage - 1)
            blocks = []
            for i in range(BLOCKS[spec.depth][stage - 1]):
                stride = 2 if i == 0 and stage > 1 else 1
                blocks.append(Bottleneck(channels, width, stride, spec.style, stage in spec.dcn_stages))
                channels = width * EXPANSION
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stages(self) -> list[list[nn.Module]]:
        """The modules of the stem (index 0) and of each stage, for freezing and for quantising part by part."""
        names = [name for name, _ in self.named_children() if name.startswith("layer")]
        return [[self.conv1, self.bn1], *([self.get_submodule(name)] for name in names)]

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(conv_bn(images, self.conv1, self.bn1)), 3, 2, padding=1)
        outputs = []
        for stage in range(1, max(self.out_stages) + 1):
            x = self.get_submodule(f"layer{stage}")(x)
            if stage in self.out_stages:
                outputs.append(x)
        return outputs
