# SPDX-License-Identifier: Apache-2.0
"""A variant small enough for literal loops, a rig of six cameras, and the slowest possible bilinear sampler."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from qdbev_ros.core.variant import BackboneSpec, BevSpec, Variant, load_variant
from qdbev_train.model import BEVFormer, build_model

# Directions in which the six cameras look, in degrees from the x axis (right) of the LIDAR_TOP frame.
YAWS = (90.0, 35.0, 145.0, -90.0, 200.0, -20.0)


def small_variant() -> Variant:
    """Two feature levels, a BEV that is not square, every count different from the others."""
    nano = load_variant("nano")
    return replace(
        nano,
        name="sample",
        image=replace(nano.image, height=32, width=64),
        backbone=BackboneSpec("mobilenet_v2", 0, "pytorch", (2, 3), (), 2),
        bev=BevSpec(6, 5, (-20.0, -24.0, -5.0, 20.0, 24.0, 3.0), 2),
        transformer=replace(
            nano.transformer,
            channels=16,
            heads=2,
            ffn_channels=24,
            encoder_layers=2,
            decoder_layers=2,
            queries=7,
            tsa_points=3,
            sca_points=4,
            decoder_points=2,
        ),
    )


def small_model(seed: int = 0) -> BEVFormer:
    """A model of `small_variant` in which no weight is zero, so that nothing is tested on a special case."""
    torch.manual_seed(seed)
    model = build_model(small_variant()).eval()
    unsettle(model)
    return model


def unsettle(model: torch.nn.Module) -> None:
    """Adds noise to what starts as zero (offsets, attention weights, biases) and to running statistics."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1 or "sampling_offsets" in name or "attention_weights" in name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.copy_(torch.randn_like(tensor) * 0.1)
            elif name.endswith("running_var"):
                tensor.copy_(torch.rand_like(tensor) + 0.5)


def rig(variant: Variant, turn_degrees: float = 0.0) -> Tensor:
    """(6, 4, 4) lidar2img of six cameras around the vehicle, all turned by `turn_degrees`."""
    width, height = variant.image.width, variant.image.height
    intrinsics = np.eye(4)
    intrinsics[0, 0] = intrinsics[1, 1] = 0.6 * width
    intrinsics[:2, 2] = width / 2, height / 2
    matrices = []
    for yaw in np.radians(np.array(YAWS) + turn_degrees):
        forward = np.array([np.cos(yaw), np.sin(yaw), 0.0])
        right = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
        rotation = np.stack([right, np.array([0.0, 0.0, -1.0]), forward])
        lidar2camera = np.eye(4)
        lidar2camera[:3, :3] = rotation
        lidar2camera[:3, 3] = -rotation @ (0.8 * forward)
        matrices.append(intrinsics @ lidar2camera)
    return torch.from_numpy(np.stack(matrices).astype(np.float32))


def can_bus(yaw_delta_degrees: float, forward_metres: float, yaw: float = 0.7) -> Tensor:
    """(18,) of a vehicle that drove `forward_metres` along its heading and turned."""
    vector = np.zeros(18, np.float32)
    vector[0:2] = forward_metres * np.cos(yaw), forward_metres * np.sin(yaw)
    vector[3], vector[6] = np.cos(yaw / 2), np.sin(yaw / 2)
    vector[9], vector[13] = 9.8, 2.0 * forward_metres
    vector[16], vector[17] = yaw, yaw_delta_degrees
    return torch.from_numpy(vector)


def bilinear(plane: Tensor, x: float, y: float) -> Tensor:
    """(D,) value of a (D, H, W) map at pixel (x, y), the centre of the first pixel being (0, 0); zeros outside."""
    _, height, width = plane.shape
    left, top = int(np.floor(x)), int(np.floor(y))
    total = torch.zeros_like(plane[:, 0, 0])
    for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
        if 0 <= column < width and 0 <= row < height:
            total += (1 - abs(x - column)) * (1 - abs(y - row)) * plane[:, row, column]
    return total


def sample_fraction(plane: Tensor, x: float, y: float) -> Tensor:
    """As `bilinear`, at (x, y) in fractions of the map: 0 and 1 are the outer edges of the border pixels."""
    return bilinear(plane, x * plane.shape[2] - 0.5, y * plane.shape[1] - 0.5)
