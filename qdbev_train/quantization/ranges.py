# SPDX-License-Identifier: Apache-2.0
"""Choosing scales: a growing histogram for activations, and range searches for activations and weights."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BINS = 2048
# The largest weight would lie half-way between its channel's last code and one that there isn't, be cut off and get no
# gradient; this much wider, it lies inside.
INSIDE = 1 + 1e-5


class Histogram:
    """Counts |x| over any number of tensors; the range doubles when a larger value comes, so one pass is enough.

    Also remembers whether a negative value was ever seen, and the largest magnitude.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.float64] = np.zeros(BINS)
        self.width = 0.0  # of one bin
        self.peak = 0.0
        self.negative = False

    def add(self, x: Tensor) -> None:
        """Takes in a float tensor of any shape; values that aren't finite are an error."""
        magnitude = x.detach().abs().float()
        peak = float(magnitude.max())
        if not np.isfinite(peak):
            raise ValueError("an activation is not finite during calibration")
        self.negative = self.negative or bool((x < 0).any())
        self.peak = max(self.peak, peak)
        if peak == 0.0 and self.width == 0.0:
            return
        if self.width == 0.0:
            self.width = peak / BINS
        while peak > self.width * BINS * (1 + 1e-6):
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.concatenate([merged, np.zeros(BINS // 2)])
            self.width *= 2
        counts = torch.histc(magnitude, BINS, 0.0, self.width * BINS)
        self.counts += counts.double().cpu().numpy()

    def percentile(self, percent: float) -> float:
        """The magnitude below which `percent` of all values lie."""
        cumulative = np.cumsum(self.counts)
        index = int(np.searchsorted(cumulative, cumulative[-1] * percent / 100.0))
        return min((index + 1) * self.width, self.peak)

    def mse_scale(self, high: int, limit: float) -> float:
        """The step that loses least in the mean square, codes 0..high for magnitudes, largest value at most `limit`."""
        centers = (np.arange(BINS) + 0.5) * self.width
        used = self.counts > 0
        centers, counts = centers[used], self.counts[used]
        candidates = min(self.peak, limit) * np.linspace(0.1, 1.0, 61) / high
        steps = candidates[:, None]
        error = np.clip(np.rint(centers / steps), 0, high) * steps - centers
        return float(candidates[np.argmin((error**2 * counts).sum(1))])


def symmetric_step(peak: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The paper's step 2 |r|max / (2^bits - 1) for codes around zero, |r|max / (2^bits - 1) for codes from zero up."""
    return torch.where(low < 0, 2.0 * peak, peak) / (high - low)


def activation_scale(
    histogram: Histogram, codes: tuple[int, int], method: str, percentile: float, limit: float
) -> float:
    """Step of one activation tensor with codes low..high.

    "minmax" and "percentile" are the paper's symmetric range of the largest magnitude, or of a percentile of the
    magnitudes; "mse" searches. `limit` is a bound known beforehand (6 after ReLU6), or infinity.
    """
    low, high = codes
    if histogram.peak == 0.0:
        return 1.0 / high  # a tensor of zeros: any step will do
    if method == "mse":
        return histogram.mse_scale(high, limit)
    peak = histogram.percentile(percentile) if method == "percentile" else histogram.peak
    return min(peak, limit) * (2 if low < 0 else 1) / (high - low)


def weight_scales(weight: Tensor, bits: int, method: str) -> Tensor:
    """(out,) steps of a weight (out, ...).

    "minmax" is the paper's symmetric range 2 |w|max / (2^bits - 1); "mse" searches the step that loses least in the
    mean square, channel by channel.
    """
    flat = weight.detach().reshape(len(weight), -1)
    largest = flat.abs().amax(1).clamp_min(1e-12)
    widest = 2 * largest / (2**bits - 1)
    if method == "minmax":
        return widest * INSIDE
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    best = widest.clone()
    least = torch.full_like(widest, torch.inf)
    for fraction in torch.linspace(0.4, 1.15, 76, device=flat.device):
        step = widest * fraction
        codes = torch.round(flat / step[:, None]).clamp(low, high)
        error = (codes * step[:, None] - flat).square().sum(1)
        better = error < least
        best = torch.where(better, step, best)
        least = torch.where(better, error, least)
    return best
