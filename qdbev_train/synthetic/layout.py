# SPDX-License-Identifier: Apache-2.0
"""Where a scene takes place: roads, light and the ego car's drive."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np

from qdbev_train.synthetic.catalogue import SHAPES, Look
from qdbev_train.synthetic.paths import Array, Track, Way, bend, flow, follow

LANE = 3.5  # metres
KEYFRAME = 0.5  # seconds
EGO_SIZE = (4.1, 1.75, 1.6)  # length, width, height; the ego pose is its rear axle, 1.4 m behind the middle
EGO_MIDDLE = 1.4
REACH = 100.0  # the town is drawn so far around the ego car's drive


@dataclass(frozen=True)
class Road:
    """A road: its centre line and what lies beside it (metres from the centre line)."""

    way: Way
    lanes: int  # per direction
    parking: float  # width of the parking strip on either side, 0 = none
    pavement: float  # width of the pavement on either side

    @property
    def half(self) -> float:
        """Half the width of the carriageway with its parking strips."""
        return self.lanes * LANE + self.parking

    @property
    def outside(self) -> float:
        """Distance from the centre line to the pavement's outer edge."""
        return self.half + self.pavement


@dataclass(frozen=True)
class TownObject:
    """One annotated thing."""

    look: Look
    track: Track
    parked: bool = False  # a vehicle that does not take part in traffic

    @property
    def cls(self) -> str:
        return SHAPES[self.look.shape].cls


@dataclass(frozen=True)
class Weather:
    """Light and air of a scene."""

    sun_azimuth: float  # rad, in the town frame
    sun_elevation: float  # rad
    sun: float  # strength of the direct light, 0.15 overcast .. 1 clear
    brightness: float
    tint: tuple[float, float, float]  # RGB factors
    haze_metres: float  # distance after which 63 % of an object's colour is haze


@dataclass
class Town:
    """Everything that is fixed while planning goes on."""

    roads: list[Road]
    corner: bool
    ego_lane: Way
    ego_start: float
    ego_speed: Array
    ego: Track
    duration: float
    size: float  # the town is the square [0, size]^2 of the global frame
    weather: Weather
    pads: list[Array] = field(default_factory=list)  # (4, 2) paved areas off the road
    crossings: list[float] = field(default_factory=list)  # arc lengths on the main road


def scene_rng(name: str, seed: int, purpose: str) -> np.random.Generator:
    """A generator of its own per scene and purpose, so that one's draws never shift another's."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), zlib.crc32(purpose.encode())])


def draw_weather(rng: np.random.Generator) -> Weather:
    """Light from overcast to clear, dim to bright, cold to warm, hazy to crisp."""
    warm = rng.normal(0, 0.05)
    return Weather(
        float(rng.uniform(0, 2 * np.pi)),
        float(np.radians(rng.uniform(22, 70))),
        float(rng.choice([0.2, 0.55, 0.9], p=[0.25, 0.3, 0.45])),
        float(rng.uniform(0.78, 1.15)),
        (1 + warm, 1.0, 1 - warm),
        float(np.exp(rng.uniform(np.log(180), np.log(900)))),
    )


def _main_road(rng: np.random.Generator, travel: float) -> tuple[Way, bool, list[float], float]:
    """Centre line, whether it turns at a crossing, arc lengths of crossings, and where the ego car starts."""
    start = 110.0
    kind = rng.choice(["straight", "curve", "s", "corner"], p=[0.34, 0.24, 0.14, 0.28])
    heading = rng.uniform(0, 2 * np.pi)
    sign = rng.choice([-1, 1])
    before = start + rng.uniform(0.1, 0.6) * max(travel, 30)
    crossings: list[float] = []
    if kind == "straight":
        pieces = [(start + travel + 115, 0.0)]
    elif kind == "curve":
        radius, angle = rng.uniform(40, 90), rng.uniform(0.5, 1.3)
        pieces = [(before, 0.0), (radius * angle, sign * angle), (travel + 115, 0.0)]
    elif kind == "s":
        radius, angle = rng.uniform(35, 70), rng.uniform(0.35, 0.8)
        pieces = [
            (before, 0.0),
            (radius * angle, sign * angle),
            (10, 0.0),
            (radius * angle, -sign * angle),
            (travel + 115, 0.0),
        ]
    else:
        radius = rng.uniform(17, 22)
        pieces = [(before, 0.0), (radius * np.pi / 2, sign * np.pi / 2), (travel + 115, 0.0)]
    if kind in ("straight", "curve", "s") and rng.random() < 0.75:
        crossings.append(
            start + rng.uniform(-25, 5) if kind != "straight" else start + rng.uniform(-10, travel + 35)
        )
    way = bend(np.zeros(2), float(heading), pieces)
    return way, kind == "corner", crossings, start


def _cross_roads(rng: np.random.Generator, main: Way, corner: bool, crossings: list[float]) -> list[Road]:
    """Straight roads across the main one; at a corner both of its legs go on."""
    roads = []
    for s in crossings:
        heading = float(main.heading(s)) + np.pi / 2 + rng.normal(0, 0.08)
        direction = np.array([np.cos(heading), np.sin(heading)])
        points = main.at(s) + np.arange(-130, 131.0)[:, None] * direction
        roads.append(Road(Way.through(points), 1, 0.0, float(rng.uniform(2.5, 4))))
    if corner:
        turn = np.abs(np.gradient(main.headings)) > 1e-3
        first, last = int(np.argmax(turn)) - 1, len(turn) - int(np.argmax(turn[::-1]))
        for index, sign in ((first, 1.0), (last, -1.0)):
            along = np.array([np.cos(main.headings[index]), np.sin(main.headings[index])]) * sign
            points = main.points[index] + np.arange(0, 150.0)[:, None] * along
            roads.append(Road(Way.through(points), 1, 0.0, 3.0))
    return roads


def lay_out(name: str, seed: int, frames: int) -> Town:
    """Roads, light and the ego car's drive of a scene."""
    rng = scene_rng(name, seed, "roads")
    duration = (frames - 1) * KEYFRAME
    cruise = float(rng.uniform(2.5, 10.0))
    speed = flow(rng, duration, cruise)
    main, corner, crossings, start = _main_road(rng, float(speed.mean() * duration))
    if corner:
        speed = np.minimum(speed, rng.uniform(4.5, 6.0))
    lanes = 1 if corner or rng.random() < 0.5 else 2
    road = Road(main, lanes, 2.4 if not corner and rng.random() < 0.6 else 0.0, float(rng.uniform(2.5, 4.0)))
    roads = [road, *_cross_roads(rng, main, corner, crossings)]
    lane = main.beside(-LANE * (0.5 if lanes == 1 else rng.choice([0.5, 1.5])))
    lane_start = lane.nearest(main.at(start))
    # shift the town so that the drive lies in the middle of the map square
    drive = follow(lane, lane_start, speed).xy
    low, high = drive.min(0), drive.max(0)
    size = float(np.ceil((high - low).max() + 2 * REACH))
    shift = size / 2 - (low + high) / 2
    roads = [Road(Way.through(r.way.points + shift), r.lanes, r.parking, r.pavement) for r in roads]
    lane = Way.through(lane.points + shift)
    ego = follow(lane, lane_start + EGO_MIDDLE, speed, 2.7)
    back = np.stack([np.cos(ego.yaw), np.sin(ego.yaw)], -1) * EGO_MIDDLE
    ego = Track(ego.xy - back, ego.yaw, speed)
    return Town(
        roads, corner, lane, lane_start, speed, ego, duration, size, draw_weather(rng), crossings=crossings
    )


def ego_footprint(town: Town) -> Track:
    """The middle of the ego car, for keeping others out of it."""
    ahead = np.stack([np.cos(town.ego.yaw), np.sin(town.ego.yaw)], -1) * EGO_MIDDLE
    return Track(town.ego.xy + ahead, town.ego.yaw, town.ego.speed)
