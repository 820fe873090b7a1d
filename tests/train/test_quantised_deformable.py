# SPDX-License-Identifier: Apache-2.0
"""Deformable convolutions on the grid, in training and in an exported graph."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from qdbev_ros.core.variant import BackboneSpec
from qdbev_ros.engine.lowering import lower_u8
from qdbev_train.export.graph import INPUTS, export_master
from qdbev_train.model import build_model
from qdbev_train.model.dcn import ModulatedDeformConv2d
from qdbev_train.model.resnet import ResNet
from qdbev_train.quantization import (
    QuantConfig,
    post_training_quantise,
)
from qdbev_train.quantization.calibrate import in_float
from qdbev_train.quantization.convolutions import quantise_convolutions
from qdbev_train.quantization.layers import (
    ActivationQuantiser,
    QuantisedDeformConv2d,
    QuantisedLayer,
)
from qdbev_train.quantization.ranges import Histogram, activation_scale
from qdbev_train.quantization.report import describe
from tests.model_samples import small_variant as sample_variant
from tests.model_samples import unsettle
from tests.quantisation_samples import frames
from tests.unit.test_lowering import plain_session


def deformable_backbone() -> ResNet:
    """The first stage of a ResNet-50 alone, its 3x3 convolutions deformable, no offset zero."""
    torch.manual_seed(0)
    backbone = ResNet(BackboneSpec("resnet", 50, "caffe", (1,), (1,), 1)).eval()
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, ModulatedDeformConv2d):
                module.conv_offset.weight.normal_(0, 0.02)
                module.conv_offset.bias.normal_(0, 0.3)
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 1.5)
                module.running_mean.normal_(0, 0.1)
    return backbone


def test_deformable_convolutions_are_quantised_with_finer_offsets() -> None:
    backbone = deformable_backbone()
    pictures = torch.randn(1, 3, 24, 40, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = backbone(pictures)[0]
    student = quantise_convolutions(backbone, "img_backbone", QuantConfig(), None, None).eval()
    deformable = [m for m in student.modules() if isinstance(m, QuantisedDeformConv2d)]
    assert len(deformable) == 3
    for layer in deformable:
        assert (layer.bits, layer.input_quantiser.bits) == (4, 6)
        assert (layer.conv_offset.bits, layer.conv_offset.input_quantiser.bits) == (7, 8)
    quantisers = [m for m in student.modules() if isinstance(m, ActivationQuantiser)]
    with torch.no_grad(), in_float(student.modules()):
        torch.testing.assert_close(student(pictures)[0], wanted, rtol=1e-4, atol=1e-4)
        for quantiser in quantisers:
            quantiser.histogram = Histogram()
        student(pictures)
    for quantiser in quantisers:
        if quantiser.non_negative is None:
            quantiser.set_sign(signed=quantiser.histogram.negative)
        codes = (int(quantiser.low), int(quantiser.high))
        quantiser.scale.fill_(activation_scale(quantiser.histogram, codes, "mse", 99.9, quantiser.limit))
        quantiser.histogram = None
    for layer in student.modules():
        if isinstance(layer, QuantisedLayer):
            layer.fit_scale("mse")
    out = student(pictures)[0]
    assert float((out - wanted).detach().square().mean()) < 0.1 * float(wanted.square().mean())
    out.sum().backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in deformable)
    assert all(layer.conv_offset.weight.grad.abs().sum() > 0 for layer in deformable)


@torch.no_grad()
def test_a_model_with_deformable_convolutions_exports_to_the_same_function() -> None:
    variant = replace(sample_variant(), backbone=BackboneSpec("resnet", 50, "caffe", (1,), (1,), 1))
    torch.manual_seed(0)
    model = build_model(variant).eval()
    unsettle(model)
    student = post_training_quantise(model, frames(model, 2), QuantConfig(weight_rounding="nearest"))
    kinds = {e["name"]: e["kind"] for e in describe(student, QuantConfig())["layers"]}
    assert kinds["img_backbone.layer1.0.conv2"] == "deformable convolution"
    batch = frames(student, 1)[0]
    tables = student.camera_tables(batch.lidar2img)
    history = student.align_history(batch.can_bus, None, None)
    views = (tables.points, tables.cells, tables.slots, tables.weights)
    inputs = (batch.images, *views, batch.can_bus, *history)
    wanted = student.forward_tensors(*inputs)
    session = plain_session(lower_u8(export_master(student, variant)).SerializeToString())
    names = {i.name for i in session.get_inputs()}
    feeds = {n: t.numpy() for n, t in zip(INPUTS, inputs, strict=True) if n in names}
    logits, boxes, bev = session.run(None, feeds)
    assert abs(logits - wanted.class_logits[-1, 0].numpy()).max() < 1e-3
    assert abs(boxes - wanted.boxes[-1, 0].numpy()).max() < 1e-3
    assert abs(bev - wanted.bev[0].numpy()).max() < 1e-3
