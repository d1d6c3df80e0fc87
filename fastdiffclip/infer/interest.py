"""Which part of a scene is predicted: all of it, a box, or the pixels of a mask; what the output's grid is then."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.infer.cog import bounded_cache
from fastdiffclip.infer.tiles import Rect
from fastdiffclip.scene import rois, vectors
from fastdiffclip.scene.georeference import Grid as SceneGrid
from fastdiffclip.scene.georeference import require_same_grid
from fastdiffclip.scene.readers import expand, open_raster
from fastdiffclip.scene.store import Scene

PIXELS = "pixels:"


@dataclass(frozen=True)
class Interest:
    """The pixels that are wanted.

    Attributes:
        area: what the output covers; a pixel outside it is not predicted.
        points: further limit, ``(area.height, ceil(area.width / 8))`` uint8 bitmap, most significant bit first; None
            for every pixel of the area.
    """

    area: Rect
    points: np.ndarray | None = field(default=None, repr=False)

    def wanted(self, rect: Rect) -> np.ndarray:
        """``(h, w)`` bool of the pixels of ``rect``, which may reach beyond the area."""
        result = np.zeros((rect.height, rect.width), bool)
        inside = rect.within(self.area)
        result[inside.relative_to(rect).slices] = self._bits(inside.relative_to(self.area))
        return result

    def _bits(self, rect: Rect) -> np.ndarray | bool:
        if self.points is None:
            return True
        first = rect.left // 8
        rows = self.points[rect.top : rect.bottom, first : -(-rect.right // 8)]
        bits = np.unpackbits(rows, axis=1)[:, rect.left - 8 * first :]
        return bits[:, : rect.width].astype(bool)

    @property
    def pixels(self) -> int:
        """Number of pixels that are wanted."""
        if self.points is None:
            return self.area.pixels
        return int(np.bitwise_count(self.points).sum())

    def digest(self) -> str:
        """Text that differs for different pixels."""
        area = [self.area.top, self.area.bottom, self.area.left, self.area.right]
        points = "all" if self.points is None else hashlib.sha256(self.points.tobytes()).hexdigest()
        return f"{area} {points}"


def everything(scene: Scene) -> Interest:
    """The whole scene."""
    return Interest(Rect(0, scene.height, 0, scene.width))


def only_pixel(interest: Interest, row: int, col: int) -> Interest:
    """The area of ``interest`` with no pixel but (row, col) of the scene."""
    area = interest.area
    points = np.zeros((area.height, area.width), bool)
    points[row - area.top, col - area.left] = True
    return replace(interest, points=np.packbits(points, axis=1))


def box_of(text: str, scene: Scene) -> Rect:
    """The pixels that ``--bbox`` names.

    ``XMIN,YMIN,XMAX,YMAX`` in the CRS of the scene takes the pixels whose centres lie in the box (in a rotated grid,
    the rectangle around them); ``pixels:LEFT,TOP,RIGHT,BOTTOM`` takes columns from LEFT up to RIGHT and rows from TOP
    up to BOTTOM, ends excluded, as the window of a crop.

    Raises:
        UsageError: the text is no box, the scene has no transform, or the box misses the scene.
    """
    numbers = re.split(r"\s*,\s*", text.removeprefix(PIXELS).strip())
    try:
        a, b, c, d = (float(number) for number in numbers)
    except ValueError:
        raise UsageError(
            f"--bbox takes XMIN,YMIN,XMAX,YMAX in the CRS of the scene, or {PIXELS}LEFT,TOP,RIGHT,BOTTOM; got {text!r}"
        ) from None
    if not (all(map(math.isfinite, (a, b, c, d))) and a < c and b < d):
        raise UsageError(f"--bbox {text} is empty: its first corner must lie below and left of its second")
    whole = Rect(0, scene.height, 0, scene.width)
    if text.startswith(PIXELS):
        found = Rect(math.floor(b), math.ceil(d), math.floor(a), math.ceil(c))
        extent = f"{PIXELS}0,0,{scene.width},{scene.height}"
    else:
        found, extent = _pixels_in(a, b, c, d, scene)
    inside = found.within(whole)
    if inside.pixels == 0:
        raise UsageError(f"--bbox {text} holds no pixel of the scene, which covers {extent}")
    return inside


def _pixels_in(xmin: float, ymin: float, xmax: float, ymax: float, scene: Scene) -> tuple[Rect, str]:
    from affine import Affine

    if scene.affine_transform is None:
        raise UsageError(
            f"the scene has no transform, so --bbox must name pixels: {PIXELS}LEFT,TOP,RIGHT,BOTTOM, "
            f"for example {PIXELS}0,0,{scene.width},{scene.height}"
        )
    there = Affine(*scene.affine_transform[:6])
    cols, rows = _corners(tuple(~there), (xmin, xmax), (ymin, ymax))
    # The centre of pixel n lies at n + 0.5; the tolerance is for boxes that were computed from the grid.
    left, top = (math.ceil(min(values) - 0.5 - 1e-6) for values in (cols, rows))
    right, bottom = (math.floor(max(values) - 0.5 + 1e-6) + 1 for values in (cols, rows))
    xs, ys = _corners(tuple(there), (0, scene.width), (0, scene.height))
    extent = ",".join(f"{value:.10g}" for value in (min(xs), min(ys), max(xs), max(ys)))
    return Rect(top, bottom, left, right), extent


def _corners(
    transform: Sequence[float], xs: tuple[float, float], ys: tuple[float, float]
) -> tuple[list[float], list[float]]:
    a, b, c, d, e, f = transform[:6]
    points = [(x, y) for x in xs for y in ys]
    return [a * x + b * y + c for x, y in points], [d * x + e * y + f for x, y in points]


def cropped_transform(transform: Sequence[float] | None, area: Rect) -> tuple[float, ...] | None:
    """The transform of the part ``area`` of a grid."""
    if transform is None:
        return None
    a, b, c, d, e, f = transform[:6]
    return a, b, a * area.left + b * area.top + c, d, e, d * area.left + e * area.top + f


def interest_of(scene: Scene, bbox: str | None = None, mask: Path | str | None = None) -> Interest:
    """The pixels that ``--bbox`` and ``--mask`` leave; of a scene that is one window, its centre.

    Raises:
        UsageError: see :func:`box_of`.
        InputDataError: the mask cannot be read, lies on another grid, or leaves nothing.
    """
    found = everything(scene) if bbox is None else Interest(box_of(bbox, scene))
    if scene.centre_only:
        row, col = scene.height // 2, scene.width // 2
        if not found.wanted(Rect(row, row + 1, col, col + 1)).all():
            raise UsageError(f"--bbox {bbox} leaves out the centre of the scene, its only pixel that is predicted")
        found = only_pixel(found, row, col)
    if mask is not None:
        with open_mask(str(mask), scene) as read:
            found = masked(found, read, mask)
    return found


@contextmanager
def open_mask(spec: str, scene: Scene) -> Iterator[Callable[[slice], np.ndarray]]:
    """Rows ``(h, width)`` bool of interest.

    ``FILE[:VARIABLE]`` is a one-band raster on the scene's grid, of which neither 0 nor nodata is of interest, or
    polygons (``FILE.gpkg:ATTRIBUTE``) or ENVI regions, as ``ingest`` reads labels.
    """
    files, variable = expand(spec)
    if len(files) != 1:
        raise UsageError(f"--mask {spec} stands for {len(files)} files; give one")
    here = SceneGrid("scene", scene.path, scene.height, scene.width, scene.crs_wkt, scene.affine_transform)
    suffix = files[0].suffix.lower()
    if suffix in (*vectors.SUFFIXES, *rois.SUFFIXES):
        draw = vectors.read_polygons if suffix in vectors.SUFFIXES else rois.read_rois
        drawn = draw(files[0], variable, here).values > 0
        yield drawn.__getitem__
        return
    with bounded_cache(), open_raster(files[0], variable) as source:
        if source.bands != 1:
            raise InputDataError(f"the mask {files[0]} has {source.bands} bands, expected one (not 0 = of interest)")
        there = SceneGrid("mask", files[0], source.height, source.width, source.crs_wkt, source.affine_transform)
        require_same_grid([here, there])

        def read(rows: slice) -> np.ndarray:
            values = source.read_rows(rows)[..., 0]
            inside = (values != 0) & (values == values)  # NaN is not of interest
            if source.nodata is not None:
                inside &= values != source.nodata
            return inside if source.read_mask is None else inside & source.read_mask(rows)

        yield read


def masked(interest: Interest, read: Callable[[slice], np.ndarray], what: Path | str) -> Interest:
    """``interest`` without the pixels where a mask is False; ``read`` gives (h, scene width) bool of scene rows.

    Raises:
        InputDataError: nothing is left.
    """
    area, step = interest.area, 256
    points = np.zeros((area.height, -(-area.width // 8)), np.uint8)
    for top in range(area.top, area.bottom, step):
        rows = slice(top, min(top + step, area.bottom))
        inside = read(rows)[:, area.left : area.right]
        points[rows.start - area.top : rows.stop - area.top] = np.packbits(inside, axis=1)
    if interest.points is not None:
        points &= interest.points
    if not points.any():
        raise InputDataError(f"the mask {what} marks no pixel of the area to predict: not 0 means of interest")
    return replace(interest, points=points)
