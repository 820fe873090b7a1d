# SPDX-License-Identifier: Apache-2.0
"""What the town can contain: the ten classes, their shapes, sizes, colours and speeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from qdbev_train.synthetic import small_objects, vehicles
from qdbev_train.synthetic.mesh import Colour, Mesh, to_unit_box

CATEGORY = {
    "car": "vehicle.car",
    "truck": "vehicle.truck",
    "construction_vehicle": "vehicle.construction",
    "bus": "vehicle.bus.rigid",
    "trailer": "vehicle.trailer",
    "barrier": "movable_object.barrier",
    "motorcycle": "vehicle.motorcycle",
    "bicycle": "vehicle.bicycle",
    "pedestrian": "human.pedestrian.adult",
    "traffic_cone": "movable_object.trafficcone",
}
STRIDE_PHASES = 4
MAX_SPEED = {
    "car": 12.0,
    "truck": 9.0,
    "bus": 9.0,
    "trailer": 9.0,
    "construction_vehicle": 3.5,
    "motorcycle": 11.0,
    "bicycle": 5.5,
}  # m/s

CAR_PAINTS: tuple[Colour, ...] = (
    (235, 235, 235),
    (190, 192, 196),
    (120, 123, 128),
    (45, 46, 50),
    (150, 25, 28),
    (28, 52, 120),
    (60, 105, 160),
    (35, 85, 60),
    (215, 175, 60),
    (130, 90, 60),
    (225, 120, 40),
    (95, 30, 70),
)
CLOTHES: tuple[Colour, ...] = (
    (200, 50, 50),
    (50, 80, 170),
    (230, 230, 225),
    (60, 60, 65),
    (70, 130, 80),
    (220, 180, 60),
    (150, 90, 160),
    (120, 90, 70),
)
TROUSERS: tuple[Colour, ...] = ((40, 45, 70), (50, 50, 52), (110, 100, 85), (70, 85, 120), (30, 30, 34))
YELLOWS: tuple[Colour, ...] = ((250, 190, 10), (240, 170, 20), (255, 205, 40))
CARGO: tuple[Colour, ...] = (
    (240, 240, 238),
    (200, 205, 210),
    (220, 90, 40),
    (60, 110, 170),
    (70, 140, 90),
    (235, 215, 150),
)
BUS_PAINTS: tuple[Colour, ...] = (
    (200, 35, 40),
    (40, 110, 60),
    (235, 235, 230),
    (30, 80, 160),
    (235, 180, 40),
)
GREYS: tuple[Colour, ...] = ((170, 170, 165), (150, 148, 144), (190, 188, 182))
VEST: Colour = (230, 250, 40)


@dataclass(frozen=True)
class Shape:
    """One kind of body: how to make its mesh and how its instances vary."""

    name: str
    cls: str
    make: Callable[[], tuple[Mesh, tuple[float, float, float]]]
    paints: tuple[tuple[Colour, ...], ...]  # what each paint slot may be
    spread: float  # relative standard deviation of the size
    share: float  # how often within its class


def _shapes() -> dict[str, Shape]:
    found = [
        Shape(f"car_{s}", "car", partial(vehicles.car, s), (CAR_PAINTS,), 0.04, share)
        for s, share in (("sedan", 0.35), ("hatch", 0.25), ("suv", 0.25), ("van", 0.15))
    ]
    found += [
        Shape(f"truck_{s}", "truck", partial(vehicles.truck, s), (CAR_PAINTS, CARGO), 0.06, share)
        for s, share in (("box", 0.5), ("tipper", 0.25), ("flatbed", 0.25))
    ]
    found += [
        Shape(
            f"construction_{s}",
            "construction_vehicle",
            partial(vehicles.construction, s),
            (YELLOWS,),
            0.05,
            0.5,
        )
        for s in ("excavator", "loader")
    ]
    found += [
        Shape("bus", "bus", vehicles.bus, (BUS_PAINTS, CARGO), 0.05, 1.0),
        Shape("trailer", "trailer", vehicles.trailer, (CAR_PAINTS, CARGO), 0.07, 1.0),
    ]
    found += [
        Shape(f"barrier_{s}", "barrier", partial(small_objects.barrier, s), (GREYS,), 0.04, 0.5)
        for s in ("board", "concrete")
    ]
    for cycle, make in (("motorcycle", small_objects.motorcycle), ("bicycle", small_objects.bicycle)):
        found += [
            Shape(
                f"{cycle}_{'ridden' if ridden else 'parked'}",
                cycle,
                partial(make, ridden),
                (CAR_PAINTS, CLOTHES),
                0.04,
                0.5,
            )
            for ridden in (True, False)
        ]
    found += [
        Shape("walker", "pedestrian", lambda: small_objects.pedestrian(0.25), (CLOTHES, TROUSERS), 0.05, 1.0),
        Shape("stander", "pedestrian", lambda: small_objects.pedestrian(-1), (CLOTHES, TROUSERS), 0.05, 0.0),
        Shape(
            "worker", "pedestrian", lambda: small_objects.pedestrian(-1, True), ((VEST,), TROUSERS), 0.05, 0.0
        ),
    ]
    found += [Shape("cone", "traffic_cone", small_objects.traffic_cone, (), 0.06, 1.0)]
    return {shape.name: shape for shape in found}


SHAPES: dict[str, Shape] = _shapes()


@cache
def body(name: str, phase: int = -1) -> tuple[Mesh, tuple[float, float, float]]:
    """Mesh in the unit cube and nominal (length, width, height); phase 0..STRIDE_PHASES-1 for a walking person."""
    if phase >= 0:
        mesh, size = small_objects.pedestrian((phase + 0.5) / STRIDE_PHASES, vest=False)
    else:
        mesh, size = SHAPES[name].make()
    return to_unit_box(mesh, size), size


@dataclass(frozen=True)
class Look:
    """The body of one object in the town."""

    shape: str
    size: tuple[float, float, float]  # length (x), width (y), height (z) in metres
    paints: tuple[Colour, ...]


def draw_look(name: str, rng: np.random.Generator) -> Look:
    """A random instance of a shape: size within its spread, colours from its palettes."""
    shape = SHAPES[name]
    common = rng.normal(0, shape.spread)
    scale = np.clip(1 + common + rng.normal(0, shape.spread / 2, 3), 0.85, 1.15)
    length, width, height = np.asarray(body(name)[1]) * scale
    paints = tuple(palette[rng.integers(len(palette))] for palette in shape.paints)
    return Look(name, (float(length), float(width), float(height)), paints)


def shapes_of(cls: str) -> tuple[list[str], list[float]]:
    """Names and shares (summing to one) of the shapes that make up a class."""
    names = [s.name for s in SHAPES.values() if s.cls == cls and s.share > 0]
    shares = [SHAPES[n].share for n in names]
    return names, [s / sum(shares) for s in shares]
