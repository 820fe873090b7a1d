# SPDX-License-Identifier: Apache-2.0
"""The quantiser's arithmetic: codes never leave their bits, gradients are right, folding is exact, brevitas agrees."""

from __future__ import annotations

import copy

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qdbev_ros.core.errors import ConfigError
from qdbev_train.export.graph import export_master
from qdbev_train.model import BEVFormer
from qdbev_train.model.layers import conv_bn, frozen_batchnorm
from qdbev_train.quantization import (
    PARTS,
    STRICT,
    QuantConfig,
    freeze_ranges,
    post_training_quantise,
    quantise_model,
    settle_scales,
)
from qdbev_train.quantization.calibrate import run_batch
from qdbev_train.quantization.grid import code_range, fake_quantise, per_channel
from qdbev_train.quantization.layers import (
    ActivationQuantiser,
    QuantisedConv2d,
    QuantisedLayer,
    QuantisedLinear,
)
from qdbev_train.quantization.ranges import Histogram, activation_scale, weight_scales
from qdbev_train.quantization.report import describe
from tests.quantisation_samples import frames, small_model, small_variant

RUNNING = QuantConfig(weight_range="minmax", activation_range="minmax", scales="running")
LEARNED = QuantConfig(scales="learned")


def bounds(bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    low, high = code_range(bits, signed)
    return torch.tensor(float(low)), torch.tensor(float(high))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20),
    st.floats(2.0**-10, 2.0**10, width=32),
    st.sampled_from([4, 6]),
    st.booleans(),
)
def test_codes_never_leave_their_bits(values: list[float], step: float, bits: int, signed: bool) -> None:
    low, high = bounds(bits, signed)
    scale = torch.tensor(step)
    codes = fake_quantise(torch.tensor(values), scale, low, high) / scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    codes = codes.round()
    assert codes.min() >= low
    assert codes.max() <= high


@pytest.mark.parametrize("signed", [True, False])
def test_over_whole_steps_the_gradient_is_that_of_finite_differences(signed: bool) -> None:
    """Moved by whole steps a value keeps its rounding error: the difference is the straight-through gradient."""
    low, high = bounds(6, signed)
    scale = torch.tensor(0.25)
    x = torch.linspace(-12.0, 20.0, 640) + 0.013
    x.requires_grad_()
    fake_quantise(x, scale, low, high).sum().backward()
    with torch.no_grad():
        up, down = (fake_quantise(x + sign * scale, scale, low, high) for sign in (1, -1))
    slope = (up - down) / (2 * scale)
    code = x.detach() / scale
    inner = (code > low + 1) & (code < high - 1)
    outer = (code < low - 1.5) | (code > high + 1.5)
    assert inner.sum() > 100
    assert outer.sum() > 100
    torch.testing.assert_close(x.grad[inner], slope[inner], rtol=0, atol=1e-5)
    assert torch.equal(x.grad[outer], slope[outer])
    assert (slope[outer] == 0).all()


def test_a_learned_step_has_the_gradient_of_finite_differences_away_from_rounding_points() -> None:
    """With each value's rounding error held, as straight-through rounding has it, the step's slope is LSQ's."""
    low, high = (b.double() for b in bounds(4, signed=True))
    x = torch.linspace(-9.0, 9.0, 37, dtype=torch.float64) + 0.01
    codes = torch.round(x / 0.7)
    x = x[(codes != low) & (codes != high)]  # on the edge of the range there are two slopes
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(x), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # A first axis of one element, so that the factor is 1 / sqrt(n * 7).
    (fake_quantise(x[None], scale, low, high) * weights).sum().backward()
    residual = torch.round(x / 0.7) - x / 0.7

    def held(step: float) -> Tensor:
        codes = (x / step + residual).clamp(low, high)
        return (codes * step * weights).sum()

    slope = (held(0.7 + 1e-6) - held(0.7 - 1e-6)) / 2e-6
    assert float(scale.grad) == pytest.approx(float(slope) / (len(x) * 7) ** 0.5, rel=1e-4)


def test_a_cut_off_value_moves_a_learned_step_by_its_code() -> None:
    """Beyond the range the function itself is linear in the step: plain finite differences."""
    low, high = bounds(6, signed=False)
    scale = torch.tensor(0.5, requires_grad=True)
    fake_quantise(torch.full((1, 4), 1000.0), scale, low, high).sum().backward()
    with torch.no_grad():
        x = torch.full((1, 4), 1000.0)
        slope = (
            fake_quantise(x, scale + 0.01, low, high) - fake_quantise(x, scale - 0.01, low, high)
        ).sum() / 0.02
    assert float(scale.grad) * (4 * 63) ** 0.5 == pytest.approx(float(slope), rel=1e-4)
    assert float(slope) == pytest.approx(4 * 63, rel=1e-4)


def test_steps_of_channels_learn_apart_and_a_bias_does_not_move_them() -> None:
    linear = calibrated_linear()
    linear.learn_scale()
    linear.activation.learn_scale()
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(4))
    linear(x)[..., 0].sum().backward()
    assert linear.weight_scale.grad[0] != 0
    assert (linear.weight_scale.grad[1:] == 0).all()
    assert linear.activation.scale.grad != 0
    linear.zero_grad()
    linear.parameters_on_grid()[1].sum().backward()
    assert linear.weight_scale.grad is None
    assert (linear.bias.grad == 1).all()


def calibrated_linear() -> QuantisedLinear:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(5, 8, generator=generator), torch.randn(5, generator=generator)
    linear = QuantisedLinear(weight.requires_grad_(), bias, 4, 6)
    linear.activation.scale.fill_(0.13)
    linear.fit_scale("mse")
    return linear


def test_the_gradient_of_a_layer_is_that_of_finite_differences_over_whole_steps() -> None:
    """Weights moved by whole steps, through layer and loss; the loss is linear, so that differences are exact."""
    linear = calibrated_linear()
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    pick = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    (linear(x) * pick).sum().backward()
    for out, into in ((0, 0), (2, 5), (4, 7)):
        code = float(linear.weight[out, into].detach() / linear.weight_scale[out])
        if not -7 < code < 6:
            continue
        values = []
        for sign in (1, -1):
            moved = copy.deepcopy(linear)
            with torch.no_grad():
                moved.weight[out, into] += sign * linear.weight_scale[out]
                values.append((moved(x) * pick).sum())
        slope = (values[0] - values[1]) / (2 * linear.weight_scale[out])
        assert float(linear.weight.grad[out, into]) == pytest.approx(float(slope), rel=1e-3, abs=1e-4)


def test_ranges_are_the_papers() -> None:
    """S = 2 |r|max / (2^k - 1); where values are never negative the same number of codes covers half the width."""
    histogram = Histogram()
    histogram.add(torch.tensor([-3.0, 2.0]))
    assert activation_scale(histogram, (-32, 31), "minmax", 99.9, float("inf")) == pytest.approx(6 / 63)
    assert activation_scale(histogram, (0, 63), "minmax", 99.9, float("inf")) == pytest.approx(3 / 63)
    assert activation_scale(histogram, (0, 63), "minmax", 99.9, 2.5) == pytest.approx(2.5 / 63)
    weight = torch.tensor([[1.0, -2.0], [0.5, 0.25]])
    torch.testing.assert_close(
        weight_scales(weight, 4, "minmax"), torch.tensor([4 / 15, 1 / 15]), rtol=2e-5, atol=0
    )


@given(st.lists(st.floats(-8, 8, width=32).filter(lambda w: abs(w) > 1e-3), min_size=1, max_size=9))
def test_the_weight_that_sets_a_min_max_range_is_not_cut_off(weights: list[float]) -> None:
    """It lies half-way to a code that there isn't; cut off it would get no gradient and could never shrink."""
    weight = torch.tensor([weights], requires_grad=True)
    scale = per_channel(weight_scales(weight, 4, "minmax"), weight)
    fake_quantise(weight, scale, torch.tensor(-8.0), torch.tensor(7.0)).sum().backward()
    assert weight.grad is not None
    assert bool((weight.grad == 1).all())


def test_a_running_range_follows_in_training_only_and_stands_still_when_frozen() -> None:
    quantiser = ActivationQuantiser(6)
    quantiser.scale.fill_(1.0)
    quantiser.momentum = 0.9
    x = torch.tensor([-6.3, 2.0])
    quantiser.eval()(x)
    assert float(quantiser.scale) == 1.0
    quantiser.train()(x)
    assert float(quantiser.scale) == pytest.approx(0.9 * 1.0 + 0.1 * 2 * 6.3 / 63)
    freeze_ranges(quantiser)
    quantiser(100 * x)
    assert float(quantiser.scale) == pytest.approx(0.92)


def test_running_steps_of_weights_are_those_of_the_weights_at_hand() -> None:
    linear = calibrated_linear().train()
    linear.follows_weight = True
    with torch.no_grad():
        linear.weight.mul_(3.0)
    linear(torch.zeros(1, 8))
    torch.testing.assert_close(linear.weight_scale, weight_scales(linear.weight, 4, "minmax"))


@pytest.mark.parametrize("config", [RUNNING, LEARNED, QuantConfig()], ids=["running", "learned", "fixed"])
def test_after_training_steps_codes_are_still_inside_their_bits_and_the_bev_map_has_one_scale(
    config: QuantConfig,
) -> None:
    model = small_model()
    student = post_training_quantise(model, frames(model, 2), config)
    before = {n: t.clone() for n, t in student.state_dict().items()}
    student.train()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-2)
    for batch in frames(student, 3):
        out = run_batch(student, batch, None)
        loss = out.class_logits.square().mean() + 0.01 * out.boxes.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    after = student.state_dict()
    assert before.keys() == after.keys()
    moved = [n for n in after if n.endswith(("scale",)) and not torch.equal(after[n], before[n])]
    assert bool(moved) == (config.scales != "fixed")
    check_codes(student.eval(), frames(student, 1)[0])
    transformer = student.pts_bbox_head.transformer
    readers = [layer.attentions[0].value_proj.activation for layer in transformer.encoder.layers]
    readers += [layer.attentions[1].value_proj.activation for layer in transformer.decoder.layers]
    assert all(reader is transformer.encoder.bev_quantiser for reader in readers)
    # The state fits a model of any way of training: an engine cannot tell.
    plain = quantise_model(small_model(seed=3), QuantConfig()).eval()
    plain.load_state_dict(after)
    with torch.no_grad():
        wanted = run_batch(student, frames(student, 1)[0], None)
        assert torch.equal(run_batch(plain, frames(student, 1)[0], None).boxes, wanted.boxes)


@torch.no_grad()
def check_codes(student: nn.Module, batch: object) -> None:
    def check(quantiser: ActivationQuantiser, _: object, out: Tensor) -> None:
        codes = out / quantiser.scale
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        low, high = code_range(quantiser.bits, signed=bool(quantiser.low < 0))
        assert codes.round().min() >= low
        assert codes.round().max() <= high

    handles = [
        m.register_forward_hook(check) for m in student.modules() if isinstance(m, ActivationQuantiser)
    ]
    run_batch(student, batch, None)
    for handle in handles:
        handle.remove()
    for module in student.modules():
        if isinstance(module, QuantisedLayer):
            codes = (module.parameters_on_grid()[0].flatten(1) / module.weight_scale[:, None]).round()
            low, high = code_range(module.bits, signed=True)
            assert codes.min() >= low
            assert codes.max() <= high


def test_a_student_with_learned_steps_exports_like_any_other() -> None:
    model = small_model()
    student = post_training_quantise(model, frames(model, 2), LEARNED)
    graph = onnx.load_from_string(export_master(student, small_variant())).graph
    assert sum(t.data_type == onnx.TensorProto.INT4 for t in graph.initializer) > 40
    assert all(n.op_type != "FakeQuantise" for n in graph.node)
    ours, theirs = (
        describe(student, LEARNED),
        describe(quantise_model(small_model(), QuantConfig()), QuantConfig()),
    )
    assert ours["parameters"] == theirs["parameters"]
    assert ours["float_parameters"] == theirs["float_parameters"]


def test_learned_steps_stay_above_zero_and_coarse_enough_for_their_bias() -> None:
    """An optimiser moves a tiny step of a dead channel below zero at once; its bias must still fit its integers."""
    linear = calibrated_linear()
    linear.learn_scale()
    linear.activation.learn_scale()
    with torch.no_grad():
        linear.weight_scale[1:3] = torch.tensor([-1e-3, 1e-12])
        linear.bias[2] = 5.0
        kept = linear.weight_scale[0].clone()
    settle_scales(linear)
    assert (linear.weight_scale > 0).all()
    assert linear.weight_scale[0] == kept
    assert float(linear.parameters_on_grid()[1][2].detach()) == pytest.approx(5.0, abs=1e-4)
    with torch.no_grad():
        linear.activation.scale.fill_(-0.1)
    settle_scales(linear)
    assert linear.activation.scale > 0


def test_running_ranges_that_are_not_min_max_are_refused() -> None:
    with pytest.raises(ConfigError, match="min-max"):
        QuantConfig(scales="running")
    with pytest.raises(ConfigError, match="scales 'moving'"):
        QuantConfig(scales="moving")


# --- folding -------------------------------------------------------------------------------------------------------
def test_folding_is_exact() -> None:
    """What a float convolution with its BatchNorm computes is, to the bit, what the folded one computes."""
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), frozen_batchnorm(6)
    bn.running_mean.copy_(torch.randn(6))
    bn.running_var.copy_(torch.rand(6) + 0.1)
    part = nn.Sequential(conv, bn)
    pictures = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        wanted = conv_bn(pictures, conv, bn)
        layer = quantised_pair(part)
        layer.active = False
        assert torch.equal(layer(pictures), wanted)


def quantised_pair(part: nn.Sequential) -> QuantisedConv2d:
    from qdbev_train.quantization.convolutions import _replace_convolutions

    _replace_convolutions(part, "part", QuantConfig())
    assert isinstance(part[0], QuantisedConv2d)
    assert isinstance(part[1], nn.Identity)
    return part[0]


# --- parts and exceptions ------------------------------------------------------------------------------------------
HOMES = {
    "img_backbone.": "backbone",
    "img_neck.": "neck",
    "pts_bbox_head.transformer.encoder.": "encoder",
    "pts_bbox_head.transformer.can_bus_mlp.": "encoder",
    "pts_bbox_head.transformer.decoder.": "decoder",
    "pts_bbox_head.cls_branches.": "decoder",
    "pts_bbox_head.reg_branches.": "decoder",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_single_part_can_be_quantised_alone(part: str) -> None:
    """As for a table of sensitivities."""
    model = small_model()
    config = QuantConfig(parts=(part,), weight_rounding="nearest")
    student = post_training_quantise(model, frames(model, 1), config)
    layers = [n for n, m in student.named_modules() if isinstance(m, QuantisedLayer)]
    assert {HOMES[next(h for h in HOMES if n.startswith(h))] for n in layers} == {part}
    with torch.no_grad():
        assert torch.isfinite(run_batch(student, frames(student, 1)[0], None).boxes).all()


def test_strict_leaves_nothing_out_but_what_engines_compute_once() -> None:
    config = QuantConfig(overrides=STRICT)
    student = quantise_model(small_model(), config)
    left = [n for n, m in student.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert left == ["pts_bbox_head.transformer.reference_points"]
    layers = [m for m in student.modules() if isinstance(m, QuantisedLayer)]
    assert {(m.bits, m.input_quantiser.bits) for m in layers} == {(4, 6)}
    assert any(e["name"] == left[0] for e in describe_uncalibrated(student, config))


def describe_uncalibrated(student: BEVFormer, config: QuantConfig) -> list[dict[str, object]]:
    return describe(student, config)["exceptions"]
