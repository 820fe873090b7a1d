# SPDX-License-Identifier: Apache-2.0
"""A scene's objects at one moment: which a camera may see, where their corners are, how light they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdbev_train.synthetic.catalogue import STRIDE_PHASES, body
from qdbev_train.synthetic.layout import TownObject, Weather
from qdbev_train.synthetic.mesh import Array
from qdbev_train.synthetic.paths import tick_at
from qdbev_train.synthetic.plan import ScenePlan

VIEW = 110.0  # objects further away are not drawn
SHADOW_HEIGHT = 0.015  # metres above the ground
STRIDE_LENGTH = 1.5  # metres a person walks per stride


@dataclass(frozen=True)
class Light:
    """Sun, two weak lights from the other sides, and light from everywhere."""

    directions: Array  # (3, 3) unit vectors towards the lights, in the town frame; the first is the sun
    strengths: Array  # (3,)
    ambient: float
    shadow_grey: int

    @staticmethod
    def of(weather: Weather) -> Light:
        elevation = (
            weather.sun_elevation if weather.sun > 0.3 else np.radians(80)
        )  # no long shadows under clouds
        x, y = np.cos(weather.sun_azimuth), np.sin(weather.sun_azimuth)
        directions = np.array(
            [[x * np.cos(elevation), y * np.cos(elevation), np.sin(elevation)], [-y, x, 0.4], [-x, -y, 0.6]]
        )
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        strengths = np.array([0.25 + 0.55 * weather.sun, 0.18, 0.15])
        return Light(directions, strengths, 0.62 - 0.2 * weather.sun, int(77 * (1 - 0.55 * weather.sun)))

    @property
    def shadow_shift(self) -> Array:
        """(2,) how far the shadow of a point one metre up falls from below it."""
        return -self.directions[0, :2] / self.directions[0, 2]

    def shaded(self, colours: Array, normals: Array, yaw: float = 0.0) -> NDArray[np.uint8]:
        """(F, 3) colours of facets with normals (F, 3) given in a frame turned by yaw."""
        c, s = np.cos(yaw), np.sin(yaw)
        turned = self.directions @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
        light = self.ambient + np.maximum(normals @ turned.T, 0) @ self.strengths
        return np.clip(colours * light[:, None], 0, 255).astype(np.uint8)

    def fallen(self, points: Array) -> Array:
        """(P, 3) where the shadows of points (P, 3) fall."""
        shadows = points.copy()
        shadows[:, :2] += points[:, 2:] * self.shadow_shift
        shadows[:, 2] = SHADOW_HEIGHT
        return shadows


@dataclass(frozen=True)
class _Body:
    points: Array  # (3F, 3) in the object's frame, metres
    normals: Array  # (F, 3)
    colours: Array  # (F, 3)


def _body(obj: TownObject, phase: int) -> _Body:
    mesh = body(obj.look.shape, phase)[0]
    size = np.asarray(obj.look.size)
    normals = mesh.normals[::3] / size
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    points = (mesh.points + np.array([0, 0, 0.5])) * size
    return _Body(points, normals, mesh.painted(obj.look.paints)[::3].astype(np.float64))


class Bodies:
    """All objects of a plan, ready to be drawn at any time."""

    def __init__(self, plan: ScenePlan, light: Light) -> None:
        self._objects = plan.objects
        self._light = light
        self._sizes = np.array([o.look.size for o in plan.objects]).reshape(-1, 3)
        self._bodies = [
            [_body(o, phase) for phase in (range(STRIDE_PHASES) if o.look.shape == "walker" else (-1,))]
            for o in plan.objects
        ]
        ticks = len(plan.town.ego.yaw)
        self._tracks = np.array([np.c_[o.track.xy, o.track.yaw] for o in plan.objects]).reshape(-1, ticks, 3)

    def poses(self, t: float) -> Array:
        """(n, 3) x, y, yaw of every object: Track.pose of all at once."""
        index, share = tick_at(t, self._tracks.shape[1])
        return self._tracks[:, index] * (1 - share) + self._tracks[:, index + 1] * share

    def in_view(self, t: float, town_to_camera: Array, slope: float) -> list[int]:
        """Which objects a camera may see; slope = image width over focal length."""
        centres = np.c_[self.poses(t)[:, :2], self._sizes[:, 2] / 2]
        x, _, z = (centres @ town_to_camera[:3, :3].T + town_to_camera[:3, 3]).T
        reach = np.linalg.norm(self._sizes, axis=1) / 2 + 4.0  # shadows fall beyond the body
        seen = (z > -reach) & (z < VIEW) & (np.abs(x) < 0.55 * slope * np.maximum(z, 0) + 1.5 * reach)
        return [int(i) for i in np.flatnonzero(seen)]

    def shape_at(self, number: int, t: float) -> _Body:
        """The body of one object, in the pose of its stride at t."""
        forms = self._bodies[number]
        if len(forms) == 1:
            return forms[0]
        walked = self._objects[number].track.speed_at(t) * (t + 10.0) / STRIDE_LENGTH
        return forms[int(walked * STRIDE_PHASES) % STRIDE_PHASES]

    def assemble(self, numbers: list[int], t: float) -> tuple[Array, NDArray[np.uint8], NDArray[np.uint8]]:
        """Corners (P, 3) in the town frame, their colours (P, 3) and identities (P, 3: low byte, high byte, 0)."""
        points, colours, identities = (
            [np.zeros((0, 3))],
            [np.zeros((0, 3), np.uint8)],
            [np.zeros((0, 3), np.uint8)],
        )
        poses = self.poses(t)
        for number in numbers:
            form = self.shape_at(number, t)
            x, y, yaw = poses[number]
            c, s = np.cos(yaw), np.sin(yaw)
            points.append(form.points @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1.0]]) + (x, y, 0))
            colours.append(np.repeat(self._light.shaded(form.colours, form.normals, yaw), 3, 0))
            identities.append(
                np.tile(
                    np.array([(number + 1) % 256, (number + 1) // 256, 0], np.uint8), (len(form.points), 1)
                )
            )
        return np.concatenate(points), np.concatenate(colours), np.concatenate(identities)
