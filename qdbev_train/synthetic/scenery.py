# SPDX-License-Identifier: Apache-2.0
"""What stands still and is not annotated: houses, trees, hedges, street lamps, signs."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from qdbev_train.synthetic.ground import OPEN, PIXELS_PER_METRE, ROAD, Picture
from qdbev_train.synthetic.layout import Road, Town
from qdbev_train.synthetic.mesh import Mesh, MeshBuilder
from qdbev_train.synthetic.paths import Array
from qdbev_train.synthetic.plan import ScenePlan
from qdbev_train.synthetic.room import rectangles

STYLES = 4
TILE = 9.0  # metres of wall that one facade picture covers, both ways


@dataclass
class Walls:
    """The house walls of one facade style."""

    points: list[Array] = field(default_factory=list)  # each (4, 3)
    texture: list[Array] = field(default_factory=list)  # each (4, 2)


@dataclass(frozen=True)
class Scenery:
    props: Mesh  # everything with plain colours
    walls: list[Walls]
    facades: list[Picture]  # one per style
    shadows: list[Array]  # outlines (n, 2) on the ground


def build_scenery(plan: ScenePlan, kinds: Picture, rng: np.random.Generator, sun_shift: Array) -> Scenery:
    """sun_shift (2,): how far the shadow of a point one metre up falls from below it."""
    town = plan.town
    free = _Free(town, kinds)
    for obj in plan.objects:
        if not obj.track.speed.any():
            free.occupy(
                rectangles(obj.track.xy[:1], obj.track.yaw[:1], obj.look.size[0], obj.look.size[1])[0]
            )
    m = MeshBuilder()
    m.box((0, 0.01), (0, 0.01), (-1, -0.9), (0, 0, 0))  # never empty
    walls = [Walls() for _ in range(STYLES)]
    shadows: list[Array] = []
    for road in town.roads:
        for side in (-1, 1):
            _houses(town, road, side, free, m, walls, shadows, rng, sun_shift)
    for road in town.roads:
        for side in (-1, 1):
            _street_furniture(road, side, free, m, shadows, rng, sun_shift)
    return Scenery(m.build(), walls, [_facade(rng) for _ in range(STYLES)], shadows)


class _Free:
    """Which ground is still free, at 2 pixels per metre."""

    def __init__(self, town: Town, kinds: Picture) -> None:
        step = PIXELS_PER_METRE // 2
        self.size = town.size
        self.kinds = kinds[step // 2 :: step, step // 2 :: step].copy()
        self.taken = (self.kinds != OPEN).astype(np.uint8)

    def occupy(self, corners: Array) -> None:
        """An annotated object (footprint (4, 2)) stands here for good: nothing else may, on the pavement either."""
        polygon = np.round(self._pixels(corners)).astype(np.int32)
        cv2.fillPoly(self.taken, [polygon], 1)
        cv2.fillPoly(self.kinds, [polygon], ROAD)

    def _pixels(self, corners: Array) -> Array:
        return np.stack([corners[:, 0] * 2, (self.size - corners[:, 1]) * 2], -1)

    def claim(self, corners: Array, margin: float) -> bool:
        """Takes a rectangle (4, 2), grown by a margin, if no road, pavement or house is in it."""
        centre = corners.mean(0)
        grown = centre + (corners - centre) * (1 + margin / np.linalg.norm(corners - centre, axis=1).mean())
        mask = np.zeros_like(self.taken)
        cv2.fillPoly(mask, [np.round(self._pixels(grown)).astype(np.int32)], 1)
        if (mask & self.taken).any():
            return False
        self.taken |= mask
        return True

    def kind(self, xy: Array) -> int:
        """What the ground is at a place; ROAD outside the town."""
        column, row = int(xy[0] * 2), int((self.size - xy[1]) * 2)
        if not (0 <= column < self.kinds.shape[1] and 0 <= row < self.kinds.shape[0]):
            return ROAD
        return int(self.kinds[row, column])


def _houses(
    town: Town,
    road: Road,
    side: int,
    free: _Free,
    m: MeshBuilder,
    walls: list[Walls],
    shadows: list[Array],
    rng: np.random.Generator,
    sun_shift: Array,
) -> None:
    s = rng.uniform(0, 20)
    setback = rng.uniform(0.5, 9)
    dense = rng.uniform(0.55, 0.95)
    while s < road.way.length:
        width, depth = rng.uniform(9, 26), rng.uniform(8, 14)
        height = 3.0 * rng.integers(1, 8) + 1.0
        middle = s + width / 2
        s += width + (rng.uniform(0.5, 4) if rng.random() < dense else rng.uniform(10, 30))
        centre = road.way.at(middle, side * (road.outside + setback + depth / 2))
        if not (0 < centre[0] < town.size and 0 < centre[1] < town.size):
            continue
        yaw = np.array([float(road.way.heading(middle))])
        corners = rectangles(centre[None], yaw, width, depth)[0]
        if free.claim(corners, 0.8):
            _house(corners, height, walls[rng.integers(STYLES)], m, rng)
            shadows.append(
                cv2.convexHull(np.concatenate([corners, corners + sun_shift * height]).astype(np.float32))[
                    :, 0
                ]
            )


def _house(corners: Array, height: float, walls: Walls, m: MeshBuilder, rng: np.random.Generator) -> None:
    for i in range(4):
        a, b = corners[i], corners[(i + 1) % 4]
        u = np.round(np.linalg.norm(b - a) / (TILE / 3)) / 3  # whole windows
        v = height / TILE
        walls.points.append(np.array([[*a, 0], [*b, 0], [*b, height], [*a, height]]))
        walls.texture.append(np.array([[0, 0], [u, 0], [u, v], [0, v]]))
    roof = [(120, 60, 45), (75, 75, 80), (140, 130, 120), (95, 80, 70)][rng.integers(4)]
    base = np.c_[corners, np.full(4, height)]
    rise = rng.choice([0.3, 2.5])
    middle = corners.mean(0)
    shrink = 1.0 if rise < 1 else 0.45
    m.hull(base, np.c_[middle + (corners - middle) * shrink, np.full(4, height + rise)], roof)


def _street_furniture(
    road: Road,
    side: int,
    free: _Free,
    m: MeshBuilder,
    shadows: list[Array],
    rng: np.random.Generator,
    sun_shift: Array,
) -> None:
    for s in np.arange(rng.uniform(0, 20), road.way.length, rng.uniform(20, 32)):
        xy = road.way.at(s, side * (road.half + 0.35))
        if free.kind(xy) not in (ROAD, OPEN):
            _lamp(m, xy, float(road.way.heading(s)) - side * np.pi / 2, rng)
            shadows.append(_shadow_line(xy, 7.0, 0.1, sun_shift))
    for s in np.arange(rng.uniform(0, 8), road.way.length, rng.uniform(7, 16)):
        if rng.random() < 0.25:
            continue
        xy = road.way.at(s + rng.uniform(-2, 2), side * (road.outside + rng.uniform(0.8, 5)))
        yaw = np.array([float(road.way.heading(s))])
        if rng.random() < 0.75:
            if free.claim(rectangles(xy[None], yaw, 1.2, 1.2)[0], 0.3):
                _tree(m, xy, rng, shadows, sun_shift)
        else:
            length = rng.uniform(2, 7)
            if free.claim(rectangles(xy[None], yaw, length, 1.0)[0], 0.1):
                corners = rectangles(xy[None], yaw, length, 0.8)[0]
                green = rng.uniform(0.7, 1.2) * np.array([50, 85, 40])
                m.hull(
                    np.c_[corners, np.zeros(4)],
                    np.c_[corners, np.full(4, rng.uniform(0.6, 1.6))],
                    tuple(green),
                )


def _lamp(m: MeshBuilder, xy: Array, inward: float, rng: np.random.Generator) -> None:
    x, y = xy
    grey = (85, 90, 92)
    if rng.random() < 0.3:  # a traffic sign
        m.tube((x, y, 0), (x, y, 2.6), 0.05, grey)
        across = np.array([-np.sin(inward), np.cos(inward)]) * 0.35
        colour = [(190, 30, 30), (30, 80, 170), (235, 235, 235), (230, 190, 40)][rng.integers(4)]
        corners = rectangles(
            xy[None], np.array([inward + np.pi / 2]), 0.06, 2 * float(np.linalg.norm(across))
        )[0]
        m.hull(np.c_[corners, np.full(4, 2.0)], np.c_[corners, np.full(4, 2.7)], colour)
        return
    m.tube((x, y, 0), (x, y, 7.0), 0.09, grey, end_radius=0.06)
    end = xy + np.array([np.cos(inward), np.sin(inward)]) * 1.6
    m.tube((x, y, 6.9), (end[0], end[1], 7.1), 0.05, grey)


def _tree(
    m: MeshBuilder, xy: Array, rng: np.random.Generator, shadows: list[Array], sun_shift: Array
) -> None:
    x, y = xy
    trunk, crown = rng.uniform(1.6, 3.0), rng.uniform(1.2, 2.4)
    m.tube((x, y, 0), (x, y, trunk + 0.6), 0.17, (90, 68, 48), 5, end_radius=0.1)
    green = np.array(
        [(58, 98, 42), (80, 110, 45), (45, 82, 48), (128, 110, 48)][rng.integers(4)]
    ) * rng.uniform(0.8, 1.2)
    for _ in range(2):
        shift = rng.uniform(-0.5, 0.5, 3)
        colours = green * rng.uniform(0.8, 1.15, (64, 1))
        m.blob(
            (x + shift[0], y + shift[1], trunk + crown + shift[2]),
            (crown, crown, crown * rng.uniform(0.9, 1.4)),
            colours,
        )
    angle = np.linspace(0, 2 * np.pi, 10, endpoint=False)
    centre = xy + sun_shift * (trunk + crown)
    shadows.append(centre + np.stack([np.cos(angle), np.sin(angle)], -1) * crown)
    shadows.append(_shadow_line(xy, trunk + 0.5, 0.17, sun_shift))


def _shadow_line(xy: Array, height: float, radius: float, sun_shift: Array) -> Array:
    end = xy + sun_shift * height
    across = np.array([-sun_shift[1], sun_shift[0]]) / (np.linalg.norm(sun_shift) + 1e-9) * radius
    return np.stack([xy + across, end + across, end - across, xy - across])


def _facade(rng: np.random.Generator) -> NDArray[np.uint8]:
    """(192, 192, 3) RGB: three floors of three windows."""
    wall = np.array(
        [(190, 170, 145), (165, 95, 75), (205, 205, 200), (150, 155, 165), (215, 195, 150), (120, 110, 105)][
            rng.integers(6)
        ]
    ) * rng.uniform(0.85, 1.1)
    image = np.clip(wall + rng.normal(0, 4, (192, 192, 1)), 0, 255)
    frame = np.clip(wall * rng.choice([0.7, 1.2]), 0, 255)
    left, top, w, h = rng.integers(8, 20), rng.integers(8, 18), rng.integers(24, 42), rng.integers(30, 42)
    for row in range(3):
        for column in range(3):
            x, y = column * 64 + left, row * 64 + top
            image[y - 3 : y + h + 3, x - 3 : x + w + 3] = frame
            glass = np.array([60, 75, 95]) * rng.uniform(0.6, 1.4)
            image[y : y + h, x : x + w] = glass
            image[y : y + h, x + w // 2 : x + w // 2 + 2] = frame
    image[::64] = np.clip(wall * 0.8, 0, 255)
    return np.clip(image, 0, 255).astype(np.uint8)
