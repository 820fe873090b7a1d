# SPDX-License-Identifier: Apache-2.0
"""Object decoder: self-attention among queries, deformable cross-attention on the BEV map, feed-forward; post-norm.

Dimension letters are those of bevformer.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdbev_ros.core.variant import TransformerSpec
from qdbev_train.model.attention import BevCrossAttention, MapSize
from qdbev_train.model.layers import FFN


@dataclass(frozen=True)
class ExtraQueries:
    """G queries that exist in training only (denoising, further groups); they come after the Q learned ones.

    content, position (B, G, C) · reference (B, G, 3): x, y, z as fractions of the range, inside (0, 1)
    may_attend (Q + G, Q + G) bool: row i may look at column j; every row must be able to look at something
    """

    content: Tensor
    position: Tensor
    reference: Tensor
    may_attend: Tensor


class PackedAttention(nn.Module):
    """Multi-head attention; query, key and value projections in one matrix, as nn.MultiheadAttention has them."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, value: Tensor, may_attend: Tensor | None) -> Tensor:
        """query (B, Q, C) is projected to queries and keys, value (B, Q, C) to values -> (B, Q, C)."""
        batch, _, channels = query.shape
        w, b = self.in_proj_weight, self.in_proj_bias
        q, k = F.linear(query, w[: 2 * channels], b[: 2 * channels]).chunk(2, dim=-1)
        v = F.linear(value, w[2 * channels :], b[2 * channels :])
        q, k, v = (
            x.reshape(batch, -1, self.heads, channels // self.heads).transpose(1, 2) for x in (q, k, v)
        )
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend, dropout_p=dropout)
        return self.out_proj(out.transpose(1, 2).reshape(batch, -1, channels))


class QuerySelfAttention(nn.Module):
    """Self-attention with residual; the position is added to queries and keys, not to values. Key: attn."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attn = PackedAttention(channels, heads, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, content: Tensor, position: Tensor, may_attend: Tensor | None) -> Tensor:
        return content + self.dropout(self.attn(content + position, content, may_attend))


class DecoderLayer(nn.Module):
    """content, position (B, Q, C), reference (B, Q, 2), bev (B, cells, C) -> content (B, Q, C)."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        c = spec.channels
        self.attentions = nn.ModuleList(
            [
                QuerySelfAttention(c, spec.heads, spec.dropout),
                BevCrossAttention(c, spec.heads, spec.decoder_points, spec.dropout),
            ]
        )
        self.ffns = nn.ModuleList([FFN(c, spec.ffn_channels, spec.dropout)])
        self.norms = nn.ModuleList(nn.LayerNorm(c) for _ in range(3))

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        reference: Tensor,
        bev: Tensor,
        size: MapSize,
        may_attend: Tensor | None,
    ) -> Tensor:
        content = self.norms[0](self.attentions[0](content, position, may_attend))
        content = self.norms[1](self.attentions[1](content, position, reference, bev, size))
        return self.norms[2](self.ffns[0](content))


class Decoder(nn.Module):
    """Holds the layers; head.py runs them, because each layer's boxes move the next layer's reference points."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(spec) for _ in range(spec.decoder_layers))
