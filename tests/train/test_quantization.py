# SPDX-License-Identifier: Apache-2.0
"""The integer grid in training: codes stay in their bits, gradients go straight through, folding changes nothing."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qdbev_ros.core.errors import ConfigError
from qdbev_train.model import BEVFormer
from qdbev_train.quantization import (
    PARTS,
    Override,
    QuantConfig,
    calibrate,
    post_training_quantise,
    quantise_model,
)
from qdbev_train.quantization.calibrate import in_float, run_batch
from qdbev_train.quantization.grid import code_range, fake_quantise
from qdbev_train.quantization.layers import (
    ActivationQuantiser,
    QuantisedConv2d,
    QuantisedLayer,
    QuantisedLinear,
    QuantisedPackedAttention,
)
from qdbev_train.quantization.ranges import Histogram, weight_scales
from qdbev_train.quantization.report import describe
from qdbev_train.quantization.rounding import input_covariance, round_weights
from tests.quantisation_samples import frames, small_model


@pytest.fixture(scope="module")
def student() -> BEVFormer:
    model = small_model()
    return post_training_quantise(model, frames(model, 3), QuantConfig())


def test_code_ranges_are_those_of_the_bits() -> None:
    assert code_range(4, signed=True) == (-8, 7)
    assert code_range(6, signed=True) == (-32, 31)
    assert code_range(6, signed=False) == (0, 63)


@pytest.mark.parametrize("bounds", [(-8, 7), (-32, 31), (0, 63)])
def test_values_land_on_codes_inside_the_range_ties_to_even(bounds: tuple[int, int]) -> None:
    low, high = (torch.tensor(float(b)) for b in bounds)
    x = torch.linspace(-40.0, 90.0, 2001)
    scale = torch.tensor(0.5)
    codes = fake_quantise(x, scale, low, high) / scale
    assert torch.equal(codes, codes.round())
    assert codes.min() == low
    assert codes.max() == high
    np.testing.assert_array_equal(codes.numpy(), np.clip(np.rint(x.numpy() / np.float32(0.5)), *bounds))


def test_the_gradient_is_one_inside_the_range_and_zero_where_values_are_cut_off() -> None:
    x = torch.tensor([-20.0, -3.2, 0.1, 2.9, 20.0], requires_grad=True)
    scale, low, high = torch.tensor(1.0), torch.tensor(-8.0), torch.tensor(7.0)
    fake_quantise(x, scale, low, high).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_the_bias_lies_on_the_product_of_the_scales() -> None:
    linear = QuantisedLinear(torch.randn(5, 8), torch.randn(5), 4, 6)
    linear.activation.scale.fill_(0.13)
    linear.weight_scale.copy_(weight_scales(linear.weight, 4, "mse"))
    weight, bias = linear.parameters_on_grid()
    codes = bias / (0.13 * linear.weight_scale)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert (weight / linear.weight_scale[:, None]).round().unique().numel() <= 16
    assert not torch.equal(bias, linear.bias)


def test_folding_a_batch_norm_changes_the_features_by_rounding_only() -> None:
    model = small_model()
    reference = copy.deepcopy(model)
    quantise_model(model, QuantConfig())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    batch = frames(reference, 1)[0]
    with torch.no_grad(), in_float(model.modules()):
        wanted, got = run_batch(reference, batch, None), run_batch(model, batch, None)
    for a, b in zip(wanted.image_features, got.image_features, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wanted.boxes, got.boxes, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(wanted.class_logits, got.class_logits, rtol=1e-3, atol=1e-3)


def test_every_layer_of_a_calibrated_model_reads_and_holds_codes_of_its_bits(student: BEVFormer) -> None:
    seen: dict[str, Tensor] = {}
    handles = []
    for name, module in student.named_modules():
        if isinstance(module, QuantisedConv2d):
            handles.append(module.register_forward_pre_hook(lambda m, a, n=name: seen.update({n: a[0]})))
        if isinstance(module, ActivationQuantiser):
            handles.append(module.register_forward_hook(lambda m, a, out, n=name: seen.update({n: out})))
    with torch.no_grad():
        run_batch(student, frames(student, 1)[0], None)
    for handle in handles:
        handle.remove()
    for name, module in student.named_modules():
        if isinstance(module, QuantisedLayer):
            codes = module.parameters_on_grid()[0].flatten(1) / module.weight_scale[:, None]
            low, high = code_range(module.bits, signed=True)
            assert codes.round().min() >= low, name
            assert codes.round().max() <= high, name
        if name not in seen:
            continue
        quantiser = module if isinstance(module, ActivationQuantiser) else module.input_quantiser
        codes = seen[name] / quantiser.scale
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3, msg=name)
        assert codes.round().min() >= quantiser.low, name
        assert codes.round().max() <= quantiser.high, name
        assert (int(quantiser.low), int(quantiser.high)) in {
            code_range(quantiser.bits, signed=True),
            code_range(quantiser.bits, signed=False),
        }


def test_tensors_that_are_never_negative_use_all_their_codes_for_what_is_positive(student: BEVFormer) -> None:
    quantisers = dict(student.img_backbone.named_modules())
    assert int(quantisers["quantisers.features_0_0"].low) == 0  # behind ReLU6
    assert int(quantisers["quantisers.features_2_conv_2"].low) == -32  # a linear bottleneck
    hidden = student.pts_bbox_head.transformer.encoder.layers[0].ffns[0].layers[1]
    assert int(hidden.activation.low) == 0  # reads the output of a ReLU: found by calibration


def test_the_bev_map_has_one_scale_wherever_it_is_read(student: BEVFormer) -> None:
    transformer = student.pts_bbox_head.transformer
    readers = [transformer.encoder.bev_quantiser]
    readers += [layer.attentions[0].value_proj.activation for layer in transformer.encoder.layers]
    readers += [layer.attentions[1].value_proj.activation for layer in transformer.decoder.layers]
    assert len({float(r.scale) for r in readers}) == 1
    with torch.no_grad():
        bev = run_batch(student, frames(student, 1)[0], None).bev
    codes = bev / transformer.encoder.bev_quantiser.scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)


def test_the_maps_range_is_that_of_what_the_encoder_puts_out_in_calibration_and_in_training() -> None:
    """Not that of the BEV queries, which are read on the same grid: here they are a hundred times as large."""
    model = small_model()
    with torch.no_grad():
        model.pts_bbox_head.bev_embedding.weight.mul_(100)
    config = QuantConfig(
        scales="running", weight_range="minmax", activation_range="minmax", bias_correction=False
    )
    student = post_training_quantise(model, frames(model, 2), config)
    quantiser = student.pts_bbox_head.transformer.encoder.bev_quantiser
    calibrated = float(quantiser.scale)
    student.train()
    with torch.no_grad():
        for _ in range(25):
            run_batch(student, frames(student, 1)[0], None)
    assert float(quantiser.scale) == pytest.approx(calibrated, rel=0.3)


def test_exceptions_have_their_bits_and_are_named_in_the_report(student: BEVFormer) -> None:
    report = describe(student, QuantConfig())
    layers = {layer["name"]: layer for layer in report["layers"]}
    first = layers["img_backbone.features.0.0"]
    assert (first["weight_bits"], first["activation_bits"]) == (7, 8)
    assert layers["pts_bbox_head.cls_branches.1.6"]["weight_bits"] == 7
    named = {e["name"] for e in report["exceptions"]}
    others = [
        n
        for n, layer in layers.items()
        if layer["weight_bits"] != 4 or layer["activation_bits"] not in (6, None)  # an embedding has no input
    ]
    assert set(others) < named
    assert "pts_bbox_head.transformer.can_bus_mlp.0" in named
    left = [n for n, m in student.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert set(left) < named
    json.dumps(report)


@pytest.mark.parametrize("count", range(1, len(PARTS) + 1))
def test_parts_are_switched_one_after_another(count: int) -> None:
    model = small_model()
    for stage in range(1, count + 1):
        quantise_model(model, QuantConfig(parts=PARTS[:stage]))
    quantised = [n for n, m in model.named_modules() if isinstance(m, QuantisedLayer)]
    homes = (
        "img_backbone.",
        "img_neck.",
        "pts_bbox_head.transformer.encoder.",
        "pts_bbox_head.transformer.decoder.",
    )
    for i, home in enumerate(homes):
        assert any(name.startswith(home) for name in quantised) == (i < count)
    calibrate(model, frames(model, 1), QuantConfig(parts=PARTS[:count]))
    with torch.no_grad():
        assert torch.isfinite(run_batch(model, frames(model, 1)[0], None).boxes).all()


def test_a_forgotten_calibration_shows_at_once() -> None:
    model = quantise_model(small_model(), QuantConfig())
    with torch.no_grad():
        assert torch.isnan(run_batch(model, frames(model, 1)[0], None).class_logits).all()


def test_a_student_is_rebuilt_from_its_configuration_and_tensors(student: BEVFormer) -> None:
    config = QuantConfig.from_dict(json.loads(json.dumps(QuantConfig().to_dict())))
    assert config == QuantConfig()
    rebuilt = quantise_model(small_model(seed=5), config).eval()
    rebuilt.load_state_dict(student.state_dict())
    batch = frames(student, 1)[0]
    with torch.no_grad():
        assert torch.equal(run_batch(rebuilt, batch, None).boxes, run_batch(student, batch, None).boxes)


def test_a_student_trains_on_and_every_weight_gets_a_gradient(student: BEVFormer) -> None:
    model = copy.deepcopy(student).train()
    batch = frames(model, 2)[1]
    with torch.no_grad():
        history = run_batch(model, batch, None).bev
    out = run_batch(model, batch, history)
    (out.class_logits.square().mean() + out.boxes.square().mean()).backward()
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLayer):
            assert module.weight.grad is not None, name
            assert torch.isfinite(module.weight.grad).all(), name
    assert model.img_backbone.features.get_submodule("3.conv.1.0").weight.grad.abs().sum() > 0


def test_bias_correction_brings_channel_means_back() -> None:
    """Measured where it matters: the maps that the neck hands on."""
    model = small_model()
    batches = frames(model, 2)
    errors = []
    with torch.no_grad():
        wanted = [run_batch(model, b, None).image_features[0].mean((0, 1, 3, 4)) for b in batches]
    for correction in (False, True):
        quantised = post_training_quantise(
            copy.deepcopy(model), batches, QuantConfig(bias_correction=correction)
        )
        with torch.no_grad():
            got = [run_batch(quantised, b, None).image_features[0].mean((0, 1, 3, 4)) for b in batches]
        errors.append(float((torch.stack(got) - torch.stack(wanted)).mean(0).abs().mean()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("groups", [1, 16])
def test_codes_chosen_for_the_output_lose_less_there_and_stay_in_range(groups: int) -> None:
    """Inputs that are alike from pixel to pixel, as pictures are: errors of neighbouring weights can cancel."""
    generator = torch.Generator().manual_seed(2)
    convolution = nn.Conv2d(16, 16, 3, padding=1, groups=groups)
    layer = QuantisedConv2d(convolution, convolution.weight, convolution.bias, 4)
    source = ActivationQuantiser(6, non_negative=True)
    source.scale.fill_(0.1)
    layer.reads_from(source)
    layer.weight_scale.copy_(weight_scales(layer.weight, 4, "mse"))
    coarse = torch.randn(8, 16, 6, 10, generator=generator).relu()
    pictures = nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")

    def loss() -> float:
        error = layer(pictures) - convolution(pictures)
        return float((error - error.mean((0, 2, 3), keepdim=True)).square().mean())

    with torch.no_grad():
        before = loss()
        round_weights(layer, input_covariance(layer, (pictures,)))
        assert loss() < 0.6 * before
        codes = layer.weight / layer.weight_scale[:, None, None, None]
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert codes.round().min() >= -8
        assert codes.round().max() <= 7


def test_searched_weight_steps_lose_less_than_the_symmetric_range() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 0] *= 4  # an outlier in every channel

    def loss(scale: Tensor) -> Tensor:
        step = scale[:, None]
        return (torch.round(weight / step).clamp(-8, 7) * step - weight).square().sum(1)

    minmax, mse = weight_scales(weight, 4, "minmax"), weight_scales(weight, 4, "mse")
    torch.testing.assert_close(minmax, 2 * weight.abs().amax(1) / 15, rtol=2e-5, atol=0)
    assert (loss(mse) <= 1.001 * loss(minmax)).all()
    assert loss(mse).sum() < 0.95 * loss(minmax).sum()


def test_the_histogram_grows_and_keeps_its_counts() -> None:
    histogram = Histogram()
    small, large = torch.rand(1000) * 0.1, torch.rand(1000) * 7.0
    histogram.add(small)
    histogram.add(large)
    assert histogram.counts.sum() == 2000
    assert histogram.peak == float(large.max())
    assert not histogram.negative
    assert histogram.percentile(50.0) == pytest.approx(np.percentile(torch.cat([small, large]), 50), abs=0.02)
    # Of 2000 values none lies beyond the range, so cutting off early can only pay where outliers are rare.
    assert histogram.mse_scale(63, 6.0) * 63 <= 6.0


def test_a_configuration_with_unknown_settings_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown parts"):
        QuantConfig(parts=("wheels",))
    with pytest.raises(ConfigError, match="unknown keys"):
        QuantConfig.from_dict({"colour": 3})
    with pytest.raises(ConfigError, match="2 to 8"):
        QuantConfig(weight_bits=16)
    with pytest.raises(ConfigError, match="float layer"):
        Override("*", 32, 6, "half float")
    assert replace(QuantConfig(), weight_bits=8).bits("anything") == (8, 6)


def test_packed_attention_is_the_same_attention_without_the_grid() -> None:
    from qdbev_train.model.decoder import PackedAttention

    attention = PackedAttention(16, 2, 0.0)
    quantised = QuantisedPackedAttention(attention, 4, 6)
    query, value = torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    with in_float(quantised.modules()):
        torch.testing.assert_close(quantised(query, value, None), attention(query, value, None))
