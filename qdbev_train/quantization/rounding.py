# SPDX-License-Identifier: Apache-2.0
"""Choosing weight codes by what they do to a layer's output instead of one by one.

The nearest code of every weight is not the best set of codes: with inputs that are alike from pixel to pixel, errors of
neighbouring weights can cancel. For each output channel the codes q are sought that minimise the mean square of the
output's error, (w - s q)' H (w - s q) with H the covariance of the layer's inputs, by going round the
weights one after another (never making it worse) and setting the step s to its best value in between. The mean of the
error is left to bias correction, hence the covariance and not the raw second moment.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qdbev_train.quantization.layers import QuantisedConv2d, QuantisedDeformConv2d, QuantisedLayer

ROUNDS = 3
# Input vectors that a covariance is estimated from: enough of them, and a multiple of their length.
MIN_SAMPLES = 4096
SAMPLES_PER_WEIGHT = 8
PICTURES_AT_ONCE = 6
DAMPING = (
    0.01  # of the mean variance, added to every input: rare inputs must not have their weights forgotten
)


def input_covariance(layer: QuantisedLayer, inputs: tuple[Tensor, ...]) -> Tensor:
    """(G, K, K), damped: covariance of the K numbers that one output channel multiplies by its K weights.

    G groups: 1, or the channels of a depthwise convolution. inputs are those of the layer's forward; a linear's
    quantiser is applied first.
    """
    k = layer.weight[0].numel()
    wanted = max(MIN_SAMPLES, SAMPLES_PER_WEIGHT * k)
    if isinstance(layer, (QuantisedConv2d, QuantisedDeformConv2d)):
        chunks = list(zip(*(x.split(PICTURES_AT_ONCE) for x in inputs), strict=True))
        samples = torch.cat([_thin(_patches(layer, c), -(-wanted // len(chunks))) for c in chunks], dim=1)
    else:
        samples = _thin(layer.input_quantiser(inputs[0]).reshape(1, -1, k), wanted)
    samples = samples - samples.mean(1, keepdim=True)
    covariance = samples.transpose(1, 2) @ samples / samples.shape[1]
    damping = DAMPING * covariance.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    return covariance + damping[:, None, None] * torch.eye(k, device=samples.device)


def _patches(layer: QuantisedConv2d | QuantisedDeformConv2d, inputs: tuple[Tensor, ...]) -> Tensor:
    """(G, samples, K) of a convolution's inputs (B, C, H, W)."""
    if isinstance(layer, QuantisedDeformConv2d):
        columns = (
            layer.columns(*inputs).flatten(3).flatten(1, 2)
        )  # (B, in * 9, pixels), as the weight is ordered
        return columns.transpose(1, 2).reshape(1, -1, columns.shape[1])
    (x,), k = inputs, layer.weight[0].numel()
    columns = F.unfold(x, layer.weight.shape[2:], layer.dilation, layer.padding, layer.stride)
    return columns.reshape(len(x), layer.groups, k, -1).permute(1, 0, 3, 2).reshape(layer.groups, -1, k)


def _thin(vectors: Tensor, wanted: int) -> Tensor:
    """About `wanted` of the samples (G, samples, K), evenly spread."""
    return vectors[:, :: max(1, vectors.shape[1] // wanted)]


@torch.no_grad()
def round_weights(layer: QuantisedLayer, covariance: Tensor) -> None:
    """Replaces the layer's weights by values on the grid with the least output error, and its steps by theirs.

    covariance (G, K, K) as `input_covariance` gives it.
    """
    out = len(layer.weight)
    flat = layer.weight.reshape(out, -1)
    # Every output channel has the inputs of its group: (G, out / G, K).
    weight = flat.reshape(len(covariance), -1, flat.shape[1])
    scale = layer.weight_scale.reshape(len(covariance), -1)
    low, high = layer.weight_low, layer.weight_high
    codes = torch.round(weight / scale[..., None]).clamp(low, high)
    for _ in range(ROUNDS):
        codes = _descend(weight, codes, scale, covariance, low, high)
        scale = _best_scale(weight, codes, scale, covariance)
    codes = _descend(weight, codes, scale, covariance, low, high)
    layer.weight_scale.copy_(scale.reshape(-1))
    layer.weight.copy_((codes.reshape(flat.shape) * scale.reshape(-1, 1)).reshape(layer.weight.shape))


def _descend(
    weight: Tensor, codes: Tensor, scale: Tensor, covariance: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """One turn over all K weights, each moved to its best code while the others stay; shapes as in round_weights."""
    codes = codes.clone()
    pull = (weight - codes * scale[..., None]) @ covariance  # (G, out / G, K): H times the error
    for k in range(weight.shape[-1]):
        curvature = covariance[:, None, k, k]
        best = torch.round(codes[..., k] + pull[..., k] / (curvature * scale)).clamp(low, high)
        change = (best - codes[..., k]) * scale
        codes[..., k] = best
        pull -= change[..., None] * covariance[:, None, k]
    return codes


def _best_scale(weight: Tensor, codes: Tensor, scale: Tensor, covariance: Tensor) -> Tensor:
    """The step of each output channel that fits its codes best: (q' H w) / (q' H q), where that makes sense."""
    projected = codes @ covariance
    best = (projected * weight).sum(-1) / (projected * codes).sum(-1).clamp_min(1e-12)
    return torch.where((best > 0.5 * scale) & (best < 2.0 * scale), best, scale)
