# SPDX-License-Identifier: Apache-2.0
"""Choosing weight codes by what they do to a layer's output instead of one by one.

The nearest code of every weight is not the best set of codes: with inputs that are alike from pixel to pixel, errors of
neighbouring weights can cancel. For each output channel the codes q are sought that minimise the mean square of the
output's error, (w - s q)' H (w - s q) with H the covariance of the layer's inputs in calibration, by going round the
weights one after another (never making it worse) and setting the step s to its best value in between. The mean of the
error is left to bias correction, hence the covariance and not the raw second moment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdbev_train.quantization.layers import QuantisedConv2d, QuantisedLayer

ROUNDS = 3
# Input vectors that a covariance is estimated from: enough of them, and a multiple of their length.
MIN_SAMPLES = 4096
SAMPLES_PER_WEIGHT = 8
PICTURES_AT_ONCE = 6
DAMPING = (
    0.01  # of the mean variance, added to every input: rare inputs must not have their weights forgotten
)


class InputMoments:
    """Sums over a layer's input vectors. K weights of one output channel, G groups (1, or the channels if depthwise).

    total (G, K) · outer (G, K, K) · count
    """

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor = torch.zeros(0)
        self.outer: Tensor = torch.zeros(0)

    def add(self, vectors: Tensor) -> None:
        """vectors (G, samples, K)."""
        if self.count == 0:
            groups, _, k = vectors.shape
            self.total = vectors.new_zeros(groups, k)
            self.outer = vectors.new_zeros(groups, k, k)
        self.count += vectors.shape[1]
        self.total += vectors.sum(1)
        self.outer += vectors.transpose(1, 2) @ vectors

    def covariance(self) -> Tensor:
        """(G, K, K), damped."""
        mean = self.total / self.count
        covariance = self.outer / self.count - mean[:, :, None] * mean[:, None, :]
        diagonal = covariance.diagonal(dim1=1, dim2=2)
        damping = DAMPING * diagonal.mean(1).clamp_min(1e-12)
        return covariance + damping[:, None, None] * torch.eye(covariance.shape[1], device=covariance.device)


class MomentHooks:
    """Collects the input moments of all quantised layers of a model while it runs; use `with`."""

    def __init__(self, model: nn.Module) -> None:
        self.moments: dict[QuantisedLayer, InputMoments] = {}
        self._layers = [m for m in model.modules() if isinstance(m, QuantisedLayer)]
        self._handles: list[Any] = []

    def __enter__(self) -> MomentHooks:
        self._handles = [layer.register_forward_pre_hook(self._collect) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _collect(self, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, QuantisedLayer)
        moments = self.moments.setdefault(layer, InputMoments())
        x = arguments[0].detach()
        k = layer.weight[0].numel()
        wanted = max(MIN_SAMPLES, SAMPLES_PER_WEIGHT * k)
        if not isinstance(layer, QuantisedConv2d):
            moments.add(_thin(x.reshape(1, -1, k), wanted))
            return
        chunks = x.split(PICTURES_AT_ONCE)
        for chunk in chunks:
            columns = F.unfold(chunk, layer.weight.shape[2:], layer.dilation, layer.padding, layer.stride)
            columns = columns.reshape(len(chunk), layer.groups, k, -1)
            vectors = columns.permute(1, 0, 3, 2).reshape(layer.groups, -1, k)
            moments.add(_thin(vectors, -(-wanted // len(chunks))))


def _thin(vectors: Tensor, wanted: int) -> Tensor:
    """About `wanted` of the samples (G, samples, K), evenly spread."""
    return vectors[:, :: max(1, vectors.shape[1] // wanted)]


@torch.no_grad()
def round_weights(layer: QuantisedLayer, moments: InputMoments) -> None:
    """Replaces the layer's weights by values on the grid with the least output error, and its steps by theirs."""
    out = len(layer.weight)
    flat = layer.weight.reshape(out, -1)
    covariance = moments.covariance()
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
