"""The drawing board of the built-in scene: portable random numbers, smooth fields, shapes painted in metres.

Everything here that decides anything (inside or outside, random choice) is integer or plain IEEE arithmetic,
so the same seed gives the same picture on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Heading = tuple[float, float]
EAST: Heading = (1.0, 0.0)
SOUTH: Heading = (0.0, 1.0)


class Draws:
    """Random numbers from the raw 64-bit words of PCG64, which numpy promises never to change.

    The distributions of ``Generator`` may change between numpy versions. Streams of a seed are independent.
    """

    def __init__(self, seed: int, stream: int) -> None:
        self._bits = np.random.PCG64([seed, stream])

    def uniforms(self, count: int) -> np.ndarray:
        """(count,) float64 in [0, 1)."""
        return (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(self.uniforms(1)[0])

    def normals(self, *shape: int) -> np.ndarray:
        """float64 of ``shape``, mean 0, variance 1: the sum of the four 16-bit parts of a word, exact.

        Close to a normal distribution, cut off at 3.5 standard deviations.
        """
        words = self._bits.random_raw(int(np.prod(shape))).view(np.uint16)
        total = words[0::4].astype(np.float64)
        for part in (1, 2, 3):
            total += words[part::4]
        total -= 2.0 * 65535.0
        total *= 1.0 / 37837.22722  # sqrt(4 * (65536**2 - 1) / 12)
        return total.reshape(shape)

    def normal(self) -> float:
        return float(self.normals(1)[0])

    def order(self, count: int) -> np.ndarray:
        """A random permutation of ``range(count)``, int64."""
        return np.argsort(self._bits.random_raw(count), kind="stable")


def _interpolate(lattice: np.ndarray, positions: np.ndarray) -> np.ndarray:
    first = positions.astype(np.int64)
    share = positions - first
    share = share * share * (3.0 - 2.0 * share)
    return lattice[first] * (1.0 - share)[:, None] + lattice[first + 1] * share[:, None]


@dataclass(frozen=True)
class Region:
    """Part of the canvas: bounding slices, the mask inside them, and local coordinates in metres."""

    at: tuple[slice, slice]
    mask: np.ndarray
    u: np.ndarray
    v: np.ndarray


class Canvas:
    """What lies at every subpixel: material, class, variation (p, q), gain, height above ground in metres.

    x runs east, y runs south, both in metres from the north-west corner; arrays are (rows, cols).
    """

    def __init__(self, extent_y: float, extent_x: float, rows: int, cols: int) -> None:
        self.extent_y, self.extent_x = extent_y, extent_x
        self.rows, self.cols = rows, cols
        self.step_y, self.step_x = extent_y / rows, extent_x / cols
        self.y = (np.arange(rows) + 0.5) * self.step_y
        self.x = (np.arange(cols) + 0.5) * self.step_x
        self.material = np.zeros((rows, cols), np.uint8)
        self.kind = np.zeros((rows, cols), np.uint8)
        self.p = np.zeros((rows, cols))
        self.q = np.zeros((rows, cols))
        self.gain = np.ones((rows, cols))
        self.height = np.zeros((rows, cols))

    def field(self, draws: Draws, cell: float) -> np.ndarray:
        """Smooth random field over the canvas, about unit variance, features of ``cell`` metres."""
        lattice = draws.normals(int(self.extent_y / cell) + 2, int(self.extent_x / cell) + 2)
        rows = _interpolate(lattice, self.y / cell)
        return 1.35 * np.ascontiguousarray(_interpolate(np.ascontiguousarray(rows.T), self.x / cell).T)

    def _window(self, x: float, y: float, reach_x: float, reach_y: float, heading: Heading) -> Region:
        left = min(max(int((x - reach_x) / self.step_x), 0), self.cols)
        right = min(max(int((x + reach_x) / self.step_x) + 2, left), self.cols)
        top = min(max(int((y - reach_y) / self.step_y), 0), self.rows)
        bottom = min(max(int((y + reach_y) / self.step_y) + 2, top), self.rows)
        dx = self.x[left:right][None, :] - x
        dy = self.y[top:bottom][:, None] - y
        c, s = unit(heading)
        u, v = dx * c + dy * s, dy * c - dx * s
        return Region((slice(top, bottom), slice(left, right)), np.ones(u.shape, bool), u, v)

    def box(self, x: float, y: float, length: float, width: float, heading: Heading = EAST) -> Region:
        """Rectangle about (x, y), ``length`` along the heading."""
        reach = 0.5 * (length + width)
        area = self._window(x, y, reach, reach, heading)
        inside = (np.abs(area.u) <= 0.5 * length) & (np.abs(area.v) <= 0.5 * width)
        return Region(area.at, inside, area.u, area.v)

    def disc(self, x: float, y: float, radius: float, stretch: float = 1.0, heading: Heading = EAST) -> Region:
        """Ellipse with half-axes ``radius * stretch`` along the heading and ``radius`` across it."""
        reach = radius * max(stretch, 1.0)
        area = self._window(x, y, reach, reach, heading)
        u = area.u / stretch
        return Region(area.at, u * u + area.v * area.v <= radius * radius, u, area.v)

    def oval(self, x: float, y: float, straight: float, radius: float, inner: float = 0.0) -> Region:
        """Stadium shape: all points within ``radius`` (and beyond ``inner``) of an east-west segment."""
        reach = 0.5 * straight + radius
        area = self._window(x, y, reach, radius, EAST)
        u = np.maximum(np.abs(area.u) - 0.5 * straight, 0.0)
        square = u * u + area.v * area.v
        return Region(area.at, (square <= radius * radius) & (square >= inner * inner), area.u, area.v)

    def band(self, points: Sequence[tuple[float, float]], width: float) -> Region:
        """All points within half of ``width`` of a polyline; u is x + y, enough to paint dashes."""
        xs, ys = [x for x, _ in points], [y for _, y in points]
        middle_x, middle_y = 0.5 * (min(xs) + max(xs)), 0.5 * (min(ys) + max(ys))
        area = self._window(middle_x, middle_y, max(xs) - middle_x + width, max(ys) - middle_y + width, EAST)
        inside = np.zeros(area.mask.shape, bool)
        for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
            dx, dy = x1 - x0, y1 - y0
            px, py = area.u - (x0 - middle_x), area.v - (y0 - middle_y)
            share = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0.0, 1.0)
            px, py = px - share * dx, py - share * dy
            inside |= px * px + py * py <= 0.25 * width * width
        return Region(area.at, inside, area.u + area.v, area.v)

    def paint(
        self,
        region: Region,
        material: int,
        kind: int | None = None,
        *,
        p: float | np.ndarray = 0.0,
        q: float | np.ndarray = 0.0,
        gain: float = 1.0,
        height: float | np.ndarray | None = None,
        where: np.ndarray | None = None,
    ) -> None:
        """Cover a region. ``kind`` None keeps the class (a car on a car park), ``height`` None the height."""
        mask = region.mask if where is None else region.mask & where
        at = region.at
        self.material[at][mask] = material
        self.gain[at][mask] = gain
        layers: list[tuple[np.ndarray, float | np.ndarray]] = [(self.p, p), (self.q, q)]
        if height is not None:
            layers.append((self.height, height))
        for layer, value in layers:
            layer[at][mask] = value[mask] if isinstance(value, np.ndarray) else value
        if kind is not None:
            self.kind[at][mask] = kind

    def look(self, x: float, y: float) -> tuple[int, float]:
        """Material and height at a point; (-1, 0) outside the canvas."""
        row, col = int(y / self.step_y), int(x / self.step_x)
        if x < 0 or y < 0 or row >= self.rows or col >= self.cols:
            return -1, 0.0
        return int(self.material[row, col]), float(self.height[row, col])


def unit(heading: Heading) -> Heading:
    """The heading at length 1."""
    norm = math.sqrt(heading[0] * heading[0] + heading[1] * heading[1])
    return heading[0] / norm, heading[1] / norm
