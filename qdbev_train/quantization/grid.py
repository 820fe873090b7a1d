# SPDX-License-Identifier: Apache-2.0
"""The integer grid: what a code is, how a float becomes one, and how gradients pass through.

Zero-point 0 everywhere. Weights: `bits` per output channel, symmetric, codes [-2^(b-1), 2^(b-1) - 1]. Activations:
`bits` per tensor, [0, 2^b - 1] where the tensor is never negative, else [-2^(b-1), 2^(b-1) - 1]. Biases: int32 codes at
the product of the input's and the weights' scale. Rounding is to the nearest, ties to even, as in ONNX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qdbev_train.quantization import kernels

# float32 holds every integer up to here, so that a bias code is the same number in torch and in ONNX.
BIAS_LIMIT = 2**24


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """Lowest and highest code of `bits` bits."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


class _FakeQuantise(torch.autograd.Function):
    """Rounds onto the grid and back; exported as one node `qdbev::FakeQuantise` that the packing pass replaces."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        # In float32 whatever comes in: half precision has no room for a code and its remainder.
        ctx.learned, ctx.fused = ctx.needs_input_grad[1], kernels.applies_to(x, scale)
        if ctx.fused:
            ctx.save_for_backward(x)
            # As numbers: a running scale moves on before the gradients come.
            ctx.grid = (scale.item(), low.item(), high.item())
            return kernels.fake_quantise(x, *ctx.grid)
        codes = torch.round(x.float() / scale)
        if ctx.learned:
            ctx.save_for_backward(x, scale, low, high)
        else:
            ctx.save_for_backward((codes >= low) & (codes <= high))
        return codes.clamp(low, high) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        # Straight through inside the range, nothing where the value was cut off.
        if ctx.fused:
            (x,) = ctx.saved_tensors
            step, lowest, highest = ctx.grid
            passed, pull = kernels.gradients(x, step, lowest, highest, grad)
            learned = torch.tensor(pull * _step_factor(x, highest)) if ctx.learned else None
            return passed, learned, None, None
        if not ctx.learned:
            (inside,) = ctx.saved_tensors
            return grad * inside, None, None, None
        # Computed again, because x is often kept anyway (by the ReLU that made it) and what follows from it isn't.
        x, scale, low, high = ctx.saved_tensors
        ratio = x.float() / scale
        codes = torch.round(ratio)
        inside = (codes >= low) & (codes <= high)
        slope = torch.where(inside, codes - ratio, codes.clamp(low, high))
        pulls = (grad * slope).sum_to_size(scale.shape) * _step_factor(x, high)
        return grad * inside, pulls, None, None

    @staticmethod
    def symbolic(g: Any, x: Any, scale: Any, low: Any, high: Any) -> Any:
        return g.op("qdbev::FakeQuantise", x, scale, low, high).setType(x.type())


def _step_factor(x: Tensor, high: Any) -> Any:
    """Esser et al. 2020: without it a step, which all of a tensor pulls at, would outrun the weights.

    A tensor where `high` is one, so that no device has to be waited for.
    """
    return (high * x[0].numel()) ** -0.5


def fake_quantise(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x on the grid: clamp(round(x / scale), low, high) * scale.

    scale broadcasts against x: a scalar for activations, (out, 1, ...) for weights, (out,) for biases. low and high are
    scalar tensors. The gradient with respect to x is 1 inside the range and 0 outside. A scale that is learned gets
    LSQ's: (code - x / scale) inside, the code outside, summed over what it scales and times 1 / sqrt(n * high), n being
    the numbers in one element of x's first axis (a weight's output channel, a picture, a map).
    """
    return _FakeQuantise.apply(x, scale, low, high)


def per_channel(scale: Tensor, weight: Tensor) -> Tensor:
    """(out,) scales shaped to broadcast against a weight (out, ...)."""
    return scale.reshape(-1, *[1] * (weight.dim() - 1))
