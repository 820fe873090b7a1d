# SPDX-License-Identifier: Apache-2.0
"""The frames on which engines are compared: made of numbers, the same on every machine, for any variant."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.ego_motion import CAN_BUS_SIZE
from qdbev_ros.core.preprocess import normalise_picture
from qdbev_ros.core.variant import CAMERAS, ImageSpec, Variant

Floats = NDArray[np.float32]
# Directions of the cameras in degrees from the x axis (right) of the LIDAR_TOP frame, in the order of CAMERAS.
_YAWS = (90.0, 35.0, 145.0, -90.0, 200.0, -20.0)
_SEED = 916
_SPOTS = (4, 16, 64)  # patches across a picture, from coarse to fine


@dataclass(frozen=True)
class GateFrame:
    """Arguments of `Engine.infer` but for the history; `first` has none."""

    images: Floats
    lidar2img: Floats
    can_bus: Floats
    first: bool


def gate_frames(variant: Variant) -> tuple[GateFrame, ...]:
    """Two frames of a drive: one without history, one with that of the first, 8 m and 20 degrees further on."""
    random = np.random.Generator(np.random.PCG64(_SEED))
    rig = _rig(variant.image)
    still, moved = np.zeros(CAN_BUS_SIZE, np.float32), np.zeros(CAN_BUS_SIZE, np.float32)
    still[3] = moved[3] = 1.0
    still[9] = moved[9] = 9.81
    moved[0:2], moved[13], moved[16], moved[17] = (6.4, 4.8), 16.0, 0.64, 20.0
    return (
        GateFrame(_pictures(random, variant.image), rig, still, True),
        GateFrame(_pictures(random, variant.image), rig, moved, False),
    )


def _pictures(random: np.random.Generator, image: ImageSpec) -> Floats:
    """(6, 3, H, W): patches of random colour at several sizes, which have edges, areas and texture as scenes have."""
    pictures = np.zeros((len(CAMERAS), 3, image.padded_height, image.padded_width), np.float32)
    for picture in pictures:
        grey = np.full((image.height, image.width, 3), 118.0, np.float32)
        for spots in _SPOTS:
            side = max(1, image.width // spots)
            coarse = random.integers(-40, 41, (-(-image.height // side), -(-image.width // side), 3))
            fine = coarse.repeat(side, axis=0).repeat(side, axis=1)[: image.height, : image.width]
            grey += fine
        normalise_picture(np.clip(grey, 0, 255).astype(np.uint8), image, picture)
    return pictures


def _rig(image: ImageSpec) -> Floats:
    """(6, 4, 4) lidar2img of six cameras, 0.8 m from the middle, 80 degrees wide, level."""
    intrinsics = np.eye(4)
    intrinsics[0, 0] = intrinsics[1, 1] = 0.6 * image.width
    intrinsics[:2, 2] = image.width / 2, image.height / 2
    matrices = []
    for yaw in np.radians(_YAWS):
        forward = np.array([np.cos(yaw), np.sin(yaw), 0.0])
        right = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
        camera = np.eye(4)
        camera[:3, :3] = np.stack([right, [0.0, 0.0, -1.0], forward])
        camera[:3, 3] = -camera[:3, :3] @ (0.8 * forward)
        matrices.append(intrinsics @ camera)
    return np.stack(matrices).astype(np.float32)
