"""The plan of the built-in suburb: streets, houses, schools, car parks, halls, ponds, a railway, trees.

400 m (north to south) by 600 m. Streets run near x = 102, 204, 300, 402, 500 and y = 92, 192, 284; the rest
hangs on the blocks between them. Everything is painted on a `Canvas`, later things over earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastdiffclip.scene.demo import objects as put
from fastdiffclip.scene.demo import spectra as m
from fastdiffclip.scene.demo.canvas import SOUTH, Canvas, Draws
from fastdiffclip.scene.demo.objects import Kind

EXTENT_Y, EXTENT_X = 400.0, 600.0

# Running tracks: x, y, length of the straights, outer radius, width of the ring.
_TRACKS = ((191.0, 141.0, 76.0, 37.0, 9.6), (352.0, 226.0, 28.0, 22.5, 7.4), (52.0, 318.0, 30.0, 22.5, 7.4))

Points = Sequence[tuple[float, float]]


def build_suburb(canvas: Canvas, draws: Draws) -> None:
    """Paint the whole suburb."""
    _ground(canvas, draws)
    for x0, y0, x1, y1 in (
        (4, 2, 94, 82),
        (110, 2, 196, 82),
        (212, 2, 292, 82),
        (410, 2, 492, 82),
        (4, 100, 94, 184),
        (310, 100, 394, 184),
        (110, 202, 196, 276),
        (212, 202, 292, 276),
        (410, 202, 492, 276),
        (212, 292, 292, 360),
        (310, 292, 394, 360),
    ):
        _housing(canvas, draws, x0, y0, x1, y1)
    for x, y, straight, radius, ring in _TRACKS:
        put.school(canvas, draws, x, y, straight, radius, ring)
    _school_yards(canvas, draws)
    _parks(canvas, draws)
    _shops(canvas, draws)
    _industry(canvas, draws)
    _bare_ground(canvas, draws)
    _streets(canvas, draws)
    _railway(canvas, draws)
    _trees(canvas, draws)


def _ground(canvas: Canvas, draws: Draws) -> None:
    everything = canvas.box(300.0, 200.0, 700.0, 700.0)
    stress = 0.50 + 0.24 * canvas.field(draws, 70.0) + 0.14 * canvas.field(draws, 24.0)
    vigour = np.clip(0.25 + 0.25 * canvas.field(draws, 45.0), 0.0, 0.8)
    stress = np.clip(stress, 0.0, 1.0)
    canvas.paint(everything, m.GRASS, Kind.HEALTHY, p=stress, q=vigour * (1.0 - stress))


def _curve(draws: Draws, start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """A street's centre line: shifted, tilted and bent by a few metres."""
    (x0, y0), (x1, y1) = start, end
    shift, tilt, bend = draws.uniform(-1.5, 1.5), draws.uniform(-2.5, 2.5), draws.uniform(-4.0, 4.0)
    down = abs(y1 - y0) > abs(x1 - x0)
    points = []
    for step in range(9):
        share = step / 8.0
        aside = shift + tilt * (2.0 * share - 1.0) + bend * 4.0 * share * (1.0 - share)
        x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
        points.append((x + aside, y) if down else (x, y + aside))
    return points


def _streets(canvas: Canvas, draws: Draws) -> None:
    plan: list[tuple[tuple[float, float], tuple[float, float], float]] = [
        ((102, -5), (102, 368), 7.0),
        ((204, -5), (204, 92), 6.5),
        ((204, 192), (204, 368), 6.5),
        ((300, -5), (300, 405), 11.0),
        ((402, -5), (402, 368), 7.0),
        ((500, -5), (500, 368), 8.0),
        ((-5, 92), (605, 92), 7.5),
        ((-5, 192), (605, 192), 11.0),
        ((-5, 284), (605, 284), 7.0),
    ]
    lines = [(_curve(draws, start, end), width) for start, end, width in plan]
    for points, width in lines:
        canvas.paint(canvas.band(points, width + 4.6), m.CONCRETE, Kind.CONCRETE, p=draws.uniform(0, 0.5), height=0.1)
    for points, width in lines:
        p, q = put.share(draws, 0.7, 0.5)
        canvas.paint(
            canvas.band(points, width),
            m.ROAD,
            Kind.ROAD,
            p=p,
            q=q,
            gain=draws.uniform(0.94, 1.06),
            height=0.0,
        )
    for points, width in lines:
        if width >= 8.0:
            line = canvas.band(points, 0.8)
            canvas.paint(line, m.PAINT, p=0.8, gain=0.45, where=np.mod(line.u, 9.0) < 4.0)
        _traffic(canvas, draws, points, width)


def _traffic(canvas: Canvas, draws: Draws, points: Points, width: float) -> None:
    for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
        heading = (x1 - x0, y1 - y0)
        for side in (-0.27, 0.27):
            if draws.uniform() < 0.28:
                share = draws.uniform()
                norm = abs(heading[0]) + abs(heading[1])
                x = x0 + share * heading[0] - side * width * heading[1] / norm
                y = y0 + share * heading[1] + side * width * heading[0] / norm
                put.car(canvas, draws, x, y, heading)


def _housing(canvas: Canvas, draws: Draws, x0: float, y0: float, x1: float, y1: float) -> None:
    """Two rows of plots back to back, facing the streets to the north and to the south."""
    count = int((x1 - x0) / 16.0)
    plot, depth = (x1 - x0) / count, 0.5 * (y1 - y0)
    for front, inward in ((y0, 1.0), (y1, -1.0)):
        for index in range(count):
            x = x0 + (index + 0.5) * plot
            put.lawn(canvas, x, front + 0.5 * inward * depth, plot, depth, draws.uniform(-0.38, 0.38))
            if draws.uniform() < 0.06:
                p, q = put.share(draws, 0.7, 0.7)
                plain = canvas.box(x, front + 0.5 * inward * depth, plot - 2.0, depth - 3.0)
                canvas.paint(plain, m.SOIL, Kind.SOIL, p=p, q=q, gain=draws.uniform(0.85, 1.1))
                continue
            put.house(canvas, draws, x, front, inward, plot, depth)


def _school_yards(canvas: Canvas, draws: Draws) -> None:
    put.car_park(canvas, draws, 277.0, 112.0, 30.0, 28.0, 0.45)
    put.flat_roof(canvas, draws, 279.0, 162.0, 24.0, 40.0, 7.5)
    put.yard(canvas, draws, 122.0, 107.0, 22.0, 17.0)
    put.flat_roof(canvas, draws, 352.0, 266.0, 66.0, 17.0, 8.5)
    put.yard(canvas, draws, 352.0, 254.0, 60.0, 8.0)
    put.flat_roof(canvas, draws, 40.0, 354.0, 52.0, 15.0, 7.0)
    put.yard(canvas, draws, 81.0, 353.0, 25.0, 17.0)


def _parks(canvas: Canvas, draws: Draws) -> None:
    put.lawn(canvas, 352.0, 42.0, 84.0, 80.0, -0.15)
    put.pond(canvas, draws, 338.0, 30.0, 15.0, 1.35, (0.8, 0.6))
    path: Points = [(306.0, 66.0), (330.0, 62.0), (352.0, 50.0), (372.0, 22.0), (380.0, 2.0)]
    canvas.paint(canvas.band(path, 3.0), m.CONCRETE, Kind.CONCRETE, p=0.3, height=0.0)
    canvas.paint(canvas.disc(376.0, 68.0, 12.0), m.SOIL, Kind.SOIL, p=0.1, q=0.4)
    canvas.paint(canvas.disc(376.0, 68.0, 4.0), m.GRASS, Kind.HEALTHY, p=0.1, q=0.4)
    canvas.paint(canvas.box(322.0, 75.0, 26.0, 12.0), m.TURF, Kind.TURF, p=draws.uniform(0.2, 0.9), height=0.03)
    put.lawn(canvas, 50.0, 240.0, 88.0, 74.0, 0.12)
    put.pond(canvas, draws, 40.0, 228.0, 17.0, 1.4, (0.9, -0.44))
    meadow: Points = [(4.0, 268.0), (34.0, 262.0), (66.0, 250.0), (96.0, 216.0)]
    canvas.paint(canvas.band(meadow, 3.2), m.SOIL, Kind.SOIL, q=0.6, height=0.0)
    canvas.paint(canvas.box(78.0, 268.0, 26.0, 14.0), m.TURF, Kind.TURF, p=draws.uniform(0.0, 0.6), height=0.03)


def _shops(canvas: Canvas, draws: Draws) -> None:
    put.yard(canvas, draws, 451.0, 133.0, 84.0, 7.0)
    put.flat_roof(canvas, draws, 451.0, 114.0, 76.0, 29.0, 6.5)
    put.car_park(canvas, draws, 451.0, 160.0, 84.0, 46.0, 0.55)
    put.flat_roof(canvas, draws, 133.0, 306.0, 40.0, 22.0, 5.5)
    put.car_park(canvas, draws, 176.0, 312.0, 38.0, 36.0, 0.5)
    put.car_park(canvas, draws, 133.0, 346.0, 44.0, 28.0, 0.35)
    canvas.paint(canvas.box(178.0, 350.0, 34.0, 20.0), m.TURF, Kind.TURF, q=draws.uniform(0.1, 0.6), height=0.03)
    put.yard(canvas, draws, 133.0, 324.0, 44.0, 9.0)


def _industry(canvas: Canvas, draws: Draws) -> None:
    put.yard(canvas, draws, 552.0, 42.0, 88.0, 80.0)
    put.hall(canvas, draws, 552.0, 22.0, 76.0, 32.0)
    put.hall(canvas, draws, 527.0, 64.0, 34.0, 26.0)
    put.car_park(canvas, draws, 573.0, 66.0, 44.0, 30.0, 0.4)
    put.yard(canvas, draws, 572.0, 130.0, 50.0, 62.0)
    put.hall(canvas, draws, 526.0, 140.0, 70.0, 30.0, SOUTH)
    put.hall(canvas, draws, 572.0, 116.0, 40.0, 24.0)
    put.car_park(canvas, draws, 572.0, 171.0, 46.0, 24.0, 0.5)
    put.yard(canvas, draws, 452.0, 331.0, 60.0, 22.0)
    put.hall(canvas, draws, 452.0, 306.0, 74.0, 25.0)
    put.hall(canvas, draws, 428.0, 350.0, 36.0, 19.0)
    put.flat_roof(canvas, draws, 474.0, 350.0, 30.0, 20.0, 9.0)
    put.pond(canvas, draws, 568.0, 312.0, 13.0, 1.3, (0.3, 0.954))
    put.hall(canvas, draws, 525.0, 312.0, 38.0, 26.0, SOUTH)
    put.car_park(canvas, draws, 530.0, 350.0, 40.0, 22.0, 0.3)


def _bare_ground(canvas: Canvas, draws: Draws) -> None:
    """A building site on the eastern edge and tracks of heavy machines across it."""
    for x, y, radius, stretch in (
        (548.0, 238.0, 34.0, 1.15),
        (528.0, 222.0, 18.0, 1.0),
        (572.0, 256.0, 17.0, 1.2),
    ):
        p, q = put.share(draws, 0.5, 0.6)
        canvas.paint(canvas.disc(x, y, radius, stretch), m.SOIL, Kind.SOIL, p=p, q=q, gain=draws.uniform(0.9, 1.1))
    track: Points = [(504.0, 262.0), (535.0, 250.0), (552.0, 228.0), (596.0, 220.0)]
    canvas.paint(canvas.band(track, 4.5), m.SOIL, Kind.SOIL, p=0.75, gain=0.95)
    heap = canvas.disc(566.0, 240.0, 8.0)
    tall = 3.2 * np.maximum(1.0 - (heap.u * heap.u + heap.v * heap.v) / 64.0, 0.0)
    canvas.paint(heap, m.SOIL, Kind.SOIL, q=0.7, height=tall)
    put.yard(canvas, draws, 533.0, 214.0, 22.0, 14.0)


def _railway(canvas: Canvas, draws: Draws) -> None:
    """Two tracks along the southern edge, a strip of dirt, and a drain beside them."""
    line: Points = [(-5.0, 376.0), (200.0, 375.0), (420.0, 379.0), (605.0, 377.0)]
    drain: Points = [(-5.0, 391.5), (190.0, 390.0), (410.0, 393.0), (605.0, 391.0)]
    canvas.paint(canvas.band(line, 15.0), m.SOIL, 0, p=0.3, q=0.1, height=0.2)
    canvas.paint(canvas.band(line, 11.0), m.BALLAST, Kind.RAILWAY, p=0.2, q=0.2, height=0.7)
    for aside in (-3.0, -1.6, 1.6, 3.0):
        rail = canvas.band([(x, y + aside) for x, y in line], 0.7)
        canvas.paint(rail, m.RAIL, p=0.6, gain=0.8)
    canvas.paint(canvas.band(drain, 9.0), m.WATER, Kind.WATER, p=0.75, q=0.2, height=-1.0)
    for wagon in range(4):
        body = canvas.box(330.0 + 17.0 * wagon, 374.9 + 0.28 * wagon, 15.5, 3.0)
        canvas.paint(body, m.METAL, 0, q=draws.uniform(0.2, 0.9), gain=0.7, height=3.9)
    canvas.paint(canvas.band([(300.0, 365.0), (300.0, 405.0)], 11.0), m.ROAD, Kind.ROAD, p=0.4, height=0.7)


def _trees(canvas: Canvas, draws: Draws) -> None:
    lumps = canvas.field(draws, 1.7)
    groves = (
        (70.0, 222.0, 17.0, 34),
        (20.0, 262.0, 12.0, 16),
        (362.0, 28.0, 10.0, 12),
        (316.0, 12.0, 9.0, 8),
        (540.0, 186.0, 8.0, 6),
        (118.0, 172.0, 11.0, 12),
        (588.0, 352.0, 13.0, 18),
        (548.0, 276.0, 10.0, 10),
        (92.0, 300.0, 7.0, 6),
        (392.0, 238.0, 7.0, 5),
    )
    for x, y, spread, count in groves:
        for _ in range(count):
            _plant(canvas, draws, lumps, x + spread * draws.normal(), y + spread * draws.normal(), 3.0, 5.6)
    for street in (102.0, 204.0, 300.0, 402.0, 500.0):
        for step in range(27):
            side = 8.2 if draws.uniform() < 0.5 else -8.2
            if draws.uniform() < 0.55:
                _plant(canvas, draws, lumps, street + side, 6.0 + 14.0 * step + draws.uniform(-3, 3), 2.2, 3.8)
    for _ in range(900):
        _plant(canvas, draws, lumps, draws.uniform(0.0, 600.0), draws.uniform(0.0, 400.0), 1.8, 4.6)


def _plant(canvas: Canvas, draws: Draws, lumps: np.ndarray, x: float, y: float, small: float, large: float) -> None:
    """A tree, unless it would stand in a running track."""
    for at_x, at_y, straight, radius, _ in _TRACKS:
        if abs(x - at_x) < 0.5 * straight + radius and abs(y - at_y) < radius:
            return
    put.tree(canvas, draws, lumps, x, y, small, large)
