# SPDX-License-Identifier: Apache-2.0
"""Backbones and neck against the same thing written plainly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.variant import BackboneSpec
from qdbev_train.model.dcn import ModulatedDeformConv2d
from qdbev_train.model.layers import conv_bn, fold_batchnorm
from qdbev_train.model.mobilenet import InvertedResidual, MobileNetV2
from qdbev_train.model.neck import FPN
from qdbev_train.model.resnet import Bottleneck, ResNet
from tests.model_samples import bilinear, unsettle


def unsettled(module: nn.Module) -> nn.Module:
    unsettle(module)
    return module.eval()


def test_folded_batchnorm_equals_convolution_then_batchnorm() -> None:
    torch.manual_seed(0)
    pair = unsettled(nn.Sequential(nn.Conv2d(3, 5, 3, 2, padding=1), nn.BatchNorm2d(5)))
    x = torch.randn(2, 3, 9, 11)
    weight, bias = fold_batchnorm(pair[0], pair[1])
    torch.testing.assert_close(F.conv2d(x, weight, bias, 2, 1), pair(x))
    torch.testing.assert_close(conv_bn(x, pair[0], pair[1]), pair(x))


def test_frozen_batchnorm_uses_running_statistics_in_training_too() -> None:
    torch.manual_seed(0)
    backbone = unsettled(MobileNetV2(BackboneSpec("mobilenet_v2", 0, "pytorch", (2,), (), 1)))
    x = torch.randn(1, 3, 32, 32)
    still = backbone(x)[0]
    torch.testing.assert_close(backbone.train()(x)[0], still)


def test_inverted_residual_equals_its_layers_in_a_row() -> None:
    torch.manual_seed(0)
    for stride, out_channels, has_shortcut in ((1, 8, True), (2, 8, False), (1, 12, False)):
        block = unsettled(InvertedResidual(8, out_channels, stride, 6))
        x = torch.randn(2, 8, 10, 12)
        expected = block.conv(x) + (x if has_shortcut else 0)
        torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def plain_bottleneck(block: Bottleneck, x: Tensor) -> Tensor:
    y = F.relu(block.bn1(block.conv1(x)))
    y = F.relu(block.bn2(block.conv2(y)))
    y = block.bn3(block.conv3(y))
    return F.relu(y + (x if block.downsample is None else block.downsample(x)))


@pytest.mark.parametrize("style", ["pytorch", "caffe"])
def test_bottleneck_equals_its_layers_in_a_row(style: str) -> None:
    torch.manual_seed(0)
    for stride, channels in ((1, 16), (2, 16), (1, 8)):
        block = unsettled(Bottleneck(channels, 4, stride, style, deformable=False))
        x = torch.randn(2, channels, 9, 11)
        torch.testing.assert_close(block(x), plain_bottleneck(block, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("style", "strides"), [("pytorch", (1, 2)), ("caffe", (2, 1))])
def test_style_says_which_convolution_strides(style: str, strides: tuple[int, int]) -> None:
    with torch.device("meta"):
        backbone = ResNet(BackboneSpec("resnet", 50, style, (4,), (), 1))
    for stage in (2, 3, 4):
        first = backbone.get_submodule(f"layer{stage}.0")
        assert (first.conv1.stride[0], first.conv2.stride[0]) == strides
        assert first.downsample[0].stride[0] == 2
        second = backbone.get_submodule(f"layer{stage}.1")
        assert (second.conv1.stride[0], second.conv2.stride[0]) == (1, 1)


def test_maps_have_the_strides_and_channels_of_their_stages() -> None:
    images = torch.zeros(1, 3, 72, 104, device="meta")
    with torch.device("meta"):
        resnet = ResNet(BackboneSpec("resnet", 101, "caffe", (1, 2, 3, 4), (3, 4), 4))
        mobilenet = MobileNetV2(BackboneSpec("mobilenet_v2", 0, "pytorch", (1, 2, 3, 4), (), 4))
    sizes = [(18, 26), (9, 13), (5, 7), (3, 4)]
    assert [tuple(m.shape[1:]) for m in resnet(images)] == [
        (c, *s) for c, s in zip((256, 512, 1024, 2048), sizes)
    ]
    assert [tuple(m.shape[1:]) for m in mobilenet(images)] == [
        (c, *s) for c, s in zip((24, 32, 96, 320), sizes)
    ]


def test_an_unknown_depth_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="depth 34"):
        ResNet(BackboneSpec("resnet", 34, "pytorch", (4,), (), 1))


@pytest.mark.parametrize("stride", [1, 2])
def test_deformable_convolution_without_offsets_is_half_or_all_of_a_plain_one(stride: int) -> None:
    torch.manual_seed(0)
    conv = ModulatedDeformConv2d(4, 6, stride)
    x = torch.randn(2, 4, 7, 9)
    plain = F.conv2d(x, conv.weight, None, stride, 1)
    torch.testing.assert_close(conv(x), 0.5 * plain, atol=1e-5, rtol=1e-5)  # a fresh mask is sigmoid(0)
    with torch.no_grad():
        conv.conv_offset.bias[18:] = 50.0
    torch.testing.assert_close(conv(x), plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_deformable_convolution_equals_a_literal_loop() -> None:
    torch.manual_seed(0)
    conv = ModulatedDeformConv2d(3, 2, 2)
    with torch.no_grad():
        conv.conv_offset.weight.normal_(std=0.3)
        conv.conv_offset.bias.normal_()
    x = torch.randn(1, 3, 6, 7)
    raw = conv.conv_offset(x)[0]
    out = torch.zeros(2, *raw.shape[1:])
    for row in range(raw.shape[1]):
        for column in range(raw.shape[2]):
            for tap in range(9):
                dy, dx, logit = raw[2 * tap], raw[2 * tap + 1], raw[18 + tap]
                y = 2 * row - 1 + tap // 3 + float(dy[row, column])
                x_pixel = 2 * column - 1 + tap % 3 + float(dx[row, column])
                value = bilinear(x[0], x_pixel, y) * logit[row, column].sigmoid()
                out[:, row, column] += conv.weight[:, :, tap // 3, tap % 3] @ value
    torch.testing.assert_close(conv(x)[0], out, atol=1e-5, rtol=1e-5)


def test_folding_a_batchnorm_into_a_deformable_convolution_keeps_its_offsets() -> None:
    torch.manual_seed(0)
    conv, bn = ModulatedDeformConv2d(3, 5, 1), nn.BatchNorm2d(5)
    with torch.no_grad():
        conv.conv_offset.weight.normal_(std=0.3)
    unsettled(bn)
    x = torch.randn(1, 3, 6, 7)
    torch.testing.assert_close(conv_bn(x, conv, bn), bn(conv(x)), atol=1e-5, rtol=1e-5)


def test_the_neck_adds_coarser_maps_onto_finer_ones_of_odd_size() -> None:
    torch.manual_seed(0)
    neck = FPN([4, 6], 8, 1)
    fine, coarse = torch.randn(1, 4, 5, 9), torch.randn(1, 6, 3, 5)
    (out,) = neck([fine, coarse])
    lateral = neck.lateral_convs[1].conv(coarse)
    # Nearest neighbour to the exact size: pixel i of n reads pixel floor(i * m / n) of m.
    rows, columns = torch.arange(5) * 3 // 5, torch.arange(9) * 5 // 9
    merged = neck.lateral_convs[0].conv(fine) + lateral[:, :, rows][..., columns]
    torch.testing.assert_close(out, neck.fpn_convs[0].conv(merged))
    assert len(neck.fpn_convs) == 1  # the coarser map's output convolution would never be used


def test_only_levels_beyond_the_first_extra_one_have_a_relu_in_front() -> None:
    torch.manual_seed(0)
    neck = FPN([4], 8, 3)
    outputs = neck([torch.randn(1, 4, 12, 16)])
    assert [tuple(o.shape[2:]) for o in outputs] == [(12, 16), (6, 8), (3, 4)]
    torch.testing.assert_close(outputs[1], neck.fpn_convs[1].conv(outputs[0]))
    torch.testing.assert_close(outputs[2], neck.fpn_convs[2].conv(outputs[1].relu()))
