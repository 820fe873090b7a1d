# SPDX-License-Identifier: Apache-2.0
"""Photometric distortion and grid mask against literal, slow versions of themselves."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from numpy.typing import NDArray

from qdbev_train.data.augment import Distortion, distort, draw_distortion, grid_mask


def slow_distortion(picture: NDArray[np.uint8], by: Distortion) -> NDArray[np.float64]:
    """Pixel by pixel, in Python's own colour space."""
    out = np.zeros(picture.shape)
    for place in np.ndindex(picture.shape[:2]):
        b, g, r = (float(v) + by.brightness for v in picture[place])
        factor = by.contrast if by.contrast_first else 1.0
        h, s, v = colorsys.rgb_to_hsv(r * factor, g * factor, b * factor)
        r, g, b = colorsys.hsv_to_rgb((h + by.hue / 360) % 1.0, s * by.saturation, v)
        factor = 1.0 if by.contrast_first else by.contrast
        bgr = (b * factor, g * factor, r * factor)
        out[place] = [bgr[c] for c in by.channels]
    return out


@pytest.mark.parametrize(
    "by",
    [
        Distortion(0.0, 1.0, True, 1.0, 0.0, (0, 1, 2)),
        Distortion(20.0, 1.3, True, 1.0, 0.0, (2, 0, 1)),
        Distortion(0.0, 0.6, False, 1.4, 0.0, (0, 1, 2)),
        Distortion(9.0, 1.5, False, 0.5, -18.0, (1, 0, 2)),
        Distortion(31.0, 0.5, True, 1.5, 17.0, (2, 1, 0)),
    ],
)
def test_distortion_equals_the_slow_one(by: Distortion) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    np.testing.assert_allclose(distort(picture, by), slow_distortion(picture, by), atol=0.02)


def test_each_change_has_its_range_and_probability() -> None:
    rng = np.random.default_rng(1)
    draws = [draw_distortion(rng) for _ in range(4000)]
    for name, neutral, low, high in (
        ("brightness", 0.0, -32, 32),
        ("contrast", 1.0, 0.5, 1.5),
        ("saturation", 1.0, 0.5, 1.5),
        ("hue", 0.0, -18, 18),
    ):
        values = np.array([getattr(d, name) for d in draws])
        drawn = values[values != neutral]
        assert len(drawn) / len(draws) == pytest.approx(0.5, abs=0.03)
        assert low <= drawn.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < drawn.max() <= high
    assert np.mean([d.contrast_first for d in draws]) == pytest.approx(0.5, abs=0.03)
    # Of the permutations, drawn half of the time, one in six leaves the channels as they are.
    assert np.mean([d.channels == (0, 1, 2) for d in draws]) == pytest.approx(0.5 + 0.5 / 6, abs=0.03)


def slow_mask(height: int, width: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """The original's loops: stripes drawn onto a larger sheet, the middle cut out and inverted (mode 1)."""
    period = int(rng.integers(2, height))
    thickness = min(max(int(period * 0.5 + 0.5), 1), period - 1)
    first_row, first_column = int(rng.integers(period)), int(rng.integers(period))
    rows, columns = int(1.5 * height), int(1.5 * width)
    sheet = np.ones((rows, columns), np.float32)
    for i in range(rows // period):
        start = period * i + first_row
        sheet[start : min(start + thickness, rows)] = 0
    for i in range(columns // period):
        start = period * i + first_column
        sheet[:, start : min(start + thickness, columns)] = 0
    top, left = (rows - height) // 2, (columns - width) // 2
    return 1 - sheet[top : top + height, left : left + width]


@pytest.mark.parametrize("seed", range(12))
def test_the_grid_equals_the_slow_one(seed: int) -> None:
    for shape in ((12, 20), (32, 64), (9, 7)):
        one, other = (f(*shape, np.random.default_rng(seed)) for f in (grid_mask, slow_mask))
        np.testing.assert_array_equal(one, other)


def test_a_grid_keeps_three_quarters_on_average() -> None:
    rng = np.random.default_rng(2)
    assert np.mean([grid_mask(48, 80, rng).mean() for _ in range(300)]) == pytest.approx(0.75, abs=0.05)
