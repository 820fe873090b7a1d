# SPDX-License-Identifier: Apache-2.0
"""The fused rounding kernels against the same arithmetic in torch, op by op."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qdbev_train.quantization import kernels
from qdbev_train.quantization.grid import code_range, fake_quantise


@given(
    values=hnp.arrays(np.float32, st.integers(1, 9000), elements=st.floats(-100, 100, width=32)),
    scale=st.floats(0.015625, 8.0, width=32),
    signed=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_the_fused_kernels_give_what_torch_gives_op_by_op(
    values: np.ndarray, scale: float, signed: bool
) -> None:
    low, high = (torch.tensor(float(code)) for code in code_range(6, signed))
    results = []
    for fused in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "applies_to", lambda *_, fused=fused: fused)
            x = torch.from_numpy(values.copy()).requires_grad_()
            step = torch.tensor(scale, requires_grad=True)
            out = fake_quantise(x, step, low, high)
            out.backward(torch.linspace(-1, 1, len(values)))
        results.append((out.detach(), x.grad, step.grad))
    (out, grad, slope), (wanted_out, wanted_grad, wanted_slope) = results
    assert torch.equal(out, wanted_out)
    assert torch.equal(grad, wanted_grad)
    torch.testing.assert_close(slope, wanted_slope, rtol=1e-3, atol=1e-3)


def test_the_fused_kernels_keep_nan_and_take_half_precision_and_strided_tensors() -> None:
    low, high = torch.tensor(-32.0), torch.tensor(31.0)
    forgotten = fake_quantise(torch.ones(5), torch.tensor(float("nan")), low, high)
    assert forgotten.isnan().all()
    x = torch.randn(6, 4, 3, 5).permute(0, 2, 3, 1)
    assert kernels.applies_to(x, torch.tensor(0.1))
    wanted = torch.round(x / 0.1).clamp(-32, 31) * 0.1
    torch.testing.assert_close(fake_quantise(x, torch.tensor(0.1), low, high), wanted)
    half = x.bfloat16().requires_grad_()
    out = fake_quantise(half, torch.tensor(0.1), low, high)
    out.sum().backward()
    assert out.dtype == torch.float32
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
