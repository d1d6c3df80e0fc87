"""Where a raster lies: comparing grids, and the attributes that place a scene on the map."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiffclip.errors import InputDataError

if TYPE_CHECKING:
    from rasterio.crs import CRS

_TOLERANCE = 1e-6
_FAILURES = 128  # calls of a transformation that may fail, each takes some milliseconds
_CONVENTIONS = {
    "spatial": ("689b58e2-cf7b-45e0-9fff-9cfc0883d6b4", "spatial", "Spatial coordinate information"),
    "geo-proj": (
        "f17cb550-5864-4468-aeb7-f3180cfb622f",
        "proj",
        "Coordinate reference system information for geospatial data",
    ),
}


@dataclass(frozen=True)
class Grid:
    """The pixel grid of one file; CRS and transform are None where the file does not say."""

    what: str
    path: Path
    height: int
    width: int
    crs_wkt: str | None = None
    affine_transform: tuple[float, ...] | None = None

    def __str__(self) -> str:
        place = f", {_short_crs(self.crs_wkt)}" if self.crs_wkt else ""
        if self.affine_transform:
            a, b, c, d, e, f = self.affine_transform
            turned = f", turned ({b:.10g}, {d:.10g})" if b or d else ""
            place += f", corner ({c:.10g}, {f:.10g}), pixel ({a:.10g}, {e:.10g}){turned}"
        return f"{self.what} ({self.path}: {self.height} x {self.width} pixels{place})"


def require_same_grid(
    grids: list[Grid], remedy: str = "resample it first"
) -> tuple[str | None, tuple[float, ...] | None]:
    """Return the (crs_wkt, affine_transform) that the grids share; None where no grid has one.

    Raises InputDataError naming both grids, and ``remedy``, where height, width, CRS or transform differ;
    transforms may differ by 1e-6 of a pixel.
    """
    first = grids[0]
    crs, transform = first, first
    for grid in grids[1:]:
        crs = crs if crs.crs_wkt else grid
        transform = transform if transform.affine_transform else grid
        if what := difference(grid, first, crs, transform):
            other = {"the CRS": crs, "the transform": transform}.get(what, first)
            raise InputDataError(f"{grid} does not lie on the grid of {other}: {what} must be the same; {remedy}")
    return crs.crs_wkt, transform.affine_transform


def difference(grid: Grid, size: Grid, crs: Grid | None = None, transform: Grid | None = None) -> str | None:
    """Return in what ``grid`` differs from another, None where it does not.

    The other grid is ``size``; what it does not say may come from ``crs`` and ``transform``.
    """
    crs, transform = crs or size, transform or size
    if (grid.height, grid.width) != (size.height, size.width):
        return "height and width"
    if grid.crs_wkt and crs.crs_wkt and not same_crs(grid.crs_wkt, crs.crs_wkt):
        return "the CRS"
    if grid.affine_transform and not _same_transform(grid.affine_transform, transform.affine_transform):
        return "the transform"
    return None


def georeferenced(first: Grid, others: list[Grid]) -> Grid:
    """Return ``first`` with the CRS and transform that it lacks from the first of the others that lies on it."""
    for grid in others:
        if difference(grid, first) is None:
            first = replace(
                first,
                crs_wkt=first.crs_wkt or grid.crs_wkt,
                affine_transform=first.affine_transform or grid.affine_transform,
            )
    return first


def _same_transform(one: tuple[float, ...], other: tuple[float, ...] | None) -> bool:
    if other is None:
        return True
    pixel = max(map(abs, (other[0], other[1], other[3], other[4])))
    return all(abs(x - y) <= _TOLERANCE * pixel for x, y in zip(one, other, strict=True))


def same_crs(one: str, other: str) -> bool:
    """Say whether two texts of WKT mean the same CRS."""
    from rasterio.crs import CRS

    return one == other or CRS.from_wkt(one) == CRS.from_wkt(other)


def to_map(transform: tuple[float, ...], columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the map coordinates of positions in pixels, whose whole numbers are corners."""
    a, b, c, d, e, f = transform
    return a * columns + b * rows + c, d * columns + e * rows + f


def to_pixels(transform: tuple[float, ...], xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the (columns, rows) of map coordinates, the inverse of :func:`to_map`."""
    a, b, c, d, e, f = transform
    area = a * e - b * d
    with np.errstate(invalid="ignore"):  # a place at infinity has no pixel
        return (e * (xs - c) - b * (ys - f)) / area, (a * (ys - f) - d * (xs - c)) / area


def moved_origin(transform: tuple[float, ...], column: int, row: int) -> tuple[float, ...]:
    """Return the transform of a window that begins at a pixel."""
    a, b, c, d, e, f = transform
    return a, b, a * column + b * row + c, d, e, d * column + e * row + f


def crs_pair(path: Path, text: str | None, grid: Grid) -> tuple[CRS, CRS] | None:
    """Return the CRS of a file that places itself, and that of the grid; None where the file does not say its own.

    Raises InputDataError for a file with a CRS on a grid without one, and for a CRS that cannot be read.
    """
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    if text is None:
        return None
    if grid.crs_wkt is None:
        raise InputDataError(f"{path} has a CRS and {grid} has none: georeference it first")
    try:
        return CRS.from_user_input(text), CRS.from_wkt(grid.crs_wkt)
    except CRSError as error:
        raise InputDataError(f"the CRS of {path} cannot be read ({error}): assign it another one") from error


def project(source: CRS, target: CRS, xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates (n,) float64 in another CRS; infinite where the transformation has no answer."""
    from rasterio._err import CPLE_BaseError
    from rasterio.warp import transform

    placed = np.full((2, len(xs)), np.inf)
    waiting, failures = [slice(0, len(xs))], 0
    for part in waiting:
        try:
            placed[:, part] = transform(source, target, xs[part], ys[part])
        except CPLE_BaseError:
            # One point outside of the projection's domain fails the whole call: look for it, though not for ever.
            failures += 1
            middle = (part.start + part.stop) // 2
            if part.stop - part.start > 1 and failures < _FAILURES:
                waiting += [slice(part.start, middle), slice(middle, part.stop)]
    return placed[0], placed[1]


def _short_crs(wkt: str) -> str:
    from rasterio.crs import CRS

    code = CRS.from_wkt(wkt).to_epsg()
    return f"EPSG:{code}" if code else f"CRS {wkt[:60]}..."


def grid_mapping_attributes(crs_wkt: str | None, transform: tuple[float, ...] | None) -> dict[str, Any]:
    """Attributes of ``spatial_ref`` as rioxarray and GDAL read them."""
    attributes: dict[str, Any] = {}
    if crs_wkt is not None:
        attributes.update(crs_wkt=crs_wkt, spatial_ref=crs_wkt)
    if transform is not None:
        a, b, c, d, e, f = transform
        attributes["GeoTransform"] = " ".join(repr(value) for value in (c, a, b, f, d, e))
    return attributes


def geozarr_attributes(
    crs_wkt: str | None, transform: tuple[float, ...] | None, height: int, width: int
) -> dict[str, Any]:
    """Attributes of the GeoZarr conventions ``spatial`` and ``proj``, both version 1."""
    attributes: dict[str, Any] = {"spatial:dimensions": ["y", "x"], "spatial:shape": [height, width]}
    used = ["spatial"]
    if transform is not None:
        a, b, c, d, e, f = transform
        xs = [a * column + b * row + c for column in (0, width) for row in (0, height)]
        ys = [d * column + e * row + f for column in (0, width) for row in (0, height)]
        attributes["spatial:transform_type"] = "affine"
        attributes["spatial:transform"] = list(transform)
        attributes["spatial:registration"] = "pixel"
        attributes["spatial:bbox"] = [min(xs), min(ys), max(xs), max(ys)]
    if crs_wkt is not None:
        used.append("geo-proj")
        attributes["proj:wkt2"] = crs_wkt
    attributes["zarr_conventions"] = [_convention(key) for key in used]
    return attributes


def _convention(key: str) -> dict[str, str]:
    uuid, name, description = _CONVENTIONS[key]
    return {
        "schema_url": f"https://raw.githubusercontent.com/zarr-conventions/{key}/refs/tags/v1/schema.json",
        "spec_url": f"https://github.com/zarr-conventions/{key}/blob/v1/README.md",
        "uuid": uuid,
        "name": name,
        "description": description,
    }
