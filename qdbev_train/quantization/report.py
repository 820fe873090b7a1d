# SPDX-License-Identifier: Apache-2.0
"""What is on which grid, layer by layer, and everything that is not: goes into the manifest of a package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qdbev_ros.core.variant import Variant
from qdbev_train.model import BEVFormer, build_model
from qdbev_train.quantization.config import FLOAT, QuantConfig
from qdbev_train.quantization.layers import (
    QuantisedConv2d,
    QuantisedDeformConv2d,
    QuantisedLayer,
)
from qdbev_train.quantization.tables import Table, tables

_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (QuantisedConv2d, "convolution"),
    (QuantisedDeformConv2d, "deformable convolution"),
    (QuantisedLayer, "linear"),
)


def describe(model: BEVFormer, config: QuantConfig) -> dict[str, Any]:
    """Plain data: `layers` on the grid, `exceptions` to the rule with their reasons, `float_parameters` left over.

    `left_out` is what only training needs. `float32_bytes`: tensors of the float model's checkpoint, all of them.
    """
    left_out = [f"pts_bbox_head.cls_branches.{i}" for i in range(len(model.pts_bbox_head.cls_branches) - 1)]
    left_out.append("pts_bbox_head.code_weights")
    kept = {n: m for n, m in model.named_modules() if not _within(n, left_out)}
    layers = [_layer(n, m) for n, m in kept.items() if isinstance(m, QuantisedLayer)]
    on_grid = [t for t in tables(model) if t.quantiser is not None]
    covered = {f"{layer['name']}.{key}" for layer in layers for key in ("weight", "bias")}
    covered |= {table.parameter for table in on_grid}
    # Learned steps are parameters to the optimiser, not to the package.
    parameters = {
        n: p
        for n, p in model.named_parameters()
        if not n.endswith((".scale", ".weight_scale")) and not _within(n, left_out)
    }
    left = [{"name": n, "shape": list(p.shape)} for n, p in parameters.items() if n not in covered]
    return {
        "weight_bits": config.weight_bits,
        "activation_bits": config.activation_bits,
        "parts": list(config.parts),
        "parameters": sum(p.numel() for p in parameters.values()),
        "float32_bytes": _float32_bytes(model.variant),
        "layers": layers + [_table(t) for t in on_grid],
        "exceptions": _exceptions(kept, model, config),
        "float_parameters": left,
        "left_out": left_out,
    }


def _within(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in prefixes)


def _exceptions(
    modules: Mapping[str, nn.Module], model: BEVFormer, config: QuantConfig
) -> list[dict[str, Any]]:
    """Every layer and table whose bits differ from the rule, with the reason."""
    layers = {n: m for n, m in modules.items() if isinstance(m, (QuantisedLayer, nn.Linear, nn.Conv2d))}
    on_grid = {n: isinstance(m, QuantisedLayer) for n, m in layers.items()}
    on_grid |= {t.name: t.quantiser is not None for t in tables(model)}
    exceptions = []
    for name, quantised in on_grid.items():
        override = config.override(name)
        if quantised and override is None:
            continue
        weight, activation = config.bits(name) if quantised else (FLOAT, FLOAT)
        exceptions.append(
            {
                "name": name,
                "weight_bits": weight,
                "activation_bits": activation if name in layers else None,
                "reason": override.reason if override is not None else "its part is not quantised",
            }
        )
    return exceptions


def _float32_bytes(variant: Variant) -> int:
    with torch.device("meta"):
        return sum(t.numel() * t.element_size() for t in build_model(variant).state_dict().values())


def _layer(name: str, layer: QuantisedLayer) -> dict[str, Any]:
    source = layer.input_quantiser
    return {
        "name": name,
        "kind": next(kind for cls, kind in _KINDS if isinstance(layer, cls)),
        "shape": list(layer.weight.shape),
        "weight_bits": layer.bits,
        "activation_bits": source.bits,
        "activation_codes": [int(source.low), int(source.high)],
        "activation_scale": float(source.scale.detach()),
    }


def _table(table: Table) -> dict[str, Any]:
    assert table.quantiser is not None
    return {
        "name": table.name,
        "kind": "embedding",
        "shape": list(table.values.shape),
        "weight_bits": table.quantiser.bits,
        "activation_bits": None,
        "activation_codes": None,
        "activation_scale": None,
    }
