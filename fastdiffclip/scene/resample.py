"""Rasters on another grid, warped to that of the scene a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastdiffclip.errors import InputDataError, UsageError, nearest
from fastdiffclip.scene.georeference import Grid, moved_origin, project, to_map, to_pixels
from fastdiffclip.scene.readers import RasterSource

METHODS = ("nearest", "bilinear", "average", "cubic")
DEFAULT = "bilinear"
_RADIUS = {"nearest": 1, "bilinear": 1, "average": 1, "cubic": 2}  # of the kernel, in pixels of the coarser grid
_BYTES_AT_ONCE = 64 * 2**20
_PROBES = 17  # points along each side of a tile whose place in the source is computed


def method_of(text: str) -> str:
    """Return the method that ``--resample`` names, ``auto`` for the default; raises UsageError for another word."""
    if text == "auto":
        return DEFAULT
    if text not in METHODS:
        raise UsageError(f"'{text}' is no way to resample{nearest(text, METHODS)}: it is one of {', '.join(METHODS)}")
    return text


def describe(source: Grid, method: str) -> dict[str, Any]:
    """Return what a scene records of a resampled raster: the method and the grid that it came on."""
    return {
        "method": method,
        "file": source.path.name,
        "shape": [source.height, source.width],
        "crs_wkt": source.crs_wkt,
        "affine_transform": source.affine_transform,
    }


def aligned(source: RasterSource, grid: Grid, target: Grid, method: str, nodata: float | None) -> RasterSource:
    """Return ``source``, which lies on ``grid``, as a raster on ``target``.

    ``nearest`` keeps the dtype; the others give float32, and a pixel that is empty (``nodata`` in all bands that are
    not bad, masked, or NaN) has no weight. Pixels without data are masked, or are ``nodata``, NaN without it. Memory
    stays near 64 MiB of the source and the block that is asked for. Raises InputDataError where one of the two has no
    place on the map, or they do not overlap.
    """
    warp = _Warp(source, grid, target, method, nodata)
    if not any(warp.window(tile) for tile in warp.tiles(slice(0, target.height))):
        raise InputDataError(f"{grid} and {target} do not overlap: are both of the same place, and their CRS right?")
    smooth = method != "nearest"
    return replace(
        source,
        height=target.height,
        width=target.width,
        dtype=np.dtype(np.float32) if smooth else warp.dtype,
        read_rows=warp.smooth_rows if smooth else warp.nearest_rows,
        read_mask=None if smooth else warp.nearest_mask,
        nodata=nodata,
        crs_wkt=target.crs_wkt,
        affine_transform=target.affine_transform,
        close=lambda: None,
    )


@dataclass(frozen=True)
class _Tile:
    """Rows and columns of the target."""

    rows: slice
    columns: slice

    def halves(self) -> Iterator[tuple[_Tile, _Tile]]:
        """Yield the ways to cut the tile in two."""
        for axis in ("rows", "columns"):
            whole = getattr(self, axis)
            middle = (whole.start + whole.stop) // 2
            if middle > whole.start:
                first, second = slice(whole.start, middle), slice(middle, whole.stop)
                yield replace(self, **{axis: first}), replace(self, **{axis: second})


class _Warp:
    """Warps tiles of the target, each from the window of the source that it lies on."""

    def __init__(self, source: RasterSource, grid: Grid, target: Grid, method: str, nodata: float | None) -> None:
        from rasterio.crs import CRS

        for one, other in ((grid, target), (target, grid)):
            lacks_crs = one.crs_wkt is None and other.crs_wkt is not None
            if one.affine_transform is None or lacks_crs:
                raise InputDataError(
                    f"{grid} cannot be resampled to the grid of {target}: {one.what} has no "
                    f"{'transform' if one.affine_transform is None else 'CRS'}, georeference it or resample it first"
                )
        self.source, self.method, self.nodata = source, method, nodata
        self.from_transform, self.to_transform = grid.affine_transform or (), target.affine_transform or ()
        for a, b, _, d, e, _ in (self.from_transform, self.to_transform):
            if a * e - b * d == 0:
                raise InputDataError(f"{grid} cannot be resampled to the grid of {target}: a transform has no area")
        # Where neither grid has a CRS, both lie in one plane; any projected CRS stands for it.
        self.from_crs = CRS.from_wkt(grid.crs_wkt) if grid.crs_wkt else CRS.from_epsg(3857)
        self.to_crs = CRS.from_wkt(target.crs_wkt) if target.crs_wkt else CRS.from_epsg(3857)
        self.same_crs = self.from_crs == self.to_crs
        self.height, self.width = target.height, target.width
        self.dtype = np.dtype(np.uint8) if source.dtype == bool else source.dtype
        if self.dtype == np.float16:
            self.dtype = np.dtype(np.float32)  # GDAL has no half floats
        self.scale = self._scale()
        good = np.ones(source.bands, bool) if source.bad_bands is None else ~np.array(source.bad_bands)
        self.good = None if good.all() else good

    def _scale(self) -> tuple[float, float]:
        """Source pixels per target pixel, across and down, at the centre of the target; at least 1."""
        x, y = self.width / 2, self.height / 2
        columns, rows = self._places(np.array([x - 0.5, x + 0.5, x, x]), np.array([y, y, y - 0.5, y + 0.5]))
        steps = [math.hypot(values[1] - values[0], values[3] - values[2]) for values in (columns, rows)]
        across, down = (max(1.0, step) if math.isfinite(step) else 1.0 for step in steps)
        return across, down

    def _places(self, columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixel positions of the target as positions of the source; infinite where there is none."""
        xs, ys = to_map(self.to_transform, columns, rows)
        if not self.same_crs:
            xs, ys = project(self.to_crs, self.from_crs, xs, ys)
        return to_pixels(self.from_transform, xs, ys)

    def _margin(self, scale: float) -> int:
        return math.ceil(_RADIUS[self.method] * scale) + 1

    def window(self, tile: _Tile) -> tuple[slice, slice] | None:
        """Return the (rows, columns) of the source that a tile needs, None where it lies outside."""
        columns, rows = np.meshgrid(
            np.linspace(tile.columns.start, tile.columns.stop, _PROBES),
            np.linspace(tile.rows.start, tile.rows.stop, _PROBES),
        )
        found = self._places(columns.ravel(), rows.ravel())
        known = np.isfinite(found[0]) & np.isfinite(found[1])
        if not known.any():
            return None
        parts = []
        for places, scale, size in zip(found, self.scale, (self.source.width, self.source.height), strict=True):
            margin = self._margin(scale)
            first = max(0, math.floor(places[known].min()) - margin)
            last = min(size, math.ceil(places[known].max()) + margin)
            if first >= last:
                return None
            parts.append(slice(first, last))
        return parts[1], parts[0]

    def tiles(self, rows: slice) -> Iterator[_Tile]:
        """Yield tiles over whole rows of the target, each of which needs about 64 MiB of the source or less."""
        pending = [_Tile(rows, slice(0, self.width))]
        most = max(1, _BYTES_AT_ONCE // (self.source.width * self.source.bands * max(4, self.dtype.itemsize)))
        while pending:
            tile = pending.pop()
            cuts = list(tile.halves())
            if self._rows_needed(tile) > most and cuts:
                # The cut that saves most rows: across rows where the grids are parallel, either where they are not.
                first, second = min(cuts, key=lambda cut: max(self._rows_needed(cut[0]), self._rows_needed(cut[1])))
                pending += [second, first]
            else:
                yield tile

    def _rows_needed(self, tile: _Tile) -> int:
        window = self.window(tile)
        return window[0].stop - window[0].start if window else 0

    def smooth_rows(self, rows: slice) -> np.ndarray:
        """Rows of the target as float32, interpolated from the pixels with data."""
        fill = np.nan if self.nodata is None else self.nodata
        out = np.full((rows.stop - rows.start, self.width, self.source.bands), fill, np.float32)
        for tile, window, target in self._parts(rows, out):
            block = self.source.read_rows(window[0])[:, window[1]]
            values = block.astype(np.float64 if np.result_type(block, np.float32) == np.float64 else np.float32)
            values[~self._data(block, window)] = np.nan
            found = self._reproject(values, window, tile, np.nan)
            found[np.isnan(found).all(-1)] = fill
            target[:] = found
        return out

    def nearest_rows(self, rows: slice) -> np.ndarray:
        """Rows of the target, each pixel as the source pixel that its centre lies in; 0 outside."""
        out = np.zeros((rows.stop - rows.start, self.width, self.source.bands), self.dtype)
        for tile, window, target in self._parts(rows, out):
            block = self.source.read_rows(window[0])[:, window[1]]
            target[:] = self._reproject(block.astype(self.dtype), window, tile, None)
        return out

    def nearest_mask(self, rows: slice) -> np.ndarray:
        """Validity of the rows of the target: whether the source has a pixel there, and says it is valid."""
        out = np.zeros((rows.stop - rows.start, self.width), bool)
        for tile, window, target in self._parts(rows, out):
            height, width = (part.stop - part.start for part in window)
            valid = np.ones((height, width, 1), np.uint8)
            if self.source.read_mask is not None:
                valid[..., 0] = self.source.read_mask(window[0])[:, window[1]]
            target[:] = self._reproject(valid, window, tile, None)[..., 0] > 0
        return out

    def _parts(self, rows: slice, out: np.ndarray) -> Iterator[tuple[_Tile, tuple[slice, slice], np.ndarray]]:
        """Yield the tiles that lie on the source, their windows, and their places in ``out``."""
        for tile in self.tiles(rows):
            window = self.window(tile)
            if window is not None:
                yield tile, window, out[tile.rows.start - rows.start : tile.rows.stop - rows.start, tile.columns]

    def _data(self, block: np.ndarray, window: tuple[slice, slice]) -> np.ndarray:
        """Say of each pixel of a block (h, w, bands) of the source whether it has data."""
        values = block if self.good is None else block[..., self.good]
        data = np.ones(block.shape[:2], bool)
        if self.source.read_mask is not None:
            data &= self.source.read_mask(window[0])[:, window[1]]
        if self.nodata is not None and not math.isnan(self.nodata):
            missing = np.array(self.nodata).astype(block.dtype) if block.dtype.kind == "f" else self.nodata
            data &= (values != missing).any(-1)
        if block.dtype.kind == "f":
            data &= np.isfinite(values).all(-1)
        return data

    def _reproject(
        self, block: np.ndarray, window: tuple[slice, slice], tile: _Tile, nodata: float | None
    ) -> np.ndarray:
        """Warp a block (h, w, bands) of the source to a tile of the target."""
        from affine import Affine
        from rasterio.enums import Resampling
        from rasterio.errors import RasterioError
        from rasterio.warp import reproject

        shape = (block.shape[2], tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start)
        out = np.zeros(shape, block.dtype)
        try:
            reproject(
                np.ascontiguousarray(np.moveaxis(block, -1, 0)),
                out,
                src_transform=Affine(*moved_origin(self.from_transform, window[1].start, window[0].start)),
                src_crs=self.from_crs,
                dst_transform=Affine(*moved_origin(self.to_transform, tile.columns.start, tile.rows.start)),
                dst_crs=self.to_crs,
                resampling=Resampling[self.method],
                src_nodata=nodata,
                dst_nodata=nodata,
                # Exact places, one scale for the whole scene, and room for its kernel on grids that are turned
                # against each other, so that no tile shows at its edges.
                tolerance=0,
                SOURCE_EXTRA=max(map(self._margin, self.scale)),
                XSCALE=1 / self.scale[0],
                YSCALE=1 / self.scale[1],
                UNIFIED_SRC_NODATA="NO",
            )
        except RasterioError as error:
            raise InputDataError(
                f"{self.source.path} cannot be resampled to the grid of the scene ({error})"
            ) from error
        return np.moveaxis(out, 0, -1)
