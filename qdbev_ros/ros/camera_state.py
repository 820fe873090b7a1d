# SPDX-License-Identifier: Apache-2.0
"""What is known about each camera's input, and what is wrong with it. No ROS in here."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qdbev_ros.core.geometry import Array, camera_matrix_problem
from qdbev_ros.core.health import Level
from qdbev_ros.core.latency import Rate

MIN_STALE_S = 1.0  # a camera is never called silent sooner


@dataclass(frozen=True)
class Intrinsics:
    """From a CameraInfo: K (3, 3) of the rectified picture of (width, height)."""

    matrix: Array
    width: int
    height: int


@dataclass
class CameraState:
    """One camera's input. Times are seconds of a monotonic clock."""

    name: str
    image_topic: str
    info_topic: str
    intrinsics: Intrinsics | None = None
    info_error: str | None = None  # why the last CameraInfo cannot be used
    picture_error: str | None = None  # why the last picture could not be used
    left_out: str | None = None  # why the last answer had to do without this camera
    sets_without: int = 0  # answers that had to
    images: int = 0
    picture_errors: int = 0
    arrivals: Rate = field(default_factory=Rate)

    def image_arrived(self, now: float) -> None:
        self.images += 1
        self.arrivals.note(now)

    def picture_failed(self, text: str) -> None:
        self.picture_errors += 1
        self.picture_error = text

    def answered(self, left_out: str | None) -> None:
        """A set was answered, without this camera where `left_out` says why."""
        self.left_out = left_out
        if left_out is None:
            self.picture_error = None
        else:
            self.sets_without += 1

    def rate(self) -> float:
        """Pictures a second over the last ones; 0 while unknown."""
        return self.arrivals.hz()

    def age(self, now: float) -> float | None:
        """Seconds since the last picture, None before the first."""
        return None if self.arrivals.last_s is None else now - self.arrivals.last_s

    def status(self, now: float) -> tuple[Level, str]:
        """The worst that is wrong, naming the topic."""
        if self.info_error is not None:
            return Level.ERROR, f"{self.info_topic}: {self.info_error}"
        if not self.images:
            return Level.ERROR, f"{self.image_topic} never delivered a picture"
        if self.intrinsics is None:
            return Level.ERROR, f"{self.info_topic} never delivered a CameraInfo"
        if self.picture_error is not None:
            return Level.ERROR, f"{self.image_topic}: {self.picture_error}"
        age, rate = self.age(now), self.rate()
        if age is not None and age > max(MIN_STALE_S, 3 / rate if rate else MIN_STALE_S):
            return Level.STALE, f"{self.image_topic} has been silent for {age:.1f} s"
        if self.left_out is not None:
            return Level.WARN, f"{self.image_topic}: left out of the last answer: {self.left_out}"
        return Level.OK, "delivers pictures"


def check_intrinsics(k: Array, p: Array, width: int, height: int) -> Intrinsics:
    """Intrinsics from CameraInfo's K (9,) and P (12,). Raises ValueError with the reason.

    P describes the rectified picture and wins; drivers that leave it zero rectify nothing, and K holds.
    """
    if not np.isfinite(k).all() or not np.isfinite(p).all():
        raise ValueError("K or P holds NaN or infinite numbers")
    matrix = np.asarray(k, np.float64).reshape(3, 3)
    projection = np.asarray(p, np.float64).reshape(3, 4)[:, :3]
    rectified = projection[0, 0] > 0 and projection[1, 1] > 0
    problem = camera_matrix_problem("K", matrix)
    if problem is None and rectified:
        problem = camera_matrix_problem("P", projection)
    if problem is not None:
        raise ValueError(problem)
    if width < 1 or height < 1:
        raise ValueError(f"the picture size {width}x{height} is empty")
    return Intrinsics(projection.copy() if rectified else matrix, width, height)
