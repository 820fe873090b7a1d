# SPDX-License-Identifier: Apache-2.0
"""What is on which grid, layer by layer, and everything that is not: goes into the manifest of a package."""

from __future__ import annotations

from typing import Any

from torch import nn

from qdbev_train.quantization.config import FLOAT, QuantConfig
from qdbev_train.quantization.layers import (
    ActivationQuantiser,
    QuantisedConv2d,
    QuantisedDeformConv2d,
    QuantisedLayer,
)

_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (QuantisedConv2d, "convolution"),
    (QuantisedDeformConv2d, "deformable convolution"),
    (QuantisedLayer, "linear"),
)


def describe(model: nn.Module, config: QuantConfig) -> dict[str, Any]:
    """Plain data: `layers` on the grid, `exceptions` to the rule with their reasons, `float_parameters` left over."""
    layers, exceptions, covered = [], [], set()
    scales: set[str] = set()  # learned ones are parameters to the optimiser, not to the package
    for name, module in model.named_modules():
        override = config.override(name)
        if isinstance(module, ActivationQuantiser):
            scales.add(f"{name}.scale")
        if isinstance(module, QuantisedLayer):
            layers.append(_layer(name, module))
            covered.update({f"{name}.weight", f"{name}.bias"})
            scales.add(f"{name}.weight_scale")
            if override is not None:
                bits = {"weight_bits": override.weight, "activation_bits": override.activation}
                exceptions.append({"name": name, **bits, "reason": override.reason})
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            reason = override.reason if override is not None else "its part is not quantised"
            exceptions.append(
                {"name": name, "weight_bits": FLOAT, "activation_bits": FLOAT, "reason": reason}
            )
    parameters = {n: p for n, p in model.named_parameters() if n not in scales}
    left = [{"name": n, "shape": list(p.shape)} for n, p in parameters.items() if n not in covered]
    return {
        "weight_bits": config.weight_bits,
        "activation_bits": config.activation_bits,
        "parts": list(config.parts),
        "parameters": sum(p.numel() for p in parameters.values()),
        "layers": layers,
        "exceptions": exceptions,
        "float_parameters": left,
    }


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
