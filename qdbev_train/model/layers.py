# SPDX-License-Identifier: Apache-2.0
"""Small building blocks: convolution with a frozen BatchNorm, and the feed-forward network."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdbev_train.model.dcn import ModulatedDeformConv2d


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """FP32 also where the caller runs under autocast: positions in half precision would be decimetres off."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # an exporter would trace an autocast that changes nothing


def fold_batchnorm(conv: nn.Conv2d | ModulatedDeformConv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals `bn(conv(x))` on running statistics.

    Returns weight, shaped as conv.weight, and bias (out channels,). Training, quantisation and export all use this
    function, so that they agree to the bit.
    """
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    bias = bn.bias - bn.running_mean * scale
    if conv.bias is not None:
        bias = bias + conv.bias * scale
    return conv.weight * scale[:, None, None, None], bias


def conv_bn(x: Tensor, conv: nn.Module, bn: nn.Module) -> Tensor:
    """`bn(conv(x))` with the BatchNorm frozen: (B, in, H, W) -> (B, out, H', W').

    The BatchNorm is folded into the weight on the fly, which saves a pass over the activations forward and two
    backward. Where `bn` is nn.Identity, `conv` already holds the folded weight (a quantised convolution does).
    """
    if isinstance(bn, nn.Identity):
        return conv(x)
    assert isinstance(bn, nn.BatchNorm2d)
    if isinstance(conv, ModulatedDeformConv2d):
        weight, bias = fold_batchnorm(conv, bn)
        return conv.convolve(x, weight, bias)
    assert isinstance(conv, nn.Conv2d)
    weight, bias = fold_batchnorm(conv, bn)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def frozen_batchnorm(channels: int) -> nn.BatchNorm2d:
    """A BatchNorm2d whose scale and shift take no gradient; `conv_bn` only ever reads its running statistics."""
    bn = nn.BatchNorm2d(channels)
    bn.weight.requires_grad_(False)
    bn.bias.requires_grad_(False)
    return bn


class FFN(nn.Module):
    """Linear, ReLU, Linear with a residual: (B, cells or Q, C) -> the same. Keys: layers.0.0 and layers.1."""

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        expand = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.layers = nn.Sequential(expand, nn.Linear(hidden, channels), nn.Dropout(dropout))
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)
