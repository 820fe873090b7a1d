# SPDX-License-Identifier: Apache-2.0
"""Ways through the town, and how things move along them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
STEP = 1.0  # metres between the points of a way
TICK = 0.05  # seconds between the entries of a track
BEFORE = 1.0  # a track starts so many seconds before the first frame and ends as late after the last


@dataclass(frozen=True)
class Way:
    """A smooth line on the ground with arc length; goes on straight beyond both ends."""

    points: Array  # (N, 2)
    lengths: Array  # (N,) arc length at each point
    headings: Array  # (N,) direction of travel, unwrapped, rad

    @staticmethod
    def through(points: Array) -> Way:
        """The way through points (N, 2)."""
        steps = np.diff(points, axis=0)
        lengths = np.concatenate([[0.0], np.cumsum(np.linalg.norm(steps, axis=1))])
        tangent = np.gradient(points, axis=0)
        return Way(points, lengths, np.unwrap(np.arctan2(tangent[:, 1], tangent[:, 0])))

    @property
    def length(self) -> float:
        return float(self.lengths[-1])

    def heading(self, s: Array | float) -> Array:
        """Direction at arc length s."""
        return np.interp(s, self.lengths, self.headings)

    def at(self, s: Array | float, offset: float = 0.0) -> Array:
        """(..., 2) position at arc length s, offset metres to the left."""
        s = np.asarray(s, dtype=np.float64)
        xy = np.stack(
            [np.interp(s, self.lengths, self.points[:, 0]), np.interp(s, self.lengths, self.points[:, 1])], -1
        )
        heading = self.heading(s)
        over = s - np.clip(s, 0.0, self.length)
        along = np.stack([np.cos(heading), np.sin(heading)], -1)
        left = np.stack([-np.sin(heading), np.cos(heading)], -1)
        return xy + over[..., None] * along + offset * left

    def beside(self, offset: float) -> Way:
        """The way offset metres to the left of this one."""
        return Way.through(self.at(self.lengths, offset))

    def reversed(self) -> Way:
        return Way.through(self.points[::-1])

    def nearest(self, xy: Array) -> float:
        """Arc length of the point closest to xy."""
        return float(self.lengths[np.argmin(((self.points - xy) ** 2).sum(1))])


def bend(start: Array, heading: float, pieces: list[tuple[float, float]]) -> Way:
    """A way from start made of (length, turn angle) pieces; angle 0 is straight, positive turns left."""
    headings = []
    for length, turn in pieces:
        n = max(round(length / STEP), 1)
        headings.append(heading + turn * (np.arange(n) + 0.5) / n)
        heading += turn
    heads = np.concatenate(headings)
    steps = np.stack([np.cos(heads), np.sin(heads)], -1) * STEP
    return Way.through(np.concatenate([start[None], start + np.cumsum(steps, 0)]))


def tick_at(t: float, count: int) -> tuple[int, float]:
    """The entry of a track before t seconds, and how far on t is towards the next (0..1)."""
    f = (t + BEFORE) / TICK
    index = min(max(int(np.floor(f)), 0), count - 2)
    return index, f - index


@dataclass(frozen=True)
class Track:
    """Where one thing is at every TICK from -BEFORE on."""

    xy: Array  # (T, 2)
    yaw: Array  # (T,) unwrapped
    speed: Array  # (T,) m/s along its heading

    def pose(self, t: float) -> tuple[float, float, float]:
        """x, y, yaw at t seconds after the first frame."""
        i, w = tick_at(t, len(self.yaw))
        x, y = self.xy[i] * (1 - w) + self.xy[i + 1] * w
        return float(x), float(y), float(self.yaw[i] * (1 - w) + self.yaw[i + 1] * w)

    def speed_at(self, t: float) -> float:
        return float(np.interp((t + BEFORE) / TICK, np.arange(len(self.speed)), self.speed))


def clock(duration: float) -> Array:
    """The times of a track's entries."""
    return np.arange(round((duration + 2 * BEFORE) / TICK) + 1) * TICK - BEFORE


def stay(xy: Array, yaw: float, duration: float) -> Track:
    """Something that does not move."""
    n = len(clock(duration))
    return Track(np.repeat(np.asarray(xy, dtype=np.float64)[None], n, 0), np.full(n, yaw), np.zeros(n))


def flow(rng: np.random.Generator, duration: float, cruise: float) -> Array:
    """(T,) speeds of one lane's traffic: steady, slowing to a stop, setting off, or easing off and on."""
    t = clock(duration)
    kind = rng.choice(["steady", "stop", "go", "ease"], p=[0.5, 0.17, 0.15, 0.18])
    when = rng.uniform(0.15, 0.7) * duration
    rate = rng.uniform(1.2, 2.4)
    if kind == "stop":
        return np.clip(cruise - rate * np.clip(t - when, 0, None), 0, None)
    if kind == "go":
        return np.clip(rate * np.clip(t - when * 0.6, 0, None), 0, cruise)
    if kind == "ease":
        dip = np.clip(1.0 - np.abs(t - when) / 3.0, 0, 1)
        return cruise - np.minimum(rate * 3.0, cruise * 0.7) * dip
    return np.full(len(t), cruise)


def follow(way: Way, start: float, speed: Array, wheelbase: float = 0.0) -> Track:
    """Along a way from arc length start (at t = 0) with speed (T,).

    With a wheelbase the heading is that of the line between the axles and the position is midway between them.
    """
    s = np.concatenate([[0.0], np.cumsum((speed[1:] + speed[:-1]) / 2 * TICK)])
    s += start - s[round(BEFORE / TICK)]
    if wheelbase <= 0:
        return Track(way.at(s), way.heading(s), speed)
    front, rear = way.at(s + wheelbase / 2), way.at(s - wheelbase / 2)
    chord = front - rear
    yaw = np.unwrap(np.arctan2(chord[:, 1], chord[:, 0]))
    return Track((front + rear) / 2, yaw, speed)
