# SPDX-License-Identifier: Apache-2.0
"""Feature pyramid: 1x1 laterals, nearest top-down path, 3x3 outputs; no norm, no activation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ConvModule(nn.Module):
    """A convolution with bias under the key `conv`, where released checkpoints have it."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class FPN(nn.Module):
    """Backbone maps, finest first -> `levels` maps with C channels, finest first.

    With fewer levels than maps only the finest come out, and the coarser ones feed the top-down path. Levels beyond
    the maps are stride-2 3x3 convolutions of the last output, with a ReLU in front from the second one on.
    """

    def __init__(self, in_channels: list[int], channels: int, levels: int) -> None:
        super().__init__()
        maps = len(in_channels)
        self.lateral_convs = nn.ModuleList(ConvModule(c, channels, 1, 1) for c in in_channels)
        self.fpn_convs = nn.ModuleList(
            ConvModule(channels, channels, 3, 1 if level < maps else 2) for level in range(levels)
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            finer = laterals[i - 1]
            laterals[i - 1] = finer + F.interpolate(laterals[i], size=finer.shape[-2:], mode="nearest")
        outputs: list[Tensor] = []
        for level, conv in enumerate(self.fpn_convs):
            if level < len(laterals):
                outputs.append(conv(laterals[level]))
            elif level == len(laterals):
                outputs.append(conv(outputs[-1]))
            else:
                outputs.append(conv(F.relu(outputs[-1])))
        return outputs
