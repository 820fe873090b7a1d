# SPDX-License-Identifier: Apache-2.0
"""Deformable attention modules against literal loops over cells, cameras, heads, levels and points."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qdbev_ros.core.projection import MIN_DEPTH, pillar_points
from qdbev_train.model.attention import (
    BevCrossAttention,
    History,
    SpatialCrossAttention,
    Views,
    deformable_attention,
)
from qdbev_train.model.encoder import cell_centres
from tests.model_samples import rig, sample_fraction, small_model, small_variant, unsettle

H, W, C, HEADS = 6, 5, 16, 2
D = C // HEADS
CELLS = H * W


def planes(value: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """(S, C) -> per head the (D, H, W) map."""
    return [value[:, h * D : (h + 1) * D].T.reshape(D, *size) for h in range(HEADS)]


def literal_temporal_attention(
    module: torch.nn.Module, bev: Tensor, position: Tensor, maps: list[Tensor], references: list[Tensor]
) -> Tensor:
    """One frame: bev, position (cells, C), maps and references of the queue (previous, current)."""
    query = torch.cat([maps[0], bev + position], dim=-1)
    offsets = module.sampling_offsets(query).reshape(CELLS, HEADS, 2, 3, 2)
    weights = module.attention_weights(query).reshape(CELLS, HEADS, 2, 3).softmax(-1)
    result = torch.zeros(CELLS, C)
    for entry in range(2):
        heads = planes(module.value_proj(maps[entry]), (H, W))
        for cell in range(CELLS):
            for h in range(HEADS):
                for p in range(3):
                    x, y = references[entry][cell] + offsets[cell, h, entry, p] / torch.tensor([W, H])
                    sample = sample_fraction(heads[h], float(x), float(y))
                    result[cell, h * D : (h + 1) * D] += weights[cell, h, entry, p] * sample / 2
    return bev + module.output_proj(result)


@torch.no_grad()
def test_temporal_attention_per_element_with_and_without_history() -> None:
    module = small_model().pts_bbox_head.transformer.encoder.layers[0].attentions[0]
    torch.manual_seed(3)
    bev, position, previous, initial = torch.randn(4, 2, CELLS, C)
    centres = cell_centres(H, W)
    shifted = centres + torch.tensor([0.13, -0.21])
    history = History(
        previous,
        initial,
        torch.tensor([True, False])[:, None, None],
        torch.stack([torch.stack([shifted, centres]), torch.stack([centres, centres])]),
    )
    out = module(bev, position, history, (H, W))
    with_history = literal_temporal_attention(
        module, bev[0], position[0], [previous[0], initial[0]], [shifted, centres]
    )
    without = literal_temporal_attention(module, bev[1], position[1], [bev[1], bev[1]], [centres, centres])
    torch.testing.assert_close(out[0], with_history, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[1], without, atol=1e-5, rtol=1e-5)


def dense_projection(lidar2img: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """uv (6, cells, P, 2) in fractions of the picture and visibility (6, cells, P), point by point."""
    variant = small_variant()
    anchors = pillar_points(variant.bev)
    uv = np.zeros((6, CELLS, 2, 2))
    visible = np.zeros((6, CELLS, 2), bool)
    for n in range(6):
        for cell in range(CELLS):
            for p in range(2):
                u, v, depth, _ = lidar2img[n].double().numpy() @ np.array([*anchors[cell, p], 1.0])
                point = np.array([u, v]) / max(depth, MIN_DEPTH)
                point = point / np.array([variant.image.padded_width, variant.image.padded_height])
                uv[n, cell, p] = point
                visible[n, cell, p] = depth > MIN_DEPTH and (point > 0).all() and (point < 1).all()
    return uv, visible


def literal_spatial_attention(
    module: SpatialCrossAttention,
    bev: Tensor,
    tokens: Tensor,
    sizes: list[tuple[int, int]],
    lidar2img: Tensor,
) -> Tensor:
    """All cells times all cameras, masked and averaged: bev (cells, C), tokens (6, S, C)."""
    uv, visible = dense_projection(lidar2img)
    inner = module.deformable_attention
    offsets = inner.sampling_offsets(bev).reshape(CELLS, HEADS, 2, 4, 2)
    weights = inner.attention_weights(bev).reshape(CELLS, HEADS, 8).softmax(-1).reshape(CELLS, HEADS, 2, 4)
    result = torch.zeros(CELLS, C)
    for n in range(6):
        levels = inner.value_proj(tokens[n]).split([h * w for h, w in sizes])
        maps = [planes(value, size) for value, size in zip(levels, sizes)]
        for cell in np.flatnonzero(visible[n].any(-1)):
            share = 1 / visible[:, cell].any(-1).sum()
            for h in range(HEADS):
                for level, (height, width) in enumerate(sizes):
                    for p in range(4):
                        dx, dy = offsets[cell, h, level, p] / torch.tensor([width, height])
                        u, v = uv[n, cell, p % 2]  # the pillar point is the faster index
                        sample = sample_fraction(maps[level][h], float(u + dx), float(v + dy))
                        result[cell, h * D : (h + 1) * D] += share * weights[cell, h, level, p] * sample
    return bev + module.output_proj(result)


@torch.no_grad()
def test_spatial_attention_on_visible_cells_equals_the_dense_masked_computation() -> None:
    model = small_model()
    module = model.pts_bbox_head.transformer.encoder.layers[0].attentions[1]
    rigs = torch.stack([rig(model.variant), rig(model.variant, turn_degrees=20.0)])
    rigs[1, 2] = 0.0  # an absent camera
    torch.manual_seed(3)
    sizes = [(4, 8), (2, 4)]
    bev, tokens = torch.randn(2, CELLS, C), torch.randn(2, 6, 40, C)
    tables = model.camera_tables(rigs)
    element = torch.arange(2)[:, None]
    rows = tables.cells.flatten(1) + element * (CELLS + 1)
    slots = tables.slots.flatten(1) + element * (tables.cells[0].numel() + 1)
    views = Views(
        tokens.flatten(0, 1),
        sizes,
        tables.points.flatten(0, 1),
        rows.flatten(),
        slots.flatten(),
        tables.weights,
    )
    out = module(bev, views)
    for b in range(2):
        expected = literal_spatial_attention(module, bev[b], tokens[b], sizes, rigs[b])
        torch.testing.assert_close(out[b], expected, atol=1e-4, rtol=1e-4)
    seen = tables.mask.any(1)
    assert seen.any()
    assert not seen.all()  # so the bias-only rule for unseen cells was part of the comparison


@torch.no_grad()
def test_bev_cross_attention_equals_a_literal_loop() -> None:
    torch.manual_seed(0)
    module = BevCrossAttention(C, HEADS, 3, 0.0).eval()
    unsettle(module)
    content, position = torch.randn(2, 1, 4, C)
    reference, bev = torch.rand(1, 4, 2), torch.randn(1, CELLS, C)
    query = content + position
    offsets = module.sampling_offsets(query).reshape(4, HEADS, 3, 2)
    weights = module.attention_weights(query).reshape(4, HEADS, 3).softmax(-1)
    heads = planes(module.value_proj(bev[0]), (H, W))
    result = torch.zeros(4, C)
    for q in range(4):
        for h in range(HEADS):
            for p in range(3):
                x, y = reference[0, q] + offsets[q, h, p] / torch.tensor([W, H])
                sample = sample_fraction(heads[h], float(x), float(y))
                result[q, h * D : (h + 1) * D] += weights[q, h, p] * sample
    expected = content[0] + module.output_proj(result)
    torch.testing.assert_close(
        module(content, position, reference, bev, (H, W))[0], expected, atol=1e-5, rtol=1e-5
    )


def test_fresh_offsets_look_in_compass_directions_one_to_p_pixels_away() -> None:
    module = BevCrossAttention(32, 8, 4, 0.0)
    star = module.sampling_offsets.bias.reshape(8, 4, 2)
    torch.testing.assert_close(star[0, :, 0], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(star[1, 1], torch.tensor([2.0, 2.0]))  # 45 degrees, on the square of side 2
    torch.testing.assert_close(star[2, 3], torch.tensor([0.0, 4.0]), atol=1e-5, rtol=0)
    assert not module.sampling_offsets.weight.any()
    assert not module.attention_weights.weight.any()


def test_samples_are_taken_in_float32_even_of_half_precision_maps() -> None:
    torch.manual_seed(0)
    value, locations = torch.randn(1, 40 * 50, 2, 4), torch.rand(1, 9, 2, 1, 3, 2)
    weights = torch.rand(1, 9, 2, 1, 3)
    half = deformable_attention(value.half(), [(40, 50)], locations, weights)
    assert half.dtype == torch.float32
    exact = deformable_attention(value.half().float(), [(40, 50)], locations, weights)
    torch.testing.assert_close(half, exact)
