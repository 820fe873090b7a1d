# SPDX-License-Identifier: Apache-2.0
"""Meshes of two-wheelers, people, cones and barriers. x forward, standing on z = 0."""

from __future__ import annotations

import numpy as np

from qdbev_train.synthetic.mesh import PAINT, PAINT2, Mesh, MeshBuilder
from qdbev_train.synthetic.vehicles import AMBER, DARK, LAMP, RED, STEEL, TYRE

SKIN = (215, 165, 135)
HAIR = (45, 32, 25)
ORANGE = (255, 95, 15)
WHITE = (245, 245, 240)


def _rider(
    m: MeshBuilder,
    hip: tuple[float, float],
    shoulder: tuple[float, float],
    hands: tuple[float, float],
    feet: tuple[float, float],
    head: float,
    helmet: tuple[float, float, float] | None,
) -> None:
    """A sitting person; every pair is (x, z)."""
    m.tube((hip[0], 0, hip[1]), (shoulder[0], 0, shoulder[1]), 0.2, PAINT2, sides=6, end_radius=0.23)
    for side in (-1, 1):
        y = side * 0.2
        knee = ((hip[0] + feet[0]) / 2 + 0.2, (hip[1] + feet[1]) / 2 + 0.08)
        m.tube((hip[0], y * 0.6, hip[1]), (knee[0], y, knee[1]), 0.09, (45, 50, 75))
        m.tube((knee[0], y, knee[1]), (feet[0], y, feet[1]), 0.075, (45, 50, 75))
        m.tube((shoulder[0], y * 1.1, shoulder[1] - 0.05), (hands[0], y * 1.35, hands[1]), 0.06, PAINT2)
    z = shoulder[1] + 0.17
    m.blob((shoulder[0] + 0.08, 0, head - 0.15), (0.12, 0.11, 0.15), SKIN)
    m.blob((shoulder[0] + 0.02, 0, max(z, head - 0.13)), (0.13, 0.13, 0.13), helmet or HAIR)


def motorcycle(rider: bool) -> tuple[Mesh, tuple[float, float, float]]:
    """A motorcycle; head lamp and fork ahead, red lamp and top box behind."""
    length, width, height = 2.1, 0.85, (1.6 if rider else 1.2)
    m = MeshBuilder()
    for x in (-0.72, 0.72):
        m.disc((x, 0, 0.32), 0.32, 0.16, TYRE)
    m.box((-1.05, -0.98), (-0.05, 0.05), (0.6, 0.64), RED)  # full length
    m.tube((0.72, 0, 0.32), (0.42, 0, 1.0), 0.07, STEEL)
    m.prism(
        [(-0.5, 0.3), (0.45, 0.3), (0.62, 0.75), (0.3, 0.98), (-0.15, 0.8), (-0.5, 0.6)], (-0.16, 0.16), PAINT
    )
    m.box((-0.75, 0.0), (-0.15, 0.15), (0.7, 0.84), DARK)
    m.box((-1.0, -0.7), (-0.2, 0.2), (0.75, 1.08), PAINT)
    m.box((-1.05, -0.99), (-0.18, 0.18), (0.78, 0.98), RED)
    m.tube((0.38, -0.42, 1.05), (0.38, 0.42, 1.05), 0.035, DARK)
    m.taper((0.45, 0.8, -0.2, 0.2), (0.4, 0.5, -0.16, 0.16), (0.75, 1.2), PAINT)
    m.box((0.72, 0.82), (-0.14, 0.14), (0.78, 0.98), LAMP)
    m.box((0.98, 1.05), (-0.05, 0.05), (0.42, 0.5), PAINT)
    m.prism(
        [(0.55, 0.62), (0.95, 0.62), (1.05, 0.4), (1.05, 0.5), (0.9, 0.7), (0.6, 0.7)], (-0.08, 0.08), PAINT
    )
    if rider:
        _rider(m, (-0.3, 0.85), (-0.08, 1.35), (0.36, 1.08), (-0.1, 0.35), height, WHITE)
    return m.build(), (length, width, height)


def bicycle(rider: bool) -> tuple[Mesh, tuple[float, float, float]]:
    """A bicycle: thin frame, handlebar and white lamp ahead, red mudguard and bag behind."""
    length, width, height = 1.75, 0.6, (1.75 if rider else 1.1)
    m = MeshBuilder()
    for x in (-0.535, 0.535):
        m.disc((x, 0, 0.34), 0.34, 0.05, TYRE, hub=(170, 172, 178), sides=12)
    frame = [
        ((-0.535, 0.34), (-0.1, 0.3)),
        ((-0.1, 0.3), (-0.22, 0.88)),
        ((-0.22, 0.82), (0.38, 0.82)),
        ((-0.1, 0.3), (0.38, 0.8)),
        ((-0.535, 0.34), (-0.22, 0.8)),
        ((0.535, 0.34), (0.36, 1.02)),
    ]
    for a, b in frame:
        m.tube((a[0], 0, a[1]), (b[0], 0, b[1]), 0.04, PAINT)
    m.box((-0.36, -0.1), (-0.08, 0.08), (0.88, 0.95), DARK)
    m.tube((0.36, -0.3, 1.06), (0.36, 0.3, 1.06), 0.035, DARK)
    m.box((0.4, 0.48), (-0.06, 0.06), (0.85, 0.97), LAMP)
    m.box((-0.75, -0.42), (-0.18, 0.18), (0.62, 0.85), (120, 70, 40))
    m.box((-0.875, -0.8), (-0.06, 0.06), (0.35, 0.7), RED)
    m.box((0.83, 0.875), (-0.02, 0.02), (0.3, 0.36), TYRE)
    m.box((0.3, 0.36), (-0.03, 0.03), (1.06, 1.1), DARK)
    if rider:
        _rider(m, (-0.22, 0.95), (0.05, 1.42), (0.34, 1.08), (-0.08, 0.3), height, None)
    return m.build(), (length, width, height)


def pedestrian(phase: float, vest: bool = False) -> tuple[Mesh, tuple[float, float, float]]:
    """An adult; phase in [0, 1) is the point in the stride, negative = standing still."""
    size = (0.42, 0.62, 1.75) if phase < 0 else (0.7, 0.62, 1.75)
    m = MeshBuilder()
    swing = 0.0 if phase < 0 else 0.5 * np.sin(2 * np.pi * phase)
    for side in (-1, 1):
        y, reach = side * 0.1, side * swing
        knee = (0.42 * np.sin(reach) + 0.03, y, 0.88 - 0.42 * np.cos(reach))
        foot = (knee[0] + 0.4 * np.sin(reach * 0.8) - 0.03, y, 0.07)
        m.tube((0, y, 0.9), knee, 0.1, PAINT2, sides=5, end_radius=0.08)
        m.tube(knee, foot, 0.08, PAINT2, sides=5, end_radius=0.06)
        fx = float(np.clip(foot[0], -0.25, 0.15))
        m.box((fx - 0.08, fx + 0.18), (y - 0.055, y + 0.055), (0.0, 0.09), DARK)
        hand = (-0.3 * np.sin(reach) + 0.04, side * 0.27, 0.85)
        m.tube((0, side * 0.22, 1.4), hand, 0.06, PAINT, end_radius=0.05)
        m.blob(hand, (0.05, 0.04, 0.06), SKIN)
    m.taper((-0.11, 0.11, -0.17, 0.17), (-0.13, 0.13, -0.24, 0.24), (0.85, 1.46), PAINT)
    if vest:
        m.box((-0.135, 0.135), (-0.245, 0.245), (1.1, 1.2), (250, 250, 210))
    m.tube((0, 0, 1.44), (0.01, 0, 1.54), 0.06, SKIN)
    m.blob((0.025, 0, 1.62), (0.1, 0.085, 0.125), SKIN)
    m.blob((-0.02, 0, 1.65), (0.105, 0.1, 0.1), AMBER if vest else HAIR)
    return m.build(), size


def traffic_cone() -> tuple[Mesh, tuple[float, float, float]]:
    """An orange cone with two white bands on a dark base."""
    m = MeshBuilder()
    m.box((-0.2, 0.2), (-0.2, 0.2), (0.0, 0.05), (60, 35, 25))
    edges = np.linspace(0.05, 0.75, 6)
    for i, colour in enumerate((ORANGE, WHITE, ORANGE, WHITE, ORANGE)):
        z0, z1 = edges[i], edges[i + 1]
        m.tube(
            (0, 0, z0), (0, 0, z1), 0.16 - 0.18 * (z0 - 0.05), colour, 8, end_radius=0.16 - 0.18 * (z1 - 0.05)
        )
    return m.build(), (0.4, 0.4, 0.75)


def barrier(style: str) -> tuple[Mesh, tuple[float, float, float]]:
    """A road barrier 2.4 m wide across its x axis; style: board (red and white) or concrete."""
    length, width, height = 0.5, 2.4, 1.0
    m = MeshBuilder()
    if style == "concrete":
        grey = PAINT
        profile = [
            (-0.25, 0.0),
            (0.25, 0.0),
            (0.22, 0.15),
            (0.1, 0.45),
            (0.08, 1.0),
            (-0.08, 1.0),
            (-0.1, 0.45),
            (-0.22, 0.15),
        ]
        right = np.array([(x, -width / 2, z) for x, z in profile])
        left = np.array([(x, width / 2, z) for x, z in profile])
        m.hull(left, right, grey)
        for y in (-0.9, 0.0, 0.9):
            m.box((-0.11, 0.11), (y - 0.12, y + 0.12), (0.72, 0.88), (250, 190, 30))
    else:
        for side in (-1, 1):
            y = side * (width / 2 - 0.25)
            m.box((-0.25, 0.25), (y - 0.06, y + 0.06), (0.0, 0.1), DARK)
            m.box((-0.05, 0.05), (y - 0.05, y + 0.05), (0.1, 0.95), DARK)
        for z in (0.3, 0.7):
            for i in range(8):
                y = -width / 2 + i * width / 8
                m.box((-0.07, 0.07), (y, y + width / 8), (z, z + 0.3), RED if i % 2 else WHITE)
        m.blob((0, 0, 0.95), (0.06, 0.06, 0.05), AMBER)
    return m.build(), (length, width, height)
