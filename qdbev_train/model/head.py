# SPDX-License-Identifier: Apache-2.0
"""From image features to BEV map to boxes: BEVFormer's transformer with its learned queries and output branches.

The nesting of modules follows the keys of released checkpoints (pts_bbox_head.transformer. ...). Dimension letters
are those of bevformer.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qdbev_ros.core.ego_motion import CAN_BUS_SIZE
from qdbev_ros.core.variant import CAMERAS, MAX_LEVELS, Variant
from qdbev_train.model.attention import History, Views
from qdbev_train.model.decoder import Decoder, ExtraQueries
from qdbev_train.model.encoder import Encoder, cell_centres
from qdbev_train.model.layers import full_precision

CODE_SIZE = 10
PRIOR = 0.01  # score that every query starts with


class PositionalEncoding(nn.Module):
    """Learned position of each BEV cell: column embedding, then row embedding. Returns (cells, C)."""

    def __init__(self, height: int, width: int, channels: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(height, channels // 2)
        self.col_embed = nn.Embedding(width, channels // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self) -> Tensor:
        rows, columns = self.row_embed.weight, self.col_embed.weight
        shape = (len(rows), len(columns), -1)
        return torch.cat([columns[None].expand(shape), rows[:, None].expand(shape)], dim=-1).flatten(0, 1)


class Transformer(nn.Module):
    """Encoder, decoder and the embeddings that belong to both."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        spec, c = variant.transformer, variant.transformer.channels
        self.level_embeds = nn.Parameter(torch.randn(MAX_LEVELS, c))
        self.cams_embeds = nn.Parameter(torch.randn(len(CAMERAS), c))
        self.encoder = Encoder(spec, variant.backbone.neck_levels)
        self.decoder = Decoder(spec)
        self.reference_points = nn.Linear(c, 3)
        self.can_bus_mlp = nn.Sequential(
            nn.Linear(CAN_BUS_SIZE, c // 2), nn.ReLU(), nn.Linear(c // 2, c), nn.ReLU()
        )
        self.can_bus_mlp.add_module("norm", nn.LayerNorm(c))
        for module in (*self.can_bus_mlp, self.reference_points):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)


def _class_branch(channels: int, classes: int) -> nn.Sequential:
    hidden: list[nn.Module] = []
    for _ in range(2):
        hidden += [nn.Linear(channels, channels), nn.LayerNorm(channels), nn.ReLU()]
    last = nn.Linear(channels, classes)
    nn.init.constant_(last.bias, -math.log((1 - PRIOR) / PRIOR))
    return nn.Sequential(*hidden, last)


def _box_branch(channels: int) -> nn.Sequential:
    hidden: list[nn.Module] = []
    for _ in range(2):
        hidden += [nn.Linear(channels, channels), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(channels, CODE_SIZE))


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) with both kept at least eps."""
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class Head(nn.Module):
    """`encode`: image features -> BEV map. `decode`: BEV map -> class logits and boxes of every decoder layer."""

    cell_centres: Tensor
    range_min: Tensor
    range_size: Tensor

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        bev, spec = variant.bev, variant.transformer
        self.size = (bev.height, bev.width)
        self.transformer = Transformer(variant)
        self.positional_encoding = PositionalEncoding(bev.height, bev.width, spec.channels)
        self.bev_embedding = nn.Embedding(bev.cells, spec.channels)
        self.query_embedding = nn.Embedding(spec.queries, 2 * spec.channels)
        self.cls_branches = nn.ModuleList(
            _class_branch(spec.channels, len(variant.classes)) for _ in range(spec.decoder_layers)
        )
        self.reg_branches = nn.ModuleList(_box_branch(spec.channels) for _ in range(spec.decoder_layers))
        # Weights of the ten box numbers in the loss; part of released checkpoints, never trained.
        weights = torch.tensor([1.0] * 8 + [0.2] * 2)
        self.code_weights = nn.Parameter(weights, requires_grad=False)
        low, high = torch.tensor(bev.pc_range[:3]), torch.tensor(bev.pc_range[3:])
        self.register_buffer("cell_centres", cell_centres(bev.height, bev.width), persistent=False)
        self.register_buffer("range_min", low, persistent=False)
        self.register_buffer("range_size", high - low, persistent=False)

    def tokens(self, features: list[Tensor]) -> Tensor:
        """[(B, N, C, h_l, w_l)] -> (B * N, S, C) image tokens with camera and level embeddings."""
        levels = []
        for level, feature in enumerate(features):
            embedding = self.transformer.cams_embeds + self.transformer.level_embeds[level]  # (N, C)
            levels.append(feature.flatten(3).transpose(2, 3) + embedding[:, None])
        return torch.cat(levels, dim=2).flatten(0, 1)

    def encode(
        self,
        features: list[Tensor],
        points: Tensor,
        cells: Tensor,
        slots: Tensor,
        weights: Tensor,
        can_bus: Tensor,
        prev_bev: Tensor,
        shift: Tensor,
        use_prev: Tensor,
    ) -> Tensor:
        """(B, cells, C) BEV map; the arguments are those of `BEVFormer.forward_tensors`."""
        batch, n_cells = slots.shape[:2]
        query = self.bev_embedding.weight + self.transformer.can_bus_mlp(can_bus)[:, None]
        position = self.positional_encoding()[None].expand_as(query)
        element = torch.arange(batch, device=cells.device)[:, None]
        rows_per_element = cells.shape[1] * cells.shape[2] + 1
        views = Views(
            tokens=self.tokens(features),
            sizes=[(f.shape[-2], f.shape[-1]) for f in features],
            points=points.flatten(0, 1),
            rows=(cells.flatten(1) + element * (n_cells + 1)).flatten(),
            slots=(slots.flatten(1) + element * rows_per_element).flatten(),
            weights=weights,
        )
        use = use_prev[:, None, None] > 0.5
        centres = self.cell_centres[None].expand(batch, -1, -1)
        shifted = centres + torch.where(use, shift[:, None], torch.zeros_like(shift[:, None]))
        history = History(prev_bev, query, use, torch.stack([shifted, centres], dim=1))
        return self.transformer.encoder(query, position, history, views, self.size)

    def decode(self, bev: Tensor, extra: ExtraQueries | None) -> tuple[Tensor, Tensor]:
        """class logits (L, B, Q, 10) and boxes (L, B, Q, 10) in metres; Q + G queries where there are extra ones."""
        position, content = self.query_embedding.weight[None].expand(bev.shape[0], -1, -1).chunk(2, dim=-1)
        with full_precision(bev.device):
            reference = self.transformer.reference_points(position).sigmoid()  # (B, Q, 3)
        if extra is not None:
            content = torch.cat([content, extra.content], dim=1)
            position = torch.cat([position, extra.position], dim=1)
            reference = torch.cat([reference, extra.reference], dim=1)
        may_attend = None if extra is None else extra.may_attend
        logits, boxes = [], []
        branches = zip(self.transformer.decoder.layers, self.cls_branches, self.reg_branches, strict=True)
        for layer, cls_branch, reg_branch in branches:
            content = layer(content, position, reference[..., :2], bev, self.size, may_attend)
            with full_precision(bev.device):
                code = reg_branch(content.float())
            # The boxes of a layer are read from the reference that entered it; the moved one goes to the next layer.
            centre = torch.cat([code[..., 0:2], code[..., 4:5]], dim=-1) + inverse_sigmoid(reference)
            centre = centre.sigmoid()
            metres = centre * self.range_size + self.range_min
            boxes.append(torch.cat([metres[..., :2], code[..., 2:4], metres[..., 2:], code[..., 5:]], dim=-1))
            logits.append(cls_branch(content).float())
            reference = centre.detach()
        return torch.stack(logits), torch.stack(boxes)
