# SPDX-License-Identifier: Apache-2.0
"""Meshes of the four-wheeled classes. x forward, standing on z = 0; every front differs from its rear:
white lamps, windscreen and dark grille ahead; red lamps and a light number plate behind."""

from __future__ import annotations

from qdbev_train.synthetic.mesh import PAINT, PAINT2, Mesh, MeshBuilder

GLASS = (38, 48, 62)
SCREEN = (70, 92, 118)
DARK = (28, 28, 30)
TYRE = (22, 22, 24)
LAMP = (255, 255, 235)
RED = (235, 16, 16)
AMBER = (255, 150, 10)
PLATE = (235, 225, 150)
STEEL = (120, 122, 126)
PROUD = 0.015  # metres that wheels, glass and stripes stand out of a body's side


def _wheels(
    m: MeshBuilder, xs: tuple[float, ...], half_width: float, radius: float, width: float = 0.24
) -> None:
    for x in xs:
        for side in (-1, 1):
            m.disc((x, side * (half_width + PROUD - width / 2), radius), radius, width, TYRE)


def _lamps(
    m: MeshBuilder,
    x: float,
    half_width: float,
    z: float,
    size: tuple[float, float],
    colour: tuple[float, float, float],
) -> None:
    """Two lamps at the corners of a face; the sign of x says which face they stand out of."""
    depth = 0.03 if x > 0 else -0.03
    width, height = size
    for side in (-1, 1):
        y = sorted((side * half_width, side * (half_width - width)))
        m.box((min(x, x - depth), max(x, x - depth)), (y[0], y[1]), (z, z + height), colour)


def car(style: str) -> tuple[Mesh, tuple[float, float, float]]:
    """A car and its nominal (length, width, height); style: sedan, hatch, suv or van."""
    length, width, height = {
        "sedan": (4.6, 1.85, 1.45),
        "hatch": (4.0, 1.78, 1.5),
        "suv": (4.7, 1.95, 1.75),
        "van": (5.0, 1.98, 2.0),
    }[style]
    # belt line, roof from/to and its base from/to, as shares of half the length
    belt, roof, base = {
        "sedan": (0.9, (-0.45, 0.1), (-0.75, 0.45)),
        "hatch": (0.92, (-0.82, 0.12), (-0.97, 0.5)),
        "suv": (1.05, (-0.86, 0.15), (-0.97, 0.45)),
        "van": (1.1, (-0.95, 0.42), (-0.98, 0.74)),
    }[style]
    m = MeshBuilder()
    a, w = length / 2, width / 2
    floor = 0.22 if style != "suv" else 0.3
    m.prism(
        [(-a + 0.03, floor), (a - 0.03, floor), (a - 0.03, belt * 0.72), (a * 0.6, belt), (-a + 0.03, belt)],
        (-w, w),
        PAINT,
    )
    x0, x1, b0, b1 = roof[0] * a, roof[1] * a, base[0] * a, base[1] * a
    inner = w * 0.78
    m.taper((b0, b1, -w * 0.94, w * 0.94), (x0, x1, -inner, inner), (belt, height - 0.04), GLASS)
    m.box((x0, x1), (-inner, inner), (height - 0.05, height), PAINT)
    # a lighter windscreen, a hair in front of the glass
    rise = height - 0.04 - belt
    z0, z1 = belt + 0.03, height - 0.08
    xa, xb = (b1 + (x1 - b1) * (z - belt) / rise + 0.012 for z in (z0, z1))
    m.taper(
        (xa - 0.02, xa, -w * 0.82, w * 0.82), (xb - 0.02, xb, -inner * 0.93, inner * 0.93), (z0, z1), SCREEN
    )
    for low, high in (((x0 + x1) / 2, (x0 + x1) / 2 - 0.04), (b1 - 0.08, x1 - 0.08)):  # pillars
        m.taper(
            (low - 0.06, low + 0.05, -w * 0.95, w * 0.95),
            (high - 0.06, high + 0.05, -inner * 1.01, inner * 1.01),
            (belt, height - 0.05),
            PAINT,
        )
    _wheels(m, (-a * 0.6, a * 0.62), w, 0.33 if style != "suv" else 0.38)
    m.box((a - 0.05, a), (-w * 0.55, w * 0.55), (floor + 0.08, belt * 0.55), DARK)
    _lamps(m, a, w * 0.96, belt * 0.52, (0.42, 0.17), LAMP)
    _lamps(m, -a, w * 0.97, belt * 0.66, (0.36, 0.24), RED)
    m.box((-a, -a + 0.04), (-0.27, 0.27), (belt * 0.5, belt * 0.66), PLATE)
    m.box((-a, -a + 0.04), (-w * 0.95, w * 0.95), (floor, floor + 0.16), DARK)
    return m.build(), (length, width + 2 * PROUD, height)


def truck(style: str) -> tuple[Mesh, tuple[float, float, float]]:
    """A lorry and its nominal size; style: box, tipper or flatbed."""
    length, width, height = {"box": (7.6, 2.5, 3.3), "tipper": (6.8, 2.5, 3.0), "flatbed": (7.2, 2.4, 2.8)}[
        style
    ]
    m = MeshBuilder()
    a, w = length / 2, width / 2
    cab = a - 1.9
    roof = min(height, 2.75)
    m.box((-a + 0.05, a - 0.3), (-0.5, 0.5), (0.5, 0.9), DARK)
    m.prism(
        [(cab, 0.45), (a - 0.04, 0.45), (a - 0.04, 1.45), (a - 0.35, roof - 0.05), (cab, roof)],
        (-w * 0.95, w * 0.95),
        PAINT,
    )
    m.prism(
        [(a - 0.04, 1.5), (a - 0.01, 1.5), (a - 0.27, 2.4), (a - 0.3, 2.4)], (-w * 0.86, w * 0.86), SCREEN
    )
    for side in (-1, 1):
        y = sorted((side * w * 0.95, side * (w * 0.95 + 0.02)))
        m.box((cab + 0.4, a - 0.45), (y[0], y[1]), (1.5, 2.3), GLASS)
        y = sorted((side * w * 0.93, side * w))
        m.box((a - 0.3, a - 0.15), (y[0], y[1]), (1.5, 2.2), DARK)  # mirrors
    m.box((a - 0.05, a), (-w * 0.7, w * 0.7), (0.75, 1.3), DARK)
    _lamps(m, a, w * 0.93, 0.6, (0.45, 0.24), LAMP)
    if style == "box":
        m.box((-a + 0.03, cab - 0.15), (-w, w), (0.95, height), PAINT2)
        m.box((-a + 0.01, -a + 0.04), (-0.03, 0.03), (1.05, height - 0.1), DARK)
        m.box((-a + 0.3, cab - 0.5), (-w - PROUD, w + PROUD), (1.9, 2.3), PAINT)
    elif style == "tipper":
        m.prism(
            [(-a + 0.03, 1.05), (cab - 0.3, 1.05), (cab - 0.15, height - 0.2), (-a + 0.03, height - 0.5)],
            (-w, w),
            PAINT2,
        )
        m.box((cab - 0.35, cab + 0.7), (-w * 0.8, w * 0.8), (height - 0.2, height), PAINT2)
        for x in (-a + 1.0, -a + 2.2, -a + 3.4):
            m.box((x, x + 0.14), (-w - PROUD, w + PROUD), (1.05, height - 0.55), DARK)
    else:
        m.box((-a + 0.03, cab - 0.15), (-w, w), (0.95, 1.2), DARK)
        m.box((cab - 0.3, cab - 0.15), (-w, w), (1.2, height), STEEL)
        m.box((-a + 0.6, -a + 2.3), (-w * 0.8, w * 0.8), (1.2, 2.0), PAINT2)
        m.box((-a + 2.5, cab - 0.6), (-w * 0.7, w * 0.7), (1.2, 1.8), (150, 110, 70))
    _wheels(m, (-a + 1.0, -a + 2.1, a - 1.0), w, 0.5, 0.35)
    m.box((-a, -a + 0.05), (-w * 0.95, w * 0.95), (0.55, 0.75), (215, 215, 215))
    _lamps(m, -a, w * 0.97, 0.72, (0.5, 0.28), RED)
    return m.build(), (length, width + 2 * PROUD, height)


def bus() -> tuple[Mesh, tuple[float, float, float]]:
    """A city bus with a window band, doors on the right and a lit destination sign ahead."""
    length, width, height = 11.5, 2.6, 3.3
    m = MeshBuilder()
    a, w = length / 2, width / 2
    m.prism(
        [
            (-a + 0.03, 0.3),
            (a - 0.05, 0.3),
            (a - 0.05, 1.3),
            (a - 0.25, height - 0.1),
            (-a + 0.03, height - 0.1),
        ],
        (-w, w),
        PAINT,
    )
    m.box((-a + 0.2, a - 0.4), (-w * 0.9, w * 0.9), (height - 0.12, height), PAINT2)
    for side in (-1, 1):  # the glass and the stripe must stand out of the body
        y = sorted((side * w * 0.995, side * (w + PROUD)))
        x = -a + 0.4
        while x + 1.3 < a - 0.5:
            m.box((x, x + 1.2), (y[0], y[1]), (1.5, 2.5), GLASS)
            x += 1.38
        m.box((-a + 0.1, a - 0.2), (y[0], y[1]), (0.75, 1.05), PAINT2)
    for x in (a - 1.5, -0.4):
        m.box((x, x + 1.1), (-w - PROUD, -w + 0.05), (0.4, 2.5), (60, 75, 90))
    m.prism([(a - 0.06, 1.2), (a, 1.2), (a - 0.17, 2.65), (a - 0.23, 2.65)], (-w * 0.93, w * 0.93), SCREEN)
    m.prism(
        [(a - 0.22, 2.7), (a - 0.165, 2.7), (a - 0.2, 3.05), (a - 0.26, 3.05)], (-w * 0.6, w * 0.6), AMBER
    )
    _lamps(m, a, w * 0.92, 0.62, (0.5, 0.26), LAMP)
    m.box((-a, -a + 0.05), (-w * 0.7, w * 0.7), (0.5, 1.3), DARK)
    m.box((-a, -a + 0.05), (-w * 0.6, w * 0.6), (1.9, 2.6), GLASS)
    _lamps(m, -a, w * 0.98, 0.9, (0.3, 0.75), RED)
    _wheels(m, (-a + 2.6, a - 2.7), w, 0.5, 0.3)
    return m.build(), (length, width + 2 * PROUD, height)


def trailer() -> tuple[Mesh, tuple[float, float, float]]:
    """A semi-trailer: drawbar and bare legs ahead, three axles and a chevron board behind."""
    length, width, height = 10.5, 2.5, 3.7
    m = MeshBuilder()
    a, w = length / 2, width / 2
    m.box((-a + 0.03, a - 1.2), (-w, w), (1.2, height), PAINT2)
    m.box((a - 1.22, a - 1.15), (-w * 0.85, w * 0.85), (1.5, height - 0.4), DARK)
    for x in range(6):
        m.box(
            (-a + 0.5 + x * 1.45, -a + 0.58 + x * 1.45), (-w - PROUD, w + PROUD), (1.2, height - 0.05), STEEL
        )
    m.box((-a + 0.05, a - 1.0), (-0.45, 0.45), (0.85, 1.2), DARK)
    m.tube((a - 1.2, 0.5, 1.0), (a - 0.05, 0.0, 0.75), 0.08, STEEL)
    m.tube((a - 1.2, -0.5, 1.0), (a - 0.05, 0.0, 0.75), 0.08, STEEL)
    m.box((a - 0.25, a), (-0.15, 0.15), (0.6, 0.9), AMBER)
    for side in (-1, 1):
        m.box((a - 2.6, a - 2.4), (side * 0.8 - 0.08, side * 0.8 + 0.08), (0.0, 1.2), STEEL)
    _wheels(m, (-a + 1.0, -a + 2.2, -a + 3.4), w, 0.5, 0.35)
    for i in range(8):  # chevron board
        y = -w * 0.95 + i * w * 0.2375
        m.box((-a, -a + 0.05), (y, y + w * 0.2375), (0.95, 1.35), RED if i % 2 else (250, 240, 120))
    _lamps(m, -a, w * 0.97, 0.6, (0.5, 0.28), RED)
    m.box((-a + 0.015, -a + 0.04), (-0.03, 0.03), (1.4, height - 0.1), DARK)
    return m.build(), (length, width + 2 * PROUD, height)


def construction(style: str) -> tuple[Mesh, tuple[float, float, float]]:
    """A yellow machine with its arm and bucket ahead; style: excavator or loader."""
    m = MeshBuilder()
    yellow = PAINT
    if style == "excavator":
        length, width, height = 7.4, 2.6, 3.4
        back = -length / 2
        for side in (-1, 1):
            y = sorted((side * 1.3, side * 0.75))
            m.prism(
                [
                    (back + 0.5, 0.0),
                    (back + 3.9, 0.0),
                    (back + 4.3, 0.45),
                    (back + 3.9, 0.9),
                    (back + 0.5, 0.9),
                    (back + 0.1, 0.45),
                ],
                (y[0], y[1]),
                DARK,
            )
        m.box((back + 0.1, back + 3.4), (-1.2, 1.2), (1.0, 1.95), yellow)
        m.box((back + 0.04, back + 0.5), (-1.25, 1.25), (1.0, 2.1), (50, 50, 55))
        m.taper(
            (back + 1.9, back + 3.7, 0.15, 1.2),
            (back + 2.0, back + 3.3, 0.2, 1.15),
            (1.1, 2.9),
            GLASS,
            yellow,
        )
        m.box((back + 1.85, back + 3.35), (0.12, 1.22), (2.85, 2.98), yellow)
        m.tube((back + 3.2, -0.2, 1.6), (back + 4.9, -0.2, 3.25), 0.28, yellow)
        m.box((back + 4.75, back + 5.1), (-0.4, 0.0), (3.0, height), yellow)
        m.tube((back + 4.9, -0.2, 3.2), (back + 6.6, -0.2, 1.2), 0.22, yellow)
        m.prism(
            [(back + 6.1, 0.35), (back + 7.4, 0.1), (back + 7.3, 1.1), (back + 6.4, 1.3)],
            (-0.75, 0.35),
            (70, 70, 75),
        )
        m.box((back + 0.0, back + 0.06), (-0.9, 0.9), (1.1, 1.3), RED)
        m.box((back, back + 0.03), (-0.5, 0.5), (1.35, 1.85), DARK)
    else:
        length, width, height = 6.6, 2.5, 3.1
        back = -length / 2
        m.box((back + 0.05, back + 2.3), (-1.0, 1.0), (0.9, 1.9), yellow)
        m.box((back + 0.04, back + 0.5), (-1.15, 1.15), (0.7, 1.75), (50, 50, 55))
        m.taper(
            (back + 1.9, back + 3.3, -0.75, 0.75),
            (back + 2.0, back + 3.1, -0.7, 0.7),
            (1.5, 3.0),
            GLASS,
            yellow,
        )
        m.box((back + 1.9, back + 3.2), (-0.8, 0.8), (2.95, height), yellow)
        m.box((back + 2.3, back + 4.6), (-0.6, 0.6), (0.8, 1.5), yellow)
        for side in (-1, 1):
            m.tube((back + 3.9, side * 0.55, 1.5), (back + 5.6, side * 0.55, 0.65), 0.14, yellow)
        m.prism(
            [(back + 5.3, 0.1), (back + 6.6, 0.05), (back + 6.3, 0.5), (back + 5.7, 1.3), (back + 5.4, 1.2)],
            (-1.25, 1.25),
            (75, 75, 80),
        )
        _wheels(m, (back + 1.2, back + 4.3), 1.2, 0.75, 0.5)
        _lamps(m, back, 1.1, 1.35, (0.3, 0.25), RED)
        m.tube((back + 1.2, -0.6, 1.8), (back + 1.2, -0.6, 2.6), 0.08, DARK)
    for lamp in (0.25, 0.95) if style == "excavator" else (-0.6, 0.4):
        m.box((back + 3.2, back + 3.34), (lamp, lamp + 0.2), (2.72, 2.95), LAMP)
    return m.build(), (length, width, height)
