# SPDX-License-Identifier: Apache-2.0
"""What a network costs: bit operations of a frame, bytes of its package."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdbev_ros.core.variant import CAMERAS, Variant
from qdbev_train.export.package import export_package
from qdbev_train.model import BEVFormer, build_model
from qdbev_train.quantization import QuantConfig, quantise_model
from qdbev_train.quantization.calibrate import in_float
from qdbev_train.quantization.layers import QuantisedLayer
from qdbev_train.quantization.report import describe

FLOAT_BITS = 32


def bit_operations(model: BEVFormer, config: QuantConfig | None, products: dict[str, int]) -> float:
    """Products of a frame x weight bits x activation bits, over all convolutions and linears (BOPs).

    products: what `layer_products` counted. Left out: sampling, softmax, LayerNorm, sums, and the products of
    attention weights with values, which are float in every form; and branches that only training needs.
    """
    report = describe(model, config or QuantConfig(parts=(), overrides=()))
    layers = {layer["name"]: layer for layer in report["layers"]}
    total = 0
    for name, count in products.items():
        if name.startswith(tuple(f"{branch}." for branch in report["left_out"])):
            continue
        layer = layers.get(name)
        total += count * (layer["weight_bits"] * layer["activation_bits"] if layer else FLOAT_BITS**2)
    return float(total)


def layer_products(variant: Variant, lidar2img: Tensor) -> dict[str, int]:
    """Multiplications of a frame by layer, under the names that layers have in a quantised model.

    lidar2img (6, 4, 4): how many cells each camera's cross-attention works on depends on the rig.
    """
    model = quantise_model(build_model(variant), QuantConfig()).eval()
    counts: dict[str, int] = {}

    def add(name: str, module: nn.Module, _: Any, output: Tensor) -> None:
        assert isinstance(module.weight, Tensor)
        counts[name] = counts.get(name, 0) + output.numel() * module.weight[0].numel()

    for name, module in model.named_modules():
        if isinstance(module, (QuantisedLayer, nn.Linear, nn.Conv2d)):
            hook: Callable[..., None] = partial(add, name)
            module.register_forward_hook(hook)
    image = variant.image
    pictures = torch.zeros(1, len(CAMERAS), 3, image.padded_height, image.padded_width)
    with torch.inference_mode(), in_float(model.modules()):
        model(pictures, lidar2img[None], torch.zeros(1, 18), None)
    return counts


def package_bytes(model: BEVFormer, config: QuantConfig | None, variant: Variant) -> int:
    """Size of the `.qdbev` file that the model makes."""
    with tempfile.TemporaryDirectory(prefix="qdbev-") as folder:
        path = Path(folder) / "model.qdbev"
        export_package(model, variant, config, path, {}, {})
        return path.stat().st_size
