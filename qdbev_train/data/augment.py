# SPDX-License-Identifier: Apache-2.0
"""What training varies: the world's sides and heading, the look of pictures, and what is blanked out of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.preprocess import Picture
from qdbev_ros.core.variant import Variant

MASK_RATIO = 0.5  # of a grid mask's period that its stripes take


@dataclass(frozen=True)
class Augmentation:
    """Plain data are not varied.

    Drawn once for a visit to a scene or for a queue: mirror, the probability of exchanging left and right · turn: the
    global frame gets a random heading.
    Drawn for each picture: light, the largest relative change of brightness and contrast, and of saturation ·
    photometric: BEVFormer's distortion.
    Drawn for each frame that is learned from: grid_mask, the probability of blanking a grid of squares out of it.
    """

    mirror: float = 0.0
    turn: bool = False
    light: float = 0.0
    photometric: bool = False
    grid_mask: float = 0.0

    @property
    def varies_pictures(self) -> bool:
        return self.light > 0 or self.photometric


def vary_picture(picture: Picture, augmentation: Augmentation, rng: np.random.Generator) -> NDArray[Any]:
    """The picture (H, W, 3) BGR in another light; float32 and possibly beyond 0..255 with `photometric`."""
    if augmentation.light:
        picture = _vary_light(picture, rng, augmentation.light)
    return distort(picture, draw_distortion(rng)) if augmentation.photometric else picture


def _vary_light(picture: Picture, rng: np.random.Generator, strength: float) -> Picture:
    contrast, brightness, saturation = 1 + strength * rng.uniform(-1, 1, 3)
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    # Mid grey stays where brightness puts it, whatever the contrast; one call, so that it saturates once.
    offset = 128 * (brightness - contrast)
    return cv2.addWeighted(picture, contrast * saturation, grey, contrast * (1 - saturation), offset)  # type: ignore[return-value]


@dataclass(frozen=True)
class Distortion:
    """One draw of the photometric distortion; the values that leave a picture alone are 0, 1 and (0, 1, 2).

    brightness is added, contrast and saturation are factors, hue is in degrees, channels is their new order.
    """

    brightness: float
    contrast: float
    contrast_first: bool  # before saturation and hue, or after them
    saturation: float
    hue: float
    channels: tuple[int, int, int]


def draw_distortion(rng: np.random.Generator) -> Distortion:
    """BEVFormer's ranges (SSD's before it), each change with probability 1/2."""

    def maybe(low: float, high: float, otherwise: float) -> float:
        return float(rng.uniform(low, high)) if rng.random() < 0.5 else otherwise

    brightness, contrast = maybe(-32, 32, 0.0), maybe(0.5, 1.5, 1.0)
    saturation, hue = maybe(0.5, 1.5, 1.0), maybe(-18, 18, 0.0)
    first = bool(rng.random() < 0.5)
    a, b, c = rng.permutation(3).tolist() if rng.random() < 0.5 else (0, 1, 2)
    return Distortion(brightness, contrast, first, saturation, hue, (a, b, c))


def distort(picture: NDArray[Any], by: Distortion) -> NDArray[np.float32]:
    """(H, W, 3) BGR float32; nothing is clipped, as in BEVFormer."""
    values = picture.astype(np.float32) + np.float32(by.brightness)
    if by.contrast_first:
        values *= np.float32(by.contrast)
    if by.saturation != 1.0 or by.hue != 0.0:
        hsv = cv2.cvtColor(values, cv2.COLOR_BGR2HSV)  # hue in degrees, saturation 0..1, value as the input
        hsv[..., 1] *= np.float32(by.saturation)
        hsv[..., 0] = (hsv[..., 0] + np.float32(by.hue)) % 360
        values = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)  # type: ignore[assignment]
    if not by.contrast_first:
        values *= np.float32(by.contrast)
    return values[..., list(by.channels)]


def blank_grid(images: NDArray[np.float32], variant: Variant, rng: np.random.Generator) -> None:
    """Sets squares of images (N, 3, H, W) to zero, the same ones in all of them (GridMask, mode 1, ratio 1/2)."""
    images *= grid_mask(variant.image.padded_height, variant.image.padded_width, rng)


def grid_mask(height: int, width: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(height, width) of 1 to keep and 0 to blank: stripes in both directions stay, the squares between them go.

    The stripes' period is random, from 2 pixels to the height, and so is where they begin. As in the original they are
    laid on a sheet of one and a half times the size, of which this is the middle; part of a period at the end of the
    sheet has no stripe.
    """
    period = int(rng.integers(2, height))
    thickness = min(max(int(period * MASK_RATIO + 0.5), 1), period - 1)

    def stripes(size: int) -> NDArray[np.bool_]:
        sheet = int(1.5 * size)
        place = np.arange(size) + (sheet - size) // 2 - int(rng.integers(period))
        return (place % period < thickness) & (place >= 0) & (place // period < sheet // period)

    rows, columns = stripes(height), stripes(width)
    return (rows[:, None] | columns[None]).astype(np.float32)
