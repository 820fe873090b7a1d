# SPDX-License-Identifier: Apache-2.0
"""The ground of a town as a picture seen from above, and the sky as a panorama.

Pictures of the ground have PIXELS_PER_METRE and row 0 at the north edge (largest y): exactly a nuScenes map mask.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from qdbev_train.synthetic.layout import LANE, Road, Town
from qdbev_train.synthetic.paths import Array

Picture = NDArray[np.uint8]
PIXELS_PER_METRE = 10
OPEN, PAVED, ROAD = 0, 1, 2  # what the ground is
_SHIFT = 4  # fractional bits of OpenCV's drawing coordinates


def pixels(town: Town, xy: Array) -> NDArray[np.int32]:
    """(..., 2) column and row of town positions, in OpenCV's fixed point with _SHIFT bits."""
    columns = xy[..., 0] * PIXELS_PER_METRE - 0.5
    rows = (town.size - xy[..., 1]) * PIXELS_PER_METRE - 0.5
    return np.round(np.stack([columns, rows], -1) * (1 << _SHIFT)).astype(np.int32)


def _strip(town: Town, road: Road, right: float, left: float) -> NDArray[np.int32]:
    """The outline of what lies between two distances from a road's centre line (left positive)."""
    s = road.way.lengths
    return pixels(town, np.concatenate([road.way.at(s, left), road.way.at(s, right)[::-1]]))


def _fill(image: Picture, outline: NDArray[np.int32], colour: int | tuple[int, ...]) -> None:
    cv2.fillPoly(image, [outline], colour, cv2.LINE_AA if image.ndim == 3 else cv2.LINE_8, _SHIFT)


def ground_kinds(town: Town) -> Picture:
    """(N, N) OPEN, PAVED or ROAD for every ground pixel."""
    n = int(town.size * PIXELS_PER_METRE)
    kinds = np.zeros((n, n), np.uint8)
    for road in town.roads:
        _fill(kinds, _strip(town, road, -road.outside, road.outside), PAVED)
    for road in town.roads:
        _fill(kinds, _strip(town, road, -road.half, road.half), ROAD)
    for pad in town.pads:
        _fill(kinds, pixels(town, pad), ROAD)
    return kinds


def _line(
    town: Town, mask: Picture, points: Array, width: float, dash: tuple[int, int] | None = None
) -> None:
    """A painted line along points (N, 2) one metre apart; dash = (drawn, left out) metres."""
    thickness = max(round(width * PIXELS_PER_METRE), 1)
    if dash is None:
        cv2.polylines(mask, [pixels(town, points)], False, 255, thickness, cv2.LINE_AA, _SHIFT)
        return
    on, off = dash
    pieces = [pixels(town, points[i : i + on + 1]) for i in range(0, len(points) - on, on + off)]
    cv2.polylines(mask, pieces, False, 255, thickness, cv2.LINE_AA, _SHIFT)


def _markings(town: Town) -> Picture:
    """(N, N) 255 where the road is painted."""
    n = int(town.size * PIXELS_PER_METRE)
    paint = np.zeros((n, n), np.uint8)
    for road in town.roads:
        own = np.zeros_like(paint)
        s = road.way.lengths
        if road.lanes > 1:
            for offset in (-0.12, 0.12):
                _line(town, own, road.way.at(s, offset), 0.15)
        else:
            _line(town, own, road.way.at(s), 0.15, (3, 4))
        for side in (-1, 1):
            for lane in range(1, road.lanes):
                _line(town, own, road.way.at(s, side * lane * LANE), 0.15, (3, 6))
            _line(town, own, road.way.at(s, side * (road.lanes * LANE - 0.1)), 0.15)
        for other in town.roads:
            if other is not road:  # no lines across a junction
                _fill(own, _strip(town, other, -other.half, other.half), 0)
        paint = np.maximum(paint, own)
    for crossing in town.crossings:
        _zebra(town, paint, town.roads[0], town.roads[1].half + 2.2, crossing)
    return paint


def _zebra(town: Town, paint: Picture, road: Road, away: float, s: float) -> None:
    """Zebra crossings over a road on both sides of a junction at arc length s."""
    for sign in (-1, 1):
        for offset in np.arange(-road.half + 0.4, road.half - 0.4, 1.0):
            near, far = s + sign * away, s + sign * (away + 2.8)
            corners = [
                road.way.at(near, offset),
                road.way.at(far, offset),
                road.way.at(far, offset + 0.5),
                road.way.at(near, offset + 0.5),
            ]
            _fill(paint, pixels(town, np.stack(corners)), 255)


def _noise(n: int, cell: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(n, n) smooth noise around 0 with blobs of about `cell` pixels."""
    coarse = rng.normal(0, 1, (n // cell + 2, n // cell + 2)).astype(np.float32)
    return cv2.resize(coarse, (n, n), interpolation=cv2.INTER_LINEAR)


def paint_ground(town: Town, kinds: Picture, shadows: list[Array], rng: np.random.Generator) -> Picture:
    """(N, N, 3) RGB picture of the ground with markings, stains and the shadows of what stands still.

    shadows: outlines (n, 2) in town coordinates.
    """
    n = len(kinds)
    asphalt, slab = float(rng.uniform(62, 112)), float(rng.uniform(125, 175))
    grass = np.array(
        [(88, 112, 58), (70, 100, 50), (118, 116, 72), (128, 118, 98)][rng.integers(4)], np.float32
    )
    palette = np.zeros((256, 3), np.uint8)
    palette[OPEN], palette[PAVED] = grass, (slab, slab * 0.98, slab * 0.94)
    palette[ROAD] = (asphalt, asphalt, asphalt * 1.03)
    image = cv2.LUT(cv2.merge([kinds] * 3), palette[None])
    for road in town.roads:
        own = np.zeros((n, n), np.uint8)
        for side in (-1, 1):
            _line(town, own, road.way.at(road.way.lengths, side * (road.half + 0.1)), 0.2)
        image[(own > 0) & (kinds == PAVED)] = int(slab * 1.15)
    white = _markings(town)
    wear = rng.uniform(0.65, 1.0)
    image[white > 100] = np.uint8(235 * wear)
    shade = np.full((n, n), 100, np.uint8)
    dark = int(100 * (1 - 0.5 * town.weather.sun))
    for outline in shadows:
        _fill(shade, pixels(town, outline), dark)
    grain = np.tile(rng.normal(0, 5.0, (250, 250)).astype(np.float32), (n // 250 + 1, n // 250 + 1))[:n, :n]
    stains = _noise(n, 40, rng) * 3.5 + _noise(n, 160, rng) * 3.5 + grain
    factor = np.clip(shade.astype(np.float32) + stains, 20, 160).astype(np.uint8)
    return cv2.multiply(image, cv2.merge([factor] * 3), scale=0.01)


def map_mask(kinds: Picture) -> Picture:
    """(N, N) nuScenes' semantic prior: 255 on roads and pavements."""
    return np.where(kinds > OPEN, 255, 0).astype(np.uint8)


def paint_sky(town: Town, rng: np.random.Generator) -> NDArray[np.float32]:
    """(64, 720, 3) RGB panorama: rows from 32 degrees above the horizon down to it, columns azimuth 0..360."""
    weather = town.weather
    clear = weather.sun
    zenith = np.array([95, 140, 205]) * clear + np.array([165, 170, 178]) * (1 - clear)
    horizon = np.array([205, 218, 230]) * clear + np.array([200, 202, 205]) * (1 - clear)
    up = np.linspace(1, 0, 64)[:, None, None] ** 0.7
    sky = np.tile(zenith * up + horizon * (1 - up), (1, 720, 1)).astype(np.float32)
    coarse = np.tile(
        rng.normal(0, 1, (6, 24)).astype(np.float32), (1, 3)
    )  # the middle one meets itself at 0 = 360
    clouds = cv2.resize(coarse, (3 * 720, 64), interpolation=cv2.INTER_CUBIC)[:, 720:1440]
    clouds = np.clip(clouds + rng.uniform(-1.2, 0.5), 0, 1)[..., None] * rng.uniform(0.4, 0.9)
    sky = sky * (1 - clouds) + np.array([238, 238, 240], np.float32) * clouds
    azimuth = np.radians(np.arange(720) / 2)
    glow = np.clip(np.cos(azimuth - weather.sun_azimuth), 0, 1) ** 6 * clear * 35
    return np.clip(sky + glow[None, :, None], 0, 255).astype(np.float32)
