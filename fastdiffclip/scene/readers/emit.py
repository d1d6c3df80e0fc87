"""EMIT L2A products (.nc): a swath (downtrack, crosstrack, bands) laid out on its grid by the lookup table it brings.

The layout is that of the EMIT user guide: ``reflectance`` with fill -9999, ``sensor_band_parameters`` with
wavelengths, fwhm and good_wavelengths, ``location/glt_x`` and ``glt_y`` that give for each pixel of the
orthorectified grid the column and row of the swath, counted from 1, 0 where there is none, and the root's
``geotransform`` and ``spatial_ref``. The masks and uncertainties of the same product have the same layout. A negative
number in the table is a neighbour that fills a gap.

The swath is copied once to an unnamed temporary file, since a row of the grid crosses many of its rows.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from typing import IO

import numpy as np

from fastdiffclip.errors import InputDataError, ResourceError
from fastdiffclip.scene.readers import netcdf_cf
from fastdiffclip.scene.readers.guard_files import GuardedFile, Listing, StoredArray
from fastdiffclip.scene.readers.hdf5_arrays import Axes, find_array, plain
from fastdiffclip.scene.readers.source import RasterSource

_COLUMNS, _LINES = "/location/glt_x", "/location/glt_y"
_CUBES = ("/reflectance", "/reflectance_uncertainty", "/radiance", "/mask")
_BLOCK_BYTES = 64 * 2**20
_FILL = -9999.0


def swath_array(file: GuardedFile, listing: Listing, variable: str | None) -> StoredArray | None:
    """Return the array to lay out, the product's cube where none is named; None for one that is not of a swath."""
    if _COLUMNS not in listing.arrays or _LINES not in listing.arrays or "geotransform" not in listing.groups["/"]:
        return None
    cube = next((name for name in _CUBES if name in listing.arrays), None)
    array, axes = find_array(file.path, listing, variable or cube)
    dims = [plain(dim) for dim in array.dims[:2]]
    fits = axes is None and dims == ["downtrack", "crosstrack"] and len(array.shape) in (2, 3) and 0 not in array.shape
    return array if fits and array.dtype is not None else None


def open_emit(file: GuardedFile, listing: Listing, array: StoredArray) -> RasterSource:
    """Open an array of the swath on the orthorectified grid; raises InputDataError where the table does not fit."""
    columns, lines = listing.arrays[_COLUMNS], listing.arrays[_LINES]
    numbers = columns.dtype is not None and lines.dtype is not None
    if columns.shape != lines.shape or len(lines.shape) != 2 or 0 in lines.shape or not numbers:
        raise InputDataError(
            f"{file.path}: glt_x has shape {columns.shape} and glt_y {lines.shape}, expected two tables of one shape"
        )
    about = listing.groups["/"]
    transform = netcdf_cf.from_numbers(about.get("geotransform"), gdal=True)
    if transform is None:
        raise InputDataError(f"{file.path}: its geotransform is not six numbers, expected a whole EMIT product")
    for name in (_COLUMNS, _LINES, array.name):
        file.check(name)
    known = netcdf_cf.spectrum(file, listing, array, Axes(0, 1, 2 if len(array.shape) == 3 else None))
    layout = _Layout(file, array, columns, lines)
    wkt = about.get("spatial_ref")
    return RasterSource(
        file.path,
        layout.height,
        layout.width,
        layout.bands,
        layout.dtype,
        layout.read,
        read_mask=layout.mask,
        crs_wkt=netcdf_cf.wkt2(file.path, wkt) if isinstance(wkt, str) else None,
        affine_transform=transform,
        nodata=layout.fill if layout.dtype.kind == "f" else netcdf_cf.nodata(array),
        wavelengths=known.wavelengths,
        fwhm=known.fwhm,
        bad_bands=known.bad_bands,
        warnings=known.warnings,
        close=layout.close,
    )


class _Layout:
    """An array of the swath as the lookup table lays it out, ``fill`` where the table is empty."""

    def __init__(self, file: GuardedFile, array: StoredArray, columns: StoredArray, lines: StoredArray) -> None:
        assert array.dtype is not None
        self.dtype = array.dtype.newbyteorder("=")
        self.height, self.width = lines.shape
        self.bands = array.shape[2] if len(array.shape) == 3 else 1
        nodata = netcdf_cf.nodata(array)
        self.fill = (_FILL if nodata is None else nodata) if self.dtype.kind == "f" else 0.0
        self._file, self._array, self._tables = file, array, (lines, columns)
        self._stream: IO[bytes] | None = None
        self._swath: np.ndarray | None = None

    def read(self, rows: slice) -> np.ndarray:
        """Return rows of the grid."""
        swath = self._copied()
        lines, columns = self._places(rows)
        there = lines > 0
        out = np.full((*there.shape, self.bands), self.fill, self.dtype)
        out[there] = swath[lines[there] - 1, columns[there] - 1]
        return out

    def mask(self, rows: slice) -> np.ndarray:
        """Return where the swath covers the grid."""
        return self._places(rows)[0] > 0

    def _places(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return lines and columns of the swath, counted from 1; both 0 where the table is empty."""
        found = []
        for table, size in zip(self._tables, self._array.shape, strict=False):
            assert table.dtype is not None
            shape = (self.height, self.width, 1)
            block = self._file.rows(table.name, table.dtype, shape, rows, axes=[0, 1, None])[:, :, 0]
            places = np.abs(np.nan_to_num(block.astype(np.float64), posinf=0.0, neginf=0.0))
            if places.max() > size:
                raise InputDataError(
                    f"{self._file.path}: {table.name} points at {places.max():.0f} of {size}, expected places within "
                    "the swath: the product is damaged, download it again"
                )
            found.append(places.astype(np.int64))
        there = (found[0] > 0) & (found[1] > 0)
        return found[0] * there, found[1] * there

    def _copied(self) -> np.ndarray:
        """Return the swath, copied to an unnamed temporary file when it is first asked for."""
        if self._swath is None:
            shape = (self._array.shape[0], self._array.shape[1], self.bands)
            size, folder = math.prod(shape) * self.dtype.itemsize, tempfile.gettempdir()
            lacking = f"reading {self._file.path} takes {size / 2**30:.2f} GiB in {folder}, which has less: set TMPDIR"
            if shutil.disk_usage(folder).free < size:
                raise ResourceError(f"{lacking} to a folder with more space")
            self._stream = tempfile.TemporaryFile(prefix="fastdiffclip-swath-")  # noqa: SIM115 - close() does
            step = max(1, _BLOCK_BYTES * shape[0] // size)
            axes = [0, 1, 2 if len(self._array.shape) == 3 else None]
            try:
                for start in range(0, shape[0], step):
                    rows = slice(start, min(start + step, shape[0]))
                    self._file.rows(self._array.name, self.dtype, shape, rows, axes=axes).tofile(self._stream)
            except OSError as error:
                raise ResourceError(f"{lacking} to a folder with more space") from error
            self._stream.flush()
            self._swath = np.memmap(self._stream, self.dtype, "r", shape=shape)
        return self._swath

    def close(self) -> None:
        """Let go of the copy and the file."""
        self._swath = None
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._file.close()
