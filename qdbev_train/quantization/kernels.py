# SPDX-License-Identifier: Apache-2.0
"""Rounding onto a grid with a single step, and its gradients, in one pass over memory each.

On a CPU, op by op, these passes took more than half of a training step's time.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

# Divisions stay divisions and NaN stays NaN; only the order of sums is free.
_FAST = {"reassoc", "contract", "nsz"}
_BLOCK = 4096  # numbers summed in float32 before the sum goes on in float64


def applies_to(x: Tensor, scale: Tensor) -> bool:
    """Whether the kernels can take this tensor: on a CPU, with one step for all of it."""
    return x.device.type == "cpu" and scale.dim() == 0 and x.dtype in (torch.float32, torch.bfloat16)


def fake_quantise(x: Tensor, scale: float, low: float, high: float) -> Tensor:
    """clamp(round(x / scale), low, high) * scale as float32, in the shape of x."""
    out = torch.empty(x.shape, dtype=torch.float32)
    _onto_grid(_numbers(x), np.float32(scale), np.float32(low), np.float32(high), _numbers(out))
    return out


def gradients(x: Tensor, scale: float, low: float, high: float, grad: Tensor) -> tuple[Tensor, float]:
    """(gradient of x: `grad` inside the range, else 0; sum of `grad` times the slope of the step)."""
    out = torch.empty(x.shape, dtype=torch.float32)
    step, lowest, highest = np.float32(scale), np.float32(low), np.float32(high)
    slopes = _gradients(_numbers(x), step, lowest, highest, _numbers(grad), _numbers(out))
    return out.to(grad.dtype), slopes


def _numbers(x: Tensor) -> np.ndarray[Any, Any]:
    """All numbers in a row; a view where x is contiguous float32."""
    return x.detach().float().contiguous().view(-1).numpy()


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _onto_grid(x: Any, scale: Any, low: Any, high: Any, out: Any) -> None:
    for i in range(x.size):
        code = np.rint(x[i] / scale)
        code = low if code < low else code
        out[i] = (high if code > high else code) * scale


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _gradients(x: Any, scale: Any, low: Any, high: Any, grad: Any, out: Any) -> float:
    total = 0.0
    for begin in range(0, x.size, _BLOCK):
        end = begin + _BLOCK
        total += _block(x[begin:end], scale, low, high, grad[begin:end], out[begin:end])
    return total


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _block(x: Any, scale: Any, low: Any, high: Any, grad: Any, out: Any) -> Any:
    """Sums in float32: a block is short, and only such sums are computed several at a time."""
    total = np.float32(0)
    for i in range(x.size):
        ratio = x[i] / scale
        code = np.rint(ratio)
        kept = low if code < low else code
        kept = high if kept > high else kept
        inside = code == kept
        out[i] = grad[i] if inside else np.float32(0)
        total += grad[i] * (code - ratio if inside else kept)
    return total
