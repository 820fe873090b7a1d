# SPDX-License-Identifier: Apache-2.0
"""Fills a town with traffic, parked vehicles, road works and people, none of them inside another."""

from __future__ import annotations

import numpy as np

from qdbev_train.synthetic.catalogue import MAX_SPEED, Look, draw_look, shapes_of
from qdbev_train.synthetic.layout import EGO_SIZE, LANE, Road, Town, TownObject, ego_footprint
from qdbev_train.synthetic.paths import Array, Track, Way, clock, flow, follow, stay
from qdbev_train.synthetic.room import Room

# who drives in the lanes; "rig" is a lorry with a trailer behind it
TRAFFIC = {
    "car": 0.44,
    "truck": 0.11,
    "bus": 0.14,
    "rig": 0.08,
    "motorcycle": 0.09,
    "construction_vehicle": 0.03,
    "bicycle": 0.11,
}
PARKED = {
    "car": 0.50,
    "truck": 0.11,
    "trailer": 0.14,
    "bus": 0.06,
    "motorcycle": 0.07,
    "construction_vehicle": 0.06,
    "bicycle": 0.06,
}
AHEAD, BEHIND = 58.0, 55.0  # metres of road before and behind the ego car's drive that are filled


class Population:
    """Places objects one after another; one that finds no room is left out."""

    def __init__(self, town: Town, rng: np.random.Generator) -> None:
        self.town, self.rng = town, rng
        self.objects: list[TownObject] = []
        self.room = Room()
        self.room.take(ego_footprint(town), EGO_SIZE[0], EGO_SIZE[1], 0.0, force=True)

    def look(self, cls: str, variant: str = "") -> Look:
        names, shares = shapes_of(cls)
        return draw_look(variant or str(self.rng.choice(names, p=shares)), self.rng)

    def place(self, look: Look, track: Track, margin: float, parked: bool = False) -> bool:
        if not self.room.take(track, look.size[0], look.size[1], margin):
            return False
        self.objects.append(TownObject(look, track, parked))
        return True

    def stand(self, look: Look, xy: Array, yaw: float, margin: float = 0.15, parked: bool = True) -> bool:
        return self.place(look, stay(xy, yaw, self.town.duration), margin, parked)


def populate(town: Town, rng: np.random.Generator) -> list[TownObject]:
    """All objects of a scene."""
    p = Population(town, rng)
    main = town.roads[0]
    travel = float(town.ego_speed.mean() * town.duration)
    start = main.way.nearest(town.ego_lane.at(town.ego_start))
    span = (start - BEHIND, start + travel + AHEAD)
    for _ in range(rng.choice([0, 1, 2], p=[0.15, 0.55, 0.3])):
        _road_works(p, main, span)
    if rng.random() < 0.4:
        _car_park(p, main, span)
    _parked(p, main, span)
    _traffic(p, main, span)
    for road in town.roads[1:]:
        _traffic(p, road, (0.0, road.way.length))
    _people(p, span)
    return p.objects


def _road_works(p: Population, road: Road, span: tuple[float, float]) -> None:
    """A machine behind a row of barriers and cones, with workers, at the edge of the road."""
    rng = p.rng
    side = rng.choice([-1, 1])
    begin = rng.uniform(span[0] + 25, span[1] - 35)
    length = rng.uniform(8, 17)
    on_road = road.parking > 0 or road.lanes > 1
    edge = road.half - (road.parking or LANE) if on_road else road.half + 0.4
    inner = edge + 0.4
    style = f"barrier_{rng.choice(['board', 'concrete'])}"
    paint = p.look("barrier", style).paints
    for s in np.arange(begin, begin + length, rng.uniform(2.7, 3.6)):
        look = p.look("barrier", style)
        look = Look(look.shape, look.size, paint)
        p.stand(
            look,
            road.way.at(s, side * inner),
            float(road.way.heading(s)) + side * np.pi / 2 + rng.normal(0, 0.04),
            0.0,
        )
    for k in range(rng.integers(3, 6)):  # a taper of cones leads to the barriers
        s = begin - 2.0 - 2.2 * k
        p.stand(p.look("traffic_cone"), road.way.at(s, side * (inner + 0.35 * k)), rng.uniform(-3, 3), 0.1)
    for k in range(rng.integers(0, 3)):
        s = begin + length + 1.5 + 2.2 * k
        p.stand(p.look("traffic_cone"), road.way.at(s, side * (inner + 0.35 * k)), rng.uniform(-3, 3), 0.1)
    for k in range(rng.integers(1, 3)):
        s = begin + length * (k + 0.5) / 2
        look = p.look("construction_vehicle")
        yaw = float(road.way.heading(s)) + rng.choice([0, np.pi]) + rng.normal(0, 0.1)
        p.stand(look, road.way.at(s, side * (inner + 1.1 + look.size[1] / 2)), yaw)
    for _ in range(rng.integers(0, 3)):
        s = rng.uniform(begin, begin + length)
        p.stand(
            p.look("pedestrian", "worker"),
            road.way.at(s, side * (inner + rng.uniform(0.6, 3.5))),
            rng.uniform(-3, 3),
        )


def _car_park(p: Population, road: Road, span: tuple[float, float]) -> None:
    """A row of cars across the road's direction, on paved ground beyond the pavement."""
    rng = p.rng
    side = rng.choice([-1, 1])
    begin = rng.uniform(span[0] + 15, span[1] - 30)
    length = rng.uniform(12, 26)
    heading = float(road.way.heading(begin + length / 2))
    if abs(float(road.way.heading(begin) - road.way.heading(begin + length))) > 0.05:
        return
    near, far = side * (road.outside + 0.3), side * (road.outside + 6.3)
    p.town.pads.append(
        np.stack(
            [
                road.way.at(begin - 1, near),
                road.way.at(begin + length + 1, near),
                road.way.at(begin + length + 1, far),
                road.way.at(begin - 1, far),
            ]
        )
    )
    for s in np.arange(begin + 1.3, begin + length - 1, 2.7):
        if rng.random() < 0.3:
            continue
        cls = rng.choice(["car", "motorcycle", "bicycle"], p=[0.8, 0.12, 0.08])
        look = p.look(cls) if cls == "car" else p.look(cls, f"{cls}_parked")
        p.stand(
            look,
            road.way.at(s, side * (road.outside + 3.2)),
            heading + rng.choice([-1, 1]) * np.pi / 2 + rng.normal(0, 0.05),
        )


def _parked(p: Population, road: Road, span: tuple[float, float]) -> None:
    """Vehicles in the parking strips, two-wheelers on the pavement."""
    rng = p.rng
    for side in (-1, 1):
        s = span[0] + rng.uniform(0, 10)
        while s < span[1]:
            cls = str(rng.choice(list(PARKED), p=list(PARKED.values())))
            cycle = cls in ("motorcycle", "bicycle")
            look = p.look(cls, f"{cls}_parked" if cycle else "")
            length, width, _ = look.size
            s += length / 2
            heading = float(road.way.heading(s)) + (np.pi if side > 0 else 0.0)
            flip = np.pi if rng.random() < 0.12 else 0.0
            if cycle:
                p.stand(
                    look, road.way.at(s, side * (road.half + 0.7)), heading + flip + rng.normal(0, 0.5), 0.25
                )
            elif road.parking:
                off = road.half - max(road.parking - 0.25, width) / 2
                p.stand(look, road.way.at(s, side * off), heading + flip + rng.normal(0, 0.02), 0.25)
            s += length / 2 + (rng.uniform(1.0, 12) if road.parking else rng.uniform(18, 50))


def _traffic(p: Population, road: Road, span: tuple[float, float]) -> None:
    """Vehicles in every lane, keeping their distance because a lane moves as one."""
    rng, town = p.rng, p.town
    is_main = road is town.roads[0]
    for number in range(road.lanes):
        for side in (-1, 1):
            way = road.way.beside(side * LANE * (number + 0.5))
            if side > 0:
                way = way.reversed()
            cruise = float(rng.uniform(3, 12))
            speed = flow(rng, town.duration, min(cruise, 6.0) if town.corner else cruise)
            low, high = span if side < 0 else (way.length - span[1], way.length - span[0])
            if is_main and np.abs(way.at(town.ego_start) - town.ego_lane.at(town.ego_start)).max() < 1.0:
                speed = town.ego_speed
            travel = float(speed.mean() * town.duration)
            _lane(p, way, speed, low - (0.6 * travel if is_main else 0.0), high)


def _lane(p: Population, way: Way, speed: Array, low: float, high: float) -> None:
    rng = p.rng
    s = low + rng.uniform(0, 14)
    while s < high:
        cls = str(rng.choice(list(TRAFFIC), p=list(TRAFFIC.values())))
        rig = cls == "rig"
        cls = "truck" if rig else cls
        cycle = cls in ("motorcycle", "bicycle")
        look = p.look(cls, f"{cls}_ridden" if cycle else "")
        length = look.size[0]
        s += length / 2
        own = np.minimum(speed * rng.uniform(0.92, 1.04), MAX_SPEED[cls])
        line = way.beside(-float(rng.uniform(0.7, 1.2)) if cls == "bicycle" else float(rng.normal(0, 0.12)))
        if p.place(look, follow(line, s, own, 0.6 * length), 0.7) and rig:
            trailer = p.look("trailer")
            back = length / 2 + trailer.size[0] / 2 + 0.9
            p.place(trailer, follow(line, s - back, own, 0.6 * trailer.size[0]), 0.3)
        s += length / 2 + rng.uniform(5, 26)


def _people(p: Population, span: tuple[float, float]) -> None:
    """People walking along and waiting on the pavements, and crossing the road."""
    rng, town = p.rng, p.town
    for road in town.roads:
        along = span if road is town.roads[0] else (road.way.length / 2 - 45, road.way.length / 2 + 45)
        count = rng.poisson((along[1] - along[0]) * (0.055 if road is town.roads[0] else 0.03))
        for _ in range(count):
            _person(p, road, float(rng.uniform(*along)))


def _person(p: Population, road: Road, s: float) -> None:
    rng, town = p.rng, p.town
    side = rng.choice([-1, 1])
    offset = side * (road.half + rng.uniform(0.8, road.pavement - 0.3))
    kind = rng.choice(["walk", "stand", "cross"], p=[0.62, 0.2, 0.18])
    pace = float(np.clip(rng.normal(1.35, 0.25), 0.7, 1.9))
    if kind == "stand":
        p.stand(
            p.look("pedestrian", "stander"), road.way.at(s, offset), rng.uniform(-np.pi, np.pi), parked=False
        )
        return
    speed = np.full(len(clock(town.duration)), pace)
    if kind == "walk":
        way = road.way.beside(offset)
        s = way.nearest(road.way.at(s, offset))
        if rng.random() < 0.5:
            way, s = way.reversed(), way.length - s
        p.place(p.look("pedestrian"), follow(way, s, speed), 0.15)
        return
    begin, end = road.way.at(s, side * (road.outside - 0.8)), road.way.at(s, -side * (road.outside - 0.8))
    line = Way.through(begin + np.linspace(0, 1, 30)[:, None] * (end - begin))
    early = rng.uniform(0, 1) * line.length
    p.place(p.look("pedestrian"), follow(line, early, speed), 0.3)
