# SPDX-License-Identifier: Apache-2.0
"""brevitas, which other people wrote and use, gives the same integer codes and the same gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from qdbev_train.quantization.grid import code_range, fake_quantise
from qdbev_train.quantization.layers import ActivationQuantiser, QuantisedConv2d, QuantisedLinear

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    brevitas = pytest.importorskip("brevitas.nn", reason="brevitas is not installed")
    from brevitas.core.function_wrapper import Identity
    from brevitas.core.quant import IntQuant
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Int32Bias
    from brevitas.quant import Uint8ActPerTensorFloat as UnsignedActivation

INPUT_STEP = 0.11


class Weight4(Int8WeightPerChannelFloat):
    """Four bits per output channel; the step is brevitas's own."""

    bit_width = 4


class Signed6(Int8ActPerTensorFloat):
    """Six bits per tensor, codes -32 to 31, at a given step."""

    bit_width = 6
    scaling_impl_type = "const"
    scaling_init = INPUT_STEP * 32


class Unsigned6(UnsignedActivation):
    """Six bits per tensor, codes 0 to 63, at a given step."""

    bit_width = 6
    scaling_impl_type = "const"
    scaling_init = INPUT_STEP * 63


@pytest.mark.parametrize(("bits", "signed"), [(4, True), (6, True), (6, False), (8, True)])
def test_codes_and_gradients_are_those_of_brevitas(bits: int, signed: bool) -> None:
    oracle = IntQuant(narrow_range=False, signed=signed, input_view_impl=Identity())
    low, high = (torch.tensor(float(b)) for b in code_range(bits, signed))
    # Ties included: both round them to even.
    x = torch.cat(
        [torch.linspace(-30, 60, 901), torch.randn(500, generator=torch.Generator().manual_seed(0))]
    )
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    scale, zero, width = torch.tensor(0.25), torch.tensor(0.0), torch.tensor(float(bits))
    values = fake_quantise(ours, scale, low, high)
    codes = oracle.to_int(scale, zero, width, theirs)
    assert torch.equal(values / scale, codes)
    pick = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (values * pick).sum().backward()
    (oracle(scale, zero, width, theirs) * pick).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


def theirs_on(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(input codes, weight codes, bias codes, output) of a brevitas layer, which is in eval mode."""
    with torch.no_grad():
        quantised, weight = layer.input_quant(x), layer.quant_weight()
        bias = layer.bias_quant(layer.bias, quantised, weight)
        return quantised.int(), weight.int(), bias.int(), layer(x)


@pytest.mark.parametrize("signed", [True, False])
def test_a_linear_has_the_codes_of_brevitas(signed: bool) -> None:
    torch.manual_seed(0)
    oracle = brevitas.QuantLinear(
        24,
        10,
        bias=True,
        weight_quant=Weight4,
        input_quant=Signed6 if signed else Unsigned6,
        bias_quant=Int32Bias,
    ).eval()
    ours = QuantisedLinear(oracle.weight, oracle.bias, 4, 6)
    ours.activation.scale.fill_(INPUT_STEP)
    ours.activation.set_sign(signed)
    ours.weight_scale.copy_(oracle.quant_weight().scale.flatten())
    x = 3 * torch.randn(40, 24)
    inputs, weights, biases, out = theirs_on(oracle, x)
    with torch.no_grad():
        weight, bias = ours.parameters_on_grid()
        assert torch.equal((ours.activation(x) / ours.activation.scale).round().int(), inputs.int())
        assert torch.equal((weight / ours.weight_scale[:, None]).round().int(), weights.int())
        assert torch.equal((bias / (INPUT_STEP * ours.weight_scale)).round().int(), biases.int())
        torch.testing.assert_close(ours(x), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 6])
def test_a_convolution_has_the_codes_of_brevitas(groups: int) -> None:
    torch.manual_seed(1)
    settings = {"kernel_size": 3, "stride": 2, "padding": 1, "groups": groups}
    oracle = brevitas.QuantConv2d(
        6, 12, bias=True, weight_quant=Weight4, input_quant=Unsigned6, bias_quant=Int32Bias, **settings
    ).eval()
    ours = QuantisedConv2d(nn.Conv2d(6, 12, **settings), oracle.weight, oracle.bias, 4)
    source = ActivationQuantiser(6, non_negative=True)
    source.scale.fill_(INPUT_STEP)
    ours.reads_from(source)
    ours.weight_scale.copy_(oracle.quant_weight().scale.flatten())
    x = 3 * torch.rand(2, 6, 9, 11)
    inputs, weights, biases, out = theirs_on(oracle, x)
    with torch.no_grad():
        on_grid = source(x)
        weight, bias = ours.parameters_on_grid()
        assert torch.equal((on_grid / source.scale).round().int(), inputs.int())
        assert torch.equal((weight / ours.weight_scale[:, None, None, None]).round().int(), weights.int())
        assert torch.equal((bias / (INPUT_STEP * ours.weight_scale)).round().int(), biases.int())
        torch.testing.assert_close(ours(on_grid), out, rtol=1e-5, atol=1e-5)
