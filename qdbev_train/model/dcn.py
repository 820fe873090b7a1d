# SPDX-License-Identifier: Apache-2.0
"""Modulated deformable convolution (DCNv2) in plain torch (reference: Zhu et al. 2019, one deform group)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TAPS = 9  # of a 3x3 kernel, row by row


class ModulatedDeformConv2d(nn.Module):
    """A 3x3 convolution, padding 1, whose nine taps are displaced and weighted per pixel.

    `conv_offset` gives 27 channels: 18 offsets in pixels, (y, x) interleaved per tap, then 9 mask logits. As in
    torchvision's `deform_conv2d`, taps outside the map read zeros.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.bias = None
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.conv_offset = nn.Conv2d(in_channels, 3 * TAPS, 3, stride, padding=1)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.zeros_(self.conv_offset.weight)
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, None)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W') with `weight` (out, in, 3, 3) in place of the module's own."""
        columns = self.columns(x)  # (B, in, 9, H', W')
        out = torch.einsum("oct,bcthw->bohw", weight.flatten(2), columns)
        return out if bias is None else out + bias[:, None, None]

    def columns(self, x: Tensor) -> Tensor:
        """(B, in, 9, H', W'): the displaced taps times their masks."""
        return deformed_taps(x, self.conv_offset(x), self.stride)


def deformed_taps(x: Tensor, raw: Tensor, stride: int) -> Tensor:
    """(B, in, 9, H', W'): nine taps of x (B, in, H, W) displaced and weighted as `raw` (B, 27, H', W') says, bilinear.

    Sampling is done in FP32.
    """
    height, width = x.shape[-2:]
    raw = raw.float()
    batch, _, out_h, out_w = raw.shape
    offsets = raw[:, : 2 * TAPS].reshape(batch, TAPS, 2, out_h, out_w)
    mask = raw[:, 2 * TAPS :].sigmoid()  # (B, 9, H', W')
    tap_y = torch.arange(3, device=x.device, dtype=torch.float32).repeat_interleave(3)[:, None, None] - 1
    tap_x = torch.arange(3, device=x.device, dtype=torch.float32).repeat(3)[:, None, None] - 1
    rows = torch.arange(out_h, device=x.device, dtype=torch.float32)[None, :, None] * stride
    cols = torch.arange(out_w, device=x.device, dtype=torch.float32)[None, None, :] * stride
    y = rows + tap_y + offsets[:, :, 0]
    x_pixel = cols + tap_x + offsets[:, :, 1]
    # grid_sample with align_corners=False puts the centre of pixel i at (2 i + 1) / size - 1.
    grid = torch.stack([(2 * x_pixel + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    grid = grid.reshape(batch, TAPS * out_h, out_w, 2)
    taps = F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (taps.reshape(batch, -1, TAPS, out_h, out_w) * mask[:, None]).to(x.dtype)
