# SPDX-License-Identifier: Apache-2.0
"""BEV encoder: temporal self-attention, spatial cross-attention and feed-forward layers, post-norm.

Dimension letters are those of bevformer.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdbev_ros.core.variant import TransformerSpec
from qdbev_train.model.attention import History, MapSize, SpatialCrossAttention, TemporalSelfAttention, Views
from qdbev_train.model.layers import FFN


class EncoderLayer(nn.Module):
    """bev (B, cells, C), position (B, cells, C) -> bev (B, cells, C)."""

    def __init__(self, spec: TransformerSpec, levels: int) -> None:
        super().__init__()
        c = spec.channels
        self.attentions = nn.ModuleList(
            [
                TemporalSelfAttention(c, spec.heads, spec.tsa_points, spec.dropout),
                SpatialCrossAttention(c, spec.heads, levels, spec.sca_points, spec.dropout),
            ]
        )
        self.ffns = nn.ModuleList([FFN(c, spec.ffn_channels, spec.dropout)])
        self.norms = nn.ModuleList(nn.LayerNorm(c) for _ in range(3))

    def forward(self, bev: Tensor, position: Tensor, history: History, views: Views, size: MapSize) -> Tensor:
        bev = self.norms[0](self.attentions[0](bev, position, history, size))
        bev = self.norms[1](self.attentions[1](bev, views))
        return self.norms[2](self.ffns[0](bev))


class Encoder(nn.Module):
    """The layers in a row; every layer sees the same history and the same views."""

    def __init__(self, spec: TransformerSpec, levels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(spec, levels) for _ in range(spec.encoder_layers))

    def forward(self, bev: Tensor, position: Tensor, history: History, views: Views, size: MapSize) -> Tensor:
        for layer in self.layers:
            bev = layer(bev, position, history, views, size)
        return bev


def cell_centres(height: int, width: int) -> Tensor:
    """(cells, 2): centre (x, y) of each BEV cell as a fraction of the map."""
    y, x = torch.meshgrid(
        (torch.arange(height, dtype=torch.float32) + 0.5) / height,
        (torch.arange(width, dtype=torch.float32) + 0.5) / width,
        indexing="ij",
    )
    return torch.stack([x, y], dim=-1).reshape(-1, 2)
