# SPDX-License-Identifier: Apache-2.0
"""Puts the integer grid into a BEVFormer, part by part."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, fx, nn

from qdbev_train.model.bevformer import BEVFormer
from qdbev_train.model.decoder import PackedAttention
from qdbev_train.quantization.config import FLOAT, QuantConfig
from qdbev_train.quantization.convolutions import output_quantisers, quantise_convolutions
from qdbev_train.quantization.layers import ActivationQuantiser, QuantisedLinear, QuantisedPackedAttention

# Where the linears of a part are. The branches belong to the decoder, the can_bus network to the encoder.
_LINEARS = {
    "encoder": ("pts_bbox_head.transformer.encoder.*", "pts_bbox_head.transformer.can_bus_mlp.*"),
    "decoder": (
        "pts_bbox_head.transformer.decoder.*",
        "pts_bbox_head.transformer.reference_points",
        "pts_bbox_head.cls_branches.*",
        "pts_bbox_head.reg_branches.*",
    ),
}
_BEV_READERS = (
    "pts_bbox_head.transformer.encoder.bev_quantiser",
    "pts_bbox_head.transformer.encoder.layers.*.attentions.0.value_proj.activation",
    "pts_bbox_head.transformer.decoder.layers.*.attentions.1.value_proj.activation",
)


def quantise_model(model: BEVFormer, config: QuantConfig) -> BEVFormer:
    """Swaps the layers of `config.parts` for fake-quantised ones, in place; scales are NaN until calibrated or loaded.

    Parts that are quantised already stay as they are, so that progressive training adds one after another.
    """
    if "backbone" in config.parts and not isinstance(model.img_backbone, fx.GraphModule):
        backbone = quantise_convolutions(model.img_backbone, "img_backbone", config, None, None)
        model.img_backbone = backbone  # type: ignore[assignment]
    if "neck" in config.parts and not isinstance(model.img_neck, fx.GraphModule):
        maps = len(model.img_neck.lateral_convs)
        grid = (
            output_quantisers(model.img_backbone) if isinstance(model.img_backbone, fx.GraphModule) else None
        )
        neck = quantise_convolutions(model.img_neck, "img_neck", config, maps, grid)
        model.img_neck = neck  # type: ignore[assignment]
    encoder = model.pts_bbox_head.transformer.encoder
    if "encoder" in config.parts and not hasattr(encoder, "bev_quantiser"):
        encoder.bev_quantiser = ActivationQuantiser(config.activation_bits)
        encoder.register_forward_hook(_quantise_bev)
    for part in ("encoder", "decoder"):
        if part in config.parts:
            _quantise_linears(model, _LINEARS[part], config)
    return model


def _quantise_bev(encoder: nn.Module, _: Any, bev: Tensor) -> Tensor:
    """What the decoder sees, and what comes back as the next frame's history, lies on the grid."""
    return encoder.get_submodule("bev_quantiser")(bev)


def _quantise_linears(model: nn.Module, patterns: tuple[str, ...], config: QuantConfig) -> None:
    for name, module in list(model.named_modules()):
        if not any(fnmatchcase(name, p) for p in patterns) or FLOAT in config.bits(name):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        key = name.rpartition(".")[2]
        if isinstance(module, PackedAttention):
            replaced = QuantisedPackedAttention(module, *config.bits(name))
            setattr(parent, key, replaced)
        elif isinstance(module, nn.Linear):
            linear = QuantisedLinear(module.weight, module.bias, *config.bits(name))
            setattr(parent, key, linear)


def bev_quantisers(model: nn.Module) -> list[ActivationQuantiser]:
    """All quantisers that see the BEV map; calibration gives them one common scale."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, ActivationQuantiser) and any(fnmatchcase(name, p) for p in _BEV_READERS)
    ]
