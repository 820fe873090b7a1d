# SPDX-License-Identifier: Apache-2.0
"""Embeddings on the grid: tables that are added and never multiplied, one step for each row.

The quantiser is a parametrisation of the table (torch.nn.utils.parametrize): whoever reads `bev_embedding.weight` gets
rows on the grid, the optimiser moves the float table behind it, `bev_embedding.parametrizations.weight.original`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qdbev_train.quantization.config import FLOAT, Override, QuantConfig
from qdbev_train.quantization.grid import code_range, fake_quantise, per_channel
from qdbev_train.quantization.layers import to_parameter
from qdbev_train.quantization.ranges import weight_scales

# Module and tensor, by the part that reads it.
TABLES = {
    "encoder": (
        ("pts_bbox_head.bev_embedding", "weight"),
        ("pts_bbox_head.positional_encoding.row_embed", "weight"),
        ("pts_bbox_head.positional_encoding.col_embed", "weight"),
        ("pts_bbox_head.transformer", "cams_embeds"),
        ("pts_bbox_head.transformer", "level_embeds"),
    ),
    "decoder": (("pts_bbox_head.query_embedding", "weight"),),
}


class TableQuantiser(nn.Module):
    """The grid of a table (rows, C). State: `scale` (rows,), NaN until calibrated, `low`, `high`."""

    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, rows: int, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.active = True
        self.follows_weight = False
        low, high = code_range(bits, signed=True)
        self.register_buffer("scale", torch.full((rows,), float("nan")))
        self.register_buffer("low", torch.tensor(float(low)))
        self.register_buffer("high", torch.tensor(float(high)))

    def forward(self, table: Tensor) -> Tensor:
        """(rows, C) as trained -> (rows, C) on the grid."""
        if not self.active:
            return table
        if self.follows_weight and self.training:
            self.fit_scale(table, "minmax")
        return fake_quantise(table, per_channel(self.scale, table), self.low, self.high)

    @torch.no_grad()
    def fit_scale(self, table: Tensor, method: str) -> None:
        """Sets the step of every row by the range of its numbers."""
        self.scale.copy_(weight_scales(table, self.bits, method))

    def learn_scale(self) -> None:
        """Makes the steps parameters, under their name."""
        to_parameter(self, "scale")


@dataclass(frozen=True)
class Table:
    """A table of a model. name: as overrides match it · values (rows, C) as trained · quantiser None: float."""

    name: str
    part: str
    parameter: str
    values: Tensor
    quantiser: TableQuantiser | None


def tables(model: nn.Module) -> list[Table]:
    """Every table of a model, float or on the grid."""
    found = []
    for part, places in TABLES.items():
        for path, key in places:
            module, name = model.get_submodule(path), _name(path, key)
            if not parametrize.is_parametrized(module, key):
                found.append(Table(name, part, f"{path}.{key}", getattr(module, key), None))
                continue
            held = module.get_submodule(f"parametrizations.{key}")
            quantiser = held.get_submodule("0")
            assert isinstance(quantiser, TableQuantiser)
            original = held.get_parameter("original")
            parameter = f"{path}.parametrizations.{key}.original"
            found.append(Table(name, part, parameter, original, quantiser))
    return found


def quantise_tables(model: nn.Module, config: QuantConfig) -> None:
    """Puts the tables of `config.parts` on the grid, in place; those that are there already stay as they are."""
    for part in config.parts:
        for path, key in TABLES.get(part, ()):
            module, (bits, _) = model.get_submodule(path), config.bits(_name(path, key))
            if bits != FLOAT and not parametrize.is_parametrized(module, key):
                quantiser = TableQuantiser(len(getattr(module, key)), bits)
                parametrize.register_parametrization(module, key, quantiser)


def float_tables(config: QuantConfig, tensors: Collection[str]) -> QuantConfig:
    """The configuration of a student whose checkpoint holds `tensors`: older ones have embeddings in float."""
    places = [(path, key) for part in config.parts for path, key in TABLES.get(part, ())]
    old = [_name(path, key) for path, key in places if f"{path}.{key}" in tensors]
    known = [name for name in old if config.bits(name)[0] != FLOAT]
    more = tuple(Override(name, FLOAT, FLOAT, "trained before embeddings were on the grid") for name in known)
    return replace(config, overrides=(*more, *config.overrides))


def _name(path: str, key: str) -> str:
    return path if key == "weight" else f"{path}.{key}"
