# SPDX-License-Identifier: Apache-2.0
"""Puts the integer grid into a BEVFormer, part by part."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn

from qdbev_train.model.bevformer import BEVFormer
from qdbev_train.model.decoder import PackedAttention
from qdbev_train.quantization.config import FLOAT, QuantConfig
from qdbev_train.quantization.convolutions import output_quantisers, quantise_convolutions
from qdbev_train.quantization.layers import (
    BIAS_STEPS,
    ActivationQuantiser,
    QuantisedLayer,
    QuantisedLinear,
    QuantisedPackedAttention,
)
from qdbev_train.quantization.tables import TableQuantiser, quantise_tables

SMALLEST = 1e-8  # of a learned scale
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
    "pts_bbox_head.transformer.encoder.layers.*.attentions.0.value_proj",
    "pts_bbox_head.transformer.decoder.layers.*.attentions.1.value_proj",
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
        # The encoder's layers call it too, with BEV queries beside a past that is on its grid: its range is the map's.
        encoder.bev_quantiser.listens = False
        encoder.register_forward_hook(_quantise_bev)
    for part in ("encoder", "decoder"):
        if part in config.parts:
            _quantise_linears(model, _LINEARS[part], config)
    quantise_tables(model, config)
    _share_bev_quantiser(model)
    _set_scales(model, config)
    return model


def _quantise_bev(encoder: nn.Module, _: Any, bev: Tensor) -> Tensor:
    """What the decoder sees, and what comes back as the next frame's history, lies on the grid."""
    quantiser = encoder.get_submodule("bev_quantiser")
    assert isinstance(quantiser, ActivationQuantiser)
    quantiser.listen(bev)
    return quantiser(bev)


def _share_bev_quantiser(model: BEVFormer) -> None:
    """One quantiser, and so one scale, wherever the BEV map is read: it is quantised once and not again and again."""
    readers = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantisedLinear) and any(fnmatchcase(name, p) for p in _BEV_READERS):
            readers.append(module)
    if not readers:
        return
    encoder = model.pts_bbox_head.transformer.encoder
    shared = getattr(encoder, "bev_quantiser", readers[0].activation)
    assert isinstance(shared, ActivationQuantiser)
    for reader in readers:
        if reader.activation.bits == shared.bits:  # an override may ask for another grid
            reader.activation = shared
            reader.reads_from(shared)


def _set_scales(model: BEVFormer, config: QuantConfig) -> None:
    """Makes scales behave in training as `config.scales` says."""
    for module in model.modules():
        if (
            isinstance(module, (ActivationQuantiser, QuantisedLayer, TableQuantiser))
            and config.scales == "learned"
        ):
            module.learn_scale()
        elif isinstance(module, ActivationQuantiser) and config.scales == "running":
            module.momentum = config.momentum
        elif isinstance(module, (QuantisedLayer, TableQuantiser)) and config.scales == "running":
            module.follows_weight = True


def freeze_ranges(model: nn.Module) -> None:
    """Lets running ranges of activations stand still from here on; those of weights go on with their weights."""
    for module in model.modules():
        if isinstance(module, ActivationQuantiser):
            module.frozen = True


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


@torch.no_grad()
def settle_scales(model: nn.Module) -> None:
    """After an optimiser's step: learned scales stay above zero, and coarse enough for their biases."""
    for module in model.modules():
        if isinstance(module, (ActivationQuantiser, TableQuantiser)) and isinstance(
            module.scale, nn.Parameter
        ):
            module.scale.clamp_(min=SMALLEST)
    for module in model.modules():
        if isinstance(module, QuantisedLayer) and isinstance(module.weight_scale, nn.Parameter):
            finest = module.bias.abs() / (module.input_quantiser.scale * BIAS_STEPS)
            module.weight_scale.copy_(torch.maximum(module.weight_scale, finest.clamp_min(SMALLEST)))
