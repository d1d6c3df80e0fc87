"""LiDAR point clouds (LAS, LAZ) as rasters of surface height and intensity on the grid of a scene."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiffclip.errors import InputDataError, UsageError, nearest
from fastdiffclip.scene.georeference import Grid, crs_pair, project, to_pixels
from fastdiffclip.scene.readers.guard import DATA_TIME_S, HEADER_TIME_S
from fastdiffclip.scene.readers.guard_files import GuardedFile
from fastdiffclip.scene.readers.source import RasterSource

if TYPE_CHECKING:
    from rasterio.crs import CRS

SUFFIXES = (".las", ".laz")
BANDS = ("height", "intensity")
_POINTS_AT_ONCE = 500_000


def open_points(
    path: Path, variable: str | None, grid: Grid, on_share: Callable[[float], None] = lambda share: None
) -> RasterSource:
    """Turn a point cloud into a float32 raster on ``grid``, NaN where no point lies.

    ``variable`` is ``height``, the highest return of a cell in the units of the file, or ``intensity``, the mean of
    its first returns; without it both bands. Points classified as noise (7, 18) and withheld ones do not count. The
    points stream through in chunks; three float32 planes are held in memory. ``on_share`` hears the share done.
    Raises UsageError without laspy or with another variable, InputDataError for a damaged file, a grid without a
    place, and where no point lies on the grid.
    """
    if variable is not None and variable not in BANDS:
        raise UsageError(f"{path} has no variable '{variable}'{nearest(variable, BANDS)}: give {' or '.join(BANDS)}")
    _require_libraries(path)
    if grid.affine_transform is None:
        raise InputDataError(f"{path} cannot be put on {grid}: it has no transform, georeference it first")
    file = GuardedFile(path, "points", "LAS")
    try:
        header = file.call("describe", HEADER_TIME_S, str(path))
        total = header["points"]
        if not total:
            raise InputDataError(f"{path} holds no point: was it copied completely?")
        crs, warnings = _crs(path, header, grid)
        planes = _Planes(grid)
        for start in range(0, total, _POINTS_AT_ONCE):
            block = np.empty((min(_POINTS_AT_ONCE, total - start), 5))
            file.call("chunk", DATA_TIME_S, str(path), block, count=len(block))
            planes.add(block, crs)
            on_share((start + len(block)) / total)
    finally:
        file.close()
    if not planes.counts.any() and not np.isfinite(planes.height).any():
        low, high = header["low"], header["high"]
        raise InputDataError(
            f"none of the {total} points of {path} ({low[0]:.10g} to {high[0]:.10g}, {low[1]:.10g} to {high[1]:.10g}) "
            f"lies on {grid}: is it of the same place, and its CRS right?"
        )
    chosen = [variable] if variable else list(BANDS)
    raster = np.stack([planes.height if name == "height" else planes.mean for name in chosen], -1)
    return RasterSource(
        path, grid.height, grid.width, len(chosen), raster.dtype, raster.__getitem__, nodata=math.nan,
        crs_wkt=grid.crs_wkt, affine_transform=grid.affine_transform, warnings=tuple(warnings),
    )  # fmt: skip


def _require_libraries(path: Path) -> None:
    needed = ["laspy"] + (["lazrs"] if path.suffix.lower() == ".laz" else [])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{path} needs {' and '.join(missing)}, which is not installed: pip install 'fastdiffclip[lidar]', or grid "
            "the points to a GeoTIFF"
        )


def _crs(path: Path, header: dict[str, Any], grid: Grid) -> tuple[tuple[CRS, CRS] | None, list[str]]:
    """Return the CRS of the points and that of the grid, None where places are the same in both; and a warning."""
    crs = crs_pair(path, header["crs"], grid)
    if crs is None:
        return None, [f"{path} has no CRS, that of the scene is taken"] if grid.crs_wkt else []
    xs, ys = (np.array([header["low"][axis], header["high"][axis]]) for axis in (0, 1))
    if not np.isfinite([xs, ys]).all():
        raise InputDataError(f"{path} declares no finite extent: it is damaged, copy it again")
    # A CRS with a height as well is not equal to the one without, and moves nothing.
    moved = np.abs(np.subtract(project(*crs, xs, ys), (xs, ys))).max()
    a, b, _, d, e, _ = grid.affine_transform or (1, 0, 0, 0, 1, 0)
    return None if moved < 1e-6 * max(map(abs, (a, b, d, e))) else crs, []


class _Planes:
    """Highest return, number of first returns and their mean intensity per cell."""

    def __init__(self, grid: Grid) -> None:
        size = (grid.height, grid.width)
        self.transform = grid.affine_transform or ()
        self.height = np.full(size, np.nan, np.float32)
        self.mean = np.full(size, np.nan, np.float32)
        self.counts = np.zeros(size, np.uint32)

    def add(self, points: np.ndarray, crs: tuple[CRS, CRS] | None) -> None:
        """Add points (n, 5): x, y, z, intensity, and 0 = does not count, 1 = counts, 2 = first return."""
        points = points[(points[:, 4] > 0) & np.isfinite(points).all(1)]
        xs, ys = points[:, 0], points[:, 1]
        if crs is not None:
            xs, ys = project(*crs, xs, ys)
        columns, rows = to_pixels(self.transform, xs, ys)
        height, width = self.height.shape
        inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        points = points[inside]
        cells = rows[inside].astype(np.intp) * width + columns[inside].astype(np.intp)
        with np.errstate(over="ignore"):  # a height beyond float32 becomes infinite, and so invalid
            np.fmax.at(self.height.reshape(-1), cells, points[:, 2].astype(np.float32))
        first = points[:, 4] == 2
        self._add_intensity(cells[first], points[first, 3])

    def _add_intensity(self, cells: np.ndarray, values: np.ndarray) -> None:
        """Move the means towards those of the new values, by their share of all."""
        cells, inverse, new = np.unique(cells, return_inverse=True, return_counts=True)
        counts, mean = self.counts.reshape(-1), self.mean.reshape(-1)
        total = counts[cells] + new
        before = np.where(counts[cells] > 0, mean[cells], 0.0)
        sums = np.bincount(inverse, values, minlength=len(cells))
        mean[cells] = before + (sums - new * before) / total
        counts[cells] = total
