# SPDX-License-Identifier: Apache-2.0
"""Low-poly meshes built from a few primitives.

A mesh is a soup of flat-shaded triangles: every face has its own corners, normal and colour. Colours are RGB in 0..255;
a negative red component names a paint slot (PAINT, PAINT2, ...) that each object fills with its own colour.
Object frame: x forward, y left, z up, metres.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Colour = tuple[float, float, float]
PAINT: Colour = (-1, 0, 0)
PAINT2: Colour = (-2, 0, 0)


@dataclass(frozen=True)
class Mesh:
    """Triangles with per-corner attributes; corner 3i, 3i+1, 3i+2 form triangle i."""

    points: Array  # (3T, 3)
    normals: Array  # (3T, 3) unit
    colours: Array  # (3T, 3), negative red = paint slot

    def painted(self, paints: tuple[Colour, ...]) -> NDArray[np.uint8]:
        """(3T, 3) corner colours with the paint slots filled."""
        colours = self.colours.copy()
        for slot, paint in enumerate(paints):
            colours[self.colours[:, 0] == -1 - slot] = paint
        return np.clip(colours, 0, 255).astype(np.uint8)


@dataclass
class MeshBuilder:
    """Collects primitives; `build` turns them into one Mesh."""

    triangles: list[Array] = field(default_factory=list)  # each (n, 3, 3)
    colours: list[Array] = field(default_factory=list)  # each (n, 3)

    def add(self, triangles: Array, colour: Colour | Array) -> None:
        """triangles (n, 3, 3), counter-clockwise from outside; one colour or one per triangle."""
        self.triangles.append(triangles)
        self.colours.append(np.broadcast_to(np.asarray(colour, dtype=np.float64), (len(triangles), 3)))

    def quad(self, corners: Array, colour: Colour) -> None:
        """A flat quadrilateral, corners (4, 3) counter-clockwise from its front."""
        self.add(np.stack([corners[[0, 1, 2]], corners[[0, 2, 3]]]), colour)

    def hull(self, bottom: Array, top: Array, colour: Colour, top_colour: Colour | None = None) -> None:
        """A solid between two polygons of equal corner count, (n, 3) each, counter-clockwise seen from above."""
        n = len(bottom)
        nxt = np.roll(np.arange(n), -1)
        sides = np.concatenate(
            [np.stack([bottom, bottom[nxt], top[nxt]], 1), np.stack([bottom, top[nxt], top], 1)]
        )
        self.add(sides, colour)
        fan = np.arange(1, n - 1)
        self.add(np.stack([np.repeat(top[:1], n - 2, 0), top[fan], top[fan + 1]], 1), top_colour or colour)
        self.add(np.stack([np.repeat(bottom[:1], n - 2, 0), bottom[fan + 1], bottom[fan]], 1), colour)

    def box(
        self, x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], colour: Colour
    ) -> None:
        """An axis-aligned box given by its ranges."""
        self.hull(_rect(x, y, z[0]), _rect(x, y, z[1]), colour)

    def taper(
        self,
        base: tuple[float, float, float, float],
        top: tuple[float, float, float, float],
        z: tuple[float, float],
        colour: Colour,
        top_colour: Colour | None = None,
    ) -> None:
        """A box with sloped sides; base and top are (x0, x1, y0, y1)."""
        self.hull(_rect(base[:2], base[2:], z[0]), _rect(top[:2], top[2:], z[1]), colour, top_colour)

    def prism(self, profile: list[tuple[float, float]], y: tuple[float, float], colour: Colour) -> None:
        """A convex side view (x, z), counter-clockwise seen from the right (-y), drawn out over y."""
        xz = np.asarray(profile, dtype=np.float64)
        right = np.stack([xz[:, 0], np.full(len(xz), y[0]), xz[:, 1]], 1)
        left = right.copy()
        left[:, 1] = y[1]
        self.hull(left, right, colour)

    def disc(
        self,
        centre: tuple[float, float, float],
        radius: float,
        width: float,
        colour: Colour,
        hub: Colour = (120, 120, 125),
        sides: int = 12,
    ) -> None:
        """A wheel: a cylinder along y with hub-coloured faces."""
        angle = np.linspace(0, 2 * np.pi, sides, endpoint=False)
        ring = np.stack([np.cos(angle) * radius, np.zeros(sides), np.sin(angle) * radius], 1) + centre
        half = np.array([0, width / 2, 0])
        self.hull(ring + half, ring - half, colour)
        inner = (ring - centre) * 0.55 + centre
        fan = np.arange(1, sides - 1)
        for sign in (-1, 1):
            face = inner + sign * (half + np.array([0, 0.004, 0]))
            corners = (fan, fan + 1) if sign < 0 else (fan + 1, fan)
            self.add(
                np.stack([np.repeat(face[:1], sides - 2, 0), face[corners[0]], face[corners[1]]], 1), hub
            )

    def tube(
        self,
        start: tuple[float, float, float],
        end: tuple[float, float, float],
        radius: float,
        colour: Colour,
        sides: int = 4,
        end_radius: float | None = None,
    ) -> None:
        """A limb, pipe, pole or cone between two points."""
        a, b = np.asarray(start, dtype=np.float64), np.asarray(end, dtype=np.float64)
        axis = (b - a) / np.linalg.norm(b - a)
        u = np.cross(axis, (0, 1, 0) if abs(axis[1]) < 0.9 else (1, 0, 0))
        u = u / np.linalg.norm(u)
        angle = np.linspace(0, 2 * np.pi, sides, endpoint=False) + np.pi / sides
        ring = np.cos(angle)[:, None] * u + np.sin(angle)[:, None] * np.cross(axis, u)
        self.hull(a + ring * radius, b + ring * (radius if end_radius is None else end_radius), colour)

    def blob(
        self, centre: tuple[float, float, float], radii: tuple[float, float, float], colour: Colour | Array
    ) -> None:
        """An ellipsoid of 8 x 4 facets (heads, tree crowns)."""
        self.add(_SPHERE * np.asarray(radii) + np.asarray(centre), colour)

    def build(self) -> Mesh:
        """All primitives as one flat-shaded mesh."""
        triangles = np.concatenate(self.triangles)
        normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
        length = np.linalg.norm(normals, axis=1, keepdims=True)
        keep = length[:, 0] > 1e-12  # cones have collapsed faces
        triangles, normals = triangles[keep], normals[keep] / length[keep]
        colours = np.concatenate(self.colours)[keep]
        return Mesh(triangles.reshape(-1, 3), np.repeat(normals, 3, 0), np.repeat(colours, 3, 0))


def _rect(x: tuple[float, ...], y: tuple[float, ...], z: float) -> Array:
    return np.array([[x[0], y[0], z], [x[1], y[0], z], [x[1], y[1], z], [x[0], y[1], z]], dtype=np.float64)


def _unit_sphere(rings: int = 5, sides: int = 8) -> Array:
    """(n, 3, 3) triangles of a coarse unit sphere."""
    polar = np.linspace(0, np.pi, rings + 1)
    around = np.linspace(0, 2 * np.pi, sides, endpoint=False)
    grid = np.stack(
        [
            np.sin(polar)[:, None] * np.cos(around),
            np.sin(polar)[:, None] * np.sin(around),
            np.repeat(np.cos(polar)[:, None], sides, 1),
        ],
        -1,
    )
    faces = []
    for i in range(rings):
        for j in range(sides):
            k = (j + 1) % sides
            if i > 0:
                faces.append([grid[i, j], grid[i + 1, j], grid[i, k]])
            if i < rings - 1:
                faces.append([grid[i, k], grid[i + 1, j], grid[i + 1, k]])
    return np.asarray(faces)


_SPHERE = _unit_sphere()


def to_unit_box(mesh: Mesh, size: tuple[float, float, float]) -> Mesh:
    """The mesh, standing on z = 0 and centred in x and y with its nominal size (length, width, height) in metres,
    scaled into the unit cube around the origin: an object's matrix scales it to its own size."""
    scale = np.asarray(size, dtype=np.float64)
    points = mesh.points / scale - (0, 0, 0.5)
    normals = mesh.normals * scale  # a normal scales with the inverse of what points do
    return Mesh(points, normals / np.linalg.norm(normals, axis=1, keepdims=True), mesh.colours)
