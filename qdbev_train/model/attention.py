# SPDX-License-Identifier: Apache-2.0
"""Deformable attention: the one sampling function, and the three modules built on it.

Dimension letters are those of bevformer.py; D = C / heads, S = sum of h_l * w_l over the feature levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MapSize = tuple[int, int]  # height, width


def deformable_attention(value: Tensor, sizes: list[MapSize], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples; zeros outside the maps.

    value (B, S, heads, D): the levels' maps one after the other, each row-major, of `sizes` (height, width)
    locations (B, Q, heads, levels, P, 2): (x, y), 0..1 over the map · weights (B, Q, heads, levels, P)
    Returns (B, Q, heads * D). All inputs to the sampling are FP32: half precision moves the samples.
    """
    if torch.onnx.is_in_onnx_export():
        # Plain numbers: the tracer's own would make the maps' sizes part of the graph.
        shape = (
            len(value),
            value.shape[2],
            value.shape[3],
            locations.shape[-2],
            *(side for size in sizes for side in size),
        )
        return _MarkedSampling.apply(value, locations, weights, tuple(int(n) for n in shape))
    return grid_samples(value, sizes, locations, weights)


class _MarkedSampling(torch.autograd.Function):
    """The same, exported as one node `qdbev::DeformableSampling` that every engine replaces by its own form.

    shape: B, heads, D, P, then height and width of every level.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        sizes = list(zip(shape[4::2], shape[5::2], strict=True))
        return grid_samples(value, sizes, locations, weights)

    @staticmethod
    def symbolic(g: Any, value: Any, locations: Any, weights: Any, shape: tuple[int, ...]) -> Any:
        batch, heads, depth, points, *sizes = shape
        named = {"heads_i": heads, "depth_i": depth, "points_i": points, "sizes_i": sizes}
        sampled = g.op("qdbev::DeformableSampling", value, locations, weights, **named)
        return sampled.setType(value.type().with_sizes([batch, None, heads * depth]))


def grid_samples(value: Tensor, sizes: list[MapSize], locations: Tensor, weights: Tensor) -> Tensor:
    """`deformable_attention` by one grid_sample for every level."""
    batch, _, heads, depth = value.shape
    points = locations.shape[-2]
    grids = 2.0 * locations.float() - 1.0
    weights = weights.float()
    flat_maps = value.float().split([height * width for height, width in sizes], dim=1)
    parts = []
    for level, (flat, (height, width)) in enumerate(zip(flat_maps, sizes, strict=True)):
        maps = flat.permute(0, 2, 3, 1).reshape(batch * heads, depth, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).reshape(batch * heads, -1, points, 2)
        weight = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, -1, points)
        samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        parts.append((samples * weight).sum(-1))  # (B * heads, D, Q)
    return sum(parts[1:], parts[0]).reshape(batch, heads * depth, -1).transpose(1, 2)


def init_deformable(module: nn.Module, heads: int, points: int) -> None:
    """Offsets start as a star: head k looks in compass direction k, point i at distance i + 1; weights uniform."""
    offsets, weights = module.get_submodule("sampling_offsets"), module.get_submodule("attention_weights")
    assert isinstance(offsets, nn.Linear)
    assert isinstance(weights, nn.Linear)
    angle = torch.arange(heads, dtype=torch.float32) * (2.0 * math.pi / heads)
    direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    # Feature levels, or the two maps of the temporal queue.
    maps = offsets.out_features // (heads * points * 2)
    star = direction[:, None, None] * torch.arange(1, points + 1)[:, None]
    with torch.no_grad():
        offsets.bias.copy_(star.expand(heads, maps, points, 2).reshape(-1))
        for tensor in (offsets.weight, weights.weight, weights.bias):
            tensor.zero_()
    for name, linear in module.named_children():
        if name in ("value_proj", "output_proj") and isinstance(linear, nn.Linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)


def pixel_scale(sizes: list[MapSize], like: Tensor) -> Tensor:
    """(levels, 2): (width, height) of each map; offsets in pixels divided by it are fractions of the map."""
    # Plain numbers, so that they are constants of an exported graph.
    numbers = [[int(width), int(height)] for height, width in sizes]
    return torch.tensor(numbers, dtype=torch.float32, device=like.device)


@dataclass(frozen=True)
class History:
    """What temporal self-attention sees of the past; the same in every layer of a frame.

    previous (B, cells, C): the previous frame's BEV, turned into this frame's axes; anything where there is none
    initial (B, cells, C): this frame's BEV queries before the first layer. The reference does not update them.
    use (B, 1, 1) bool: the element has a history
    references (B, 2, cells, 2): cell centres, 0..1; those of the previous map shifted by the ego's motion
    """

    previous: Tensor
    initial: Tensor
    use: Tensor
    references: Tensor


class TemporalSelfAttention(nn.Module):
    """BEV cells look at the previous and at the current BEV: bev, position (B, cells, C) -> (B, cells, C).

    Without history both maps are the layer's own input, before the position is added.
    """

    def __init__(self, channels: int, heads: int, points: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(2 * channels, heads * 2 * points * 2)
        self.attention_weights = nn.Linear(2 * channels, heads * 2 * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)
        init_deformable(self, heads, points)

    def forward(self, bev: Tensor, position: Tensor, history: History, size: MapSize) -> Tensor:
        batch, cells, channels = bev.shape
        previous = torch.where(history.use, history.previous, bev)
        current = torch.where(history.use, history.initial, bev)
        query = torch.cat([previous, bev + position], dim=-1)
        offsets = self.sampling_offsets(query).reshape(batch, cells, self.heads, 2, self.points, 2)
        weights = self.attention_weights(query).reshape(batch, cells, self.heads, 2, self.points).softmax(-1)
        # The two maps go through the sampling as batch elements: (B, 2, ...) -> (B * 2, ...).
        value = self.value_proj(torch.stack([previous, current], dim=1))
        value = value.reshape(batch * 2, cells, self.heads, channels // self.heads)
        offsets = offsets.float().permute(0, 3, 1, 2, 4, 5) / pixel_scale([size], bev)
        locations = history.references[:, :, :, None, None] + offsets
        locations = locations.reshape(batch * 2, cells, self.heads, 1, self.points, 2)
        weights = weights.permute(0, 3, 1, 2, 4).reshape(batch * 2, cells, self.heads, 1, self.points)
        sampled = deformable_attention(value, [size], locations, weights)
        fused = sampled.reshape(batch, 2, cells, channels).mean(1)
        return bev + self.dropout(self.output_proj(fused))


@dataclass(frozen=True)
class Views:
    """The cameras as spatial cross-attention sees them; the same in every layer of a frame.

    tokens (B * N, S, C) image tokens · sizes of the levels · points (B * N, M, P, 2) projected pillar points, 0..1
    rows (B * N * M,): row of the (B * (cells + 1)) list of BEV queries that each camera's cell reads; the last row of
    each batch element is zeros · slots (B * cells * K,): row of the (B * (N * M + 1)) list of camera results that each
    cell reads; the last of each element is zeros · weights (B, cells, K): 1 / cameras that see the cell, or 0
    """

    tokens: Tensor
    sizes: list[MapSize]
    points: Tensor
    rows: Tensor
    slots: Tensor
    weights: Tensor


class CameraDeformableAttention(nn.Module):
    """Cells look into one camera at the pixels of their pillar: (B * N, M, C) queries -> (B * N, M, C).

    Of the `points` samples per head and level, sample i belongs to pillar point i mod P.
    """

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        init_deformable(self, heads, points)

    def forward(self, query: Tensor, views: Views) -> Tensor:
        batch, _, channels = query.shape
        heads, levels, points = self.heads, self.levels, self.points
        pillar = views.points.shape[-2]
        offsets = self.sampling_offsets(query).float().reshape(batch, -1, heads, levels, points, 2)
        offsets = offsets / pixel_scale(views.sizes, query)[:, None]
        offsets = offsets.reshape(batch, -1, heads, levels, points // pillar, pillar, 2)
        locations = views.points[:, :, None, None, None] + offsets
        locations = locations.reshape(batch, -1, heads, levels, points, 2)
        weights = self.attention_weights(query).reshape(batch, -1, heads, levels * points).softmax(-1)
        weights = weights.reshape(batch, -1, heads, levels, points)
        value = self.value_proj(views.tokens).reshape(batch, -1, heads, channels // heads)
        return deformable_attention(value, views.sizes, locations, weights)


class SpatialCrossAttention(nn.Module):
    """BEV cells look into the cameras that see them: (B, cells, C) -> (B, cells, C).

    Only visible cells are computed, and everything is a gather: a camera gathers its cells, then a cell gathers and
    averages its cameras' results. Cells that no camera sees get the bias of `output_proj` alone.
    """

    def __init__(self, channels: int, heads: int, levels: int, points: int, dropout: float) -> None:
        super().__init__()
        self.deformable_attention = CameraDeformableAttention(channels, heads, levels, points)
        self.output_proj = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.output_proj.weight)
        nn.init.zeros_(self.output_proj.bias)

    def forward(self, bev: Tensor, views: Views) -> Tensor:
        batch, cells, channels = bev.shape
        padded = F.pad(bev, (0, 0, 0, 1)).reshape(-1, channels)
        query = padded.index_select(0, views.rows).reshape(views.tokens.shape[0], -1, channels)
        seen = self.deformable_attention(query, views).reshape(batch, -1, channels)  # (B, N * M, C)
        seen = F.pad(seen, (0, 0, 0, 1)).reshape(-1, channels)
        gathered = seen.index_select(0, views.slots).reshape(batch, cells, -1, channels)  # (B, cells, K, C)
        fused = (gathered * views.weights[..., None]).sum(2)
        return bev + self.dropout(self.output_proj(fused))


class BevCrossAttention(nn.Module):
    """Object queries look at the BEV map: query, position (B, Q, C), reference (B, Q, 2) in 0..1 -> (B, Q, C)."""

    def __init__(self, channels: int, heads: int, points: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(channels, heads * points * 2)
        self.attention_weights = nn.Linear(channels, heads * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)
        init_deformable(self, heads, points)

    def forward(
        self, content: Tensor, position: Tensor, reference: Tensor, bev: Tensor, size: MapSize
    ) -> Tensor:
        batch, cells, channels = bev.shape
        query = content + position
        offsets = self.sampling_offsets(query).float().reshape(batch, -1, self.heads, 1, self.points, 2)
        locations = reference[:, :, None, None, None] + offsets / pixel_scale([size], bev)
        weights = self.attention_weights(query).reshape(batch, -1, self.heads, 1, self.points).softmax(-1)
        value = self.value_proj(bev).reshape(batch, cells, self.heads, channels // self.heads)
        sampled = deformable_attention(value, [size], locations, weights)
        return content + self.dropout(self.output_proj(sampled))
