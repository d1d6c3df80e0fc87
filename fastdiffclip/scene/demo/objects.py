"""What stands in the built-in suburb: cars, houses, halls, car parks, schools, ponds, trees.

Each function paints one object; positions and sizes are in metres, x east and y south.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from fastdiffclip.scene.demo import spectra as m
from fastdiffclip.scene.demo.canvas import EAST, SOUTH, Canvas, Draws, Heading


class Kind(IntEnum):
    """Class values of the label map; 0 is unlabelled."""

    HEALTHY = 1
    STRESSED = 2
    TURF = 3
    TREES = 4
    SOIL = 5
    WATER = 6
    TILE_ROOF = 7
    METAL_ROOF = 8
    FLAT_ROOF = 9
    CONCRETE = 10
    ROAD = 11
    CAR_PARK = 12
    TRACK = 13
    RAILWAY = 14


def share(draws: Draws, first: float, second: float) -> tuple[float, float]:
    """Variation of one object: p up to ``first``, q up to ``second``, together below 1."""
    p = draws.uniform(0.0, first)
    return p, draws.uniform(0.0, second) * (1.0 - p)


def lawn(canvas: Canvas, x: float, y: float, length: float, width: float, offset: float) -> None:
    """Shift the stress of the grass that is already there: one owner waters, the next does not."""
    area = canvas.box(x, y, length, width)
    stress = np.clip(canvas.p[area.at] + offset, 0.0, 1.0)
    vigour = np.minimum(canvas.q[area.at], 1.0 - stress)
    canvas.paint(area, m.GRASS, Kind.HEALTHY, p=stress, q=vigour, where=canvas.material[area.at] == m.GRASS)


def car(canvas: Canvas, draws: Draws, x: float, y: float, heading: Heading) -> None:
    """A car 4.5 m long; the class underneath stays."""
    material = (m.CAR_GREY, m.CAR_GREY, m.CAR_GREY, m.CAR_BLUE, m.CAR_RED)[int(draws.uniform(0.0, 5.0))]
    p, q = share(draws, 1.0, 1.0)
    body = canvas.box(x, y, 4.5, 1.9, heading)
    canvas.paint(body, material, p=p, q=q, gain=draws.uniform(0.7, 1.1), height=1.2 + 0.4 * (np.abs(body.u) < 1.3))


def gable(canvas: Canvas, draws: Draws, x: float, y: float, length: float, width: float, heading: Heading) -> None:
    """Tiled roof with its ridge along the heading."""
    roof = canvas.box(x, y, length, width, heading)
    p, q = share(draws, 0.7, 0.5)
    eaves, pitch = draws.uniform(2.9, 5.6), draws.uniform(0.38, 0.62)
    height = eaves + pitch * (0.5 * width - np.abs(roof.v))
    canvas.paint(roof, m.TILE, Kind.TILE_ROOF, p=p, q=q, gain=draws.uniform(0.88, 1.12), height=height)


def house(canvas: Canvas, draws: Draws, x: float, front: float, inward: float, plot: float, depth: float) -> None:
    """House, drive, terrace, sometimes a car, a pool or a shed, on a plot that begins at y = ``front``.

    ``inward`` is +1 where the street lies to the north of the plot and -1 where it lies to the south.
    """
    length, width = draws.uniform(10.5, 12.5), draws.uniform(9.0, 12.0)
    setback, side = draws.uniform(6.0, 9.0), 1.0 if draws.uniform() < 0.5 else -1.0
    drive = canvas.box(x + side * (0.5 * plot - 2.4), front + inward * 0.5 * (setback + 4), 3.6, setback + 10.0)
    canvas.paint(drive, m.CONCRETE, Kind.CONCRETE, p=draws.uniform(0.0, 0.8), q=draws.uniform(0.0, 0.2), height=0.05)
    y = front + inward * (setback + 0.5 * width)
    terrace = canvas.box(x - side * 2.0, y + inward * (0.5 * width + 2.0), 6.0, 4.0)
    canvas.paint(terrace, m.CONCRETE, Kind.CONCRETE, q=draws.uniform(0.0, 0.9), height=0.1)
    heading = (1.0, draws.uniform(-0.09, 0.09))
    if draws.uniform() < 0.3:
        heading, length, width = (-heading[1], 1.0), width + 2.0, length - 2.5
    gable(canvas, draws, x - side * 0.8, y, length, width, heading)
    if draws.uniform() < 0.55:
        car(canvas, draws, x + side * (0.5 * plot - 2.4), front + inward * draws.uniform(2.0, setback), SOUTH)
    garden = front + inward * (depth - draws.uniform(4.0, 7.0))
    if draws.uniform() < 0.18:
        canvas.paint(canvas.box(x + side * 3.0, garden, 8.0, 4.2), m.POOL, 0, p=draws.uniform(0.0, 0.6), height=0.0)
    elif draws.uniform() < 0.3:
        canvas.paint(canvas.box(x + side * 4.5, garden, 4.0, 3.2), m.METAL, 0, p=draws.uniform(0, 0.7), height=2.4)


def school(canvas: Canvas, draws: Draws, x: float, y: float, straight: float, radius: float, ring: float) -> None:
    """A running track round a pitch of synthetic turf, its two ends in grass."""
    inner = radius - ring
    p, q = share(draws, 0.8, 0.6)
    canvas.paint(canvas.oval(x, y, straight, radius), m.TRACK, Kind.TRACK, p=p, q=q, height=0.05)
    lanes = canvas.oval(x, y, straight, inner + 0.5 * ring + 0.35, inner + 0.5 * ring - 0.35)
    canvas.paint(lanes, m.TRACK, p=p, q=q, gain=1.25)
    canvas.paint(canvas.oval(x, y, straight, inner), m.GRASS, Kind.HEALTHY, p=0.15, q=0.3, height=0.0)
    pitch = canvas.oval(x, y, straight, inner - 1.2)
    length = 0.5 * straight + 0.45 * inner
    p, q = share(draws, 0.8, 0.7)
    canvas.paint(pitch, m.TURF, Kind.TURF, p=p, q=q, height=0.04, where=np.abs(pitch.u) < length)
    stripes = (np.abs(pitch.u) < 0.35) | (np.abs(np.abs(pitch.u) - length + 1.0) < 0.35)
    canvas.paint(pitch, m.PAINT, p=0.5, gain=0.55, where=stripes & (np.abs(pitch.u) < length))


def flat_roof(canvas: Canvas, draws: Draws, x: float, y: float, length: float, width: float, tall: float) -> None:
    """Gravel or bitumen roof with a parapet and a few plant boxes."""
    roof = canvas.box(x, y, length, width)
    p, q = share(draws, 0.6, 0.4)
    rim = (np.abs(roof.u) > 0.5 * length - 1.0) | (np.abs(roof.v) > 0.5 * width - 1.0)
    canvas.paint(roof, m.FLAT_ROOF, Kind.FLAT_ROOF, p=p, q=q, gain=draws.uniform(0.9, 1.1), height=tall + 0.6 * rim)
    for _ in range(int(length * width / 260.0)):
        at_x, at_y = draws.uniform(-0.4, 0.4) * length, draws.uniform(-0.38, 0.38) * width
        box = canvas.box(x + at_x, y + at_y, 3.0, 2.2)
        canvas.paint(box, m.METAL, q=0.3, gain=0.9, height=tall + 1.8)


def hall(
    canvas: Canvas, draws: Draws, x: float, y: float, length: float, width: float, heading: Heading = EAST
) -> None:
    """Industrial hall: low gabled sheet-metal roof, some with rows of skylights."""
    roof = canvas.box(x, y, length, width, heading)
    p = 0.95 * draws.uniform() ** 2  # mostly bare metal, now and then fully painted
    q = draws.uniform(0.0, 0.35) * (1.0 - p)
    height = draws.uniform(6.5, 10.5) + 0.09 * (0.5 * width - np.abs(roof.v))
    canvas.paint(roof, m.METAL, Kind.METAL_ROOF, p=p, q=q, gain=draws.uniform(0.88, 1.12), height=height)
    if draws.uniform() < 0.7:
        strips = (np.mod(roof.u + 100.0, 9.0) < 1.1) & (np.abs(np.abs(roof.v) - 0.22 * width) < 0.14 * width)
        canvas.paint(roof, m.PAINT, p=0.6, gain=0.8, where=strips)


def yard(canvas: Canvas, draws: Draws, x: float, y: float, length: float, width: float) -> None:
    """Concrete slab surface: 6 m slabs of slightly different age."""
    slabs = canvas.box(x, y, length, width)
    p, q = share(draws, 0.6, 0.6)
    joints = (np.mod(slabs.u + 300.0, 6.0) < 0.5) | (np.mod(slabs.v + 300.0, 6.0) < 0.5)
    canvas.paint(slabs, m.CONCRETE, Kind.CONCRETE, p=p, q=q, gain=draws.uniform(0.9, 1.1), height=0.1)
    canvas.paint(slabs, m.CONCRETE, p=0.0, q=0.9, gain=0.95, where=joints)


def car_park(canvas: Canvas, draws: Draws, x: float, y: float, length: float, width: float, busy: float) -> None:
    """Asphalt with rows of 5 m stalls along x and aisles of 6.5 m; a share ``busy`` of them is taken."""
    p, q = share(draws, 0.8, 0.4)
    gain = draws.uniform(0.92, 1.08)
    canvas.paint(canvas.box(x, y, length, width), m.LOT, Kind.CAR_PARK, p=p, q=q, gain=gain, height=0.0)
    across, rows = 3.0 - 0.5 * width, []
    while across <= 0.5 * width - 2.4:
        rows.append(across)
        across += 11.7 if len(rows) % 2 else 5.2
    stalls = int((length - 6.0) / 2.8)
    for row in rows:
        for stall in range(stalls + 1):
            at = x - 1.4 * stalls + 2.8 * stall
            canvas.paint(canvas.box(at, y + row, 0.6, 4.8), m.LOT, p=p, q=q, gain=1.55 * gain)
            if stall < stalls and draws.uniform() < busy:
                car(canvas, draws, at + 1.4, y + row + draws.uniform(-0.3, 0.3), SOUTH)


def pond(canvas: Canvas, draws: Draws, x: float, y: float, radius: float, stretch: float, heading: Heading) -> None:
    """Water in a muddy, then grassy rim: three overlapping ellipses."""
    p, q = share(draws, 0.9, 0.9)
    c, s = heading
    lobes = ((0.0, 1.0), (0.55, 0.82), (-0.6, 0.75))
    for extra, material, kind in ((2.2, m.SOIL, 0), (0.0, m.WATER, Kind.WATER)):
        for along, size in lobes:
            at_x, at_y = x + along * radius * stretch * c, y + along * radius * stretch * s
            lobe = canvas.disc(at_x, at_y, size * radius + extra, stretch, heading)
            if kind == Kind.WATER:
                canvas.paint(lobe, material, kind, p=p, q=q, height=-1.2)
            else:
                canvas.paint(lobe, material, kind, p=0.9, height=-0.5)


def tree(canvas: Canvas, draws: Draws, lumps: np.ndarray, x: float, y: float, small: float, large: float) -> None:
    """An ellipsoidal, lumpy crown where there is grass; nothing elsewhere."""
    radius, slender, kind = draws.uniform(small, large), draws.uniform(1.5, 2.5), draws.uniform()
    p, q = share(draws, 0.8, 0.6)
    gain = draws.uniform(0.8, 1.15)
    if canvas.look(x, y)[0] != m.GRASS:
        return
    crown = canvas.disc(x, y, radius, draws.uniform(0.85, 1.15))
    dome = np.maximum(1.0 - (crown.u * crown.u + crown.v * crown.v) / (radius * radius), 0.0)
    tall = slender * radius * (0.35 + 0.65 * np.sqrt(dome)) * (1.0 + 0.13 * lumps[crown.at])
    clear = (tall > canvas.height[crown.at]) & (dome > 0.18 + 0.16 * lumps[crown.at])
    material = m.CONIFER if kind < 0.22 else m.TREE
    canvas.paint(crown, material, Kind.TREES, p=p, q=q, gain=gain, height=tall, where=clear)
