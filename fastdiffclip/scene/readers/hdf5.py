"""HDF5 and NetCDF files by the path of an array: ``FILE.h5:/group/array``.

They are told apart by content, as are the products PRISMA L2D and EMIT L2A, which are read as such where no array is
named. How an array becomes a raster is said in :mod:`hdf5_arrays` and :mod:`netcdf_cf`. A grid whose first row is the
southernmost is turned, so that rows run from north to south.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers import netcdf_cf
from fastdiffclip.scene.readers.emit import open_emit, swath_array
from fastdiffclip.scene.readers.guard_files import GuardedFile, Listing
from fastdiffclip.scene.readers.hdf5_arrays import find_array, find_axes
from fastdiffclip.scene.readers.prisma import is_prisma, open_prisma
from fastdiffclip.scene.readers.source import RasterSource

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_HDF4 = b"\x0e\x03\x13\x01"
_FARTHEST = 2**20


def open_hdf5(path: Path, variable: str | None) -> RasterSource:
    """Open an array of an HDF5 or NetCDF file, its only raster or a product where ``variable`` is None.

    ``variable`` is the path of the array, or its name where only one array has it, with ``@`` and the order of axes
    (``@byx``: bands, rows, columns) where the file does not tell.
    """
    file = GuardedFile(path, *container(path))
    try:
        listing = file.listing()
        swath = swath_array(file, listing, variable)
        if swath is not None:
            return open_emit(file, listing, swath)
        if is_prisma(listing) and variable is None:
            return open_prisma(file, listing)
        return open_array(file, listing, variable)
    except BaseException:
        file.close()
        raise


def is_hdf5(path: Path) -> bool:
    """Tell whether a file is HDF5; the signature stands at 0, 512, 1024, 2048, ..."""
    with path.open("rb") as stream:
        place = 0
        while place <= _FARTHEST:
            stream.seek(place)
            if stream.read(len(SIGNATURE)) == SIGNATURE:
                return True
            place = max(512, 2 * place)
    return False


def container(path: Path) -> tuple[str, str]:
    """Return the child's module for a file and its format in words, judged by content."""
    with path.open("rb") as stream:
        head = stream.read(8)
    if head.startswith((b"CDF\x01", b"CDF\x02")):
        return "netcdf3", "classic NetCDF"
    if head.startswith(b"CDF\x05"):
        raise InputDataError(f"{path} is NetCDF of the CDF-5 kind, expected NetCDF-4: convert it with 'nccopy -k nc4'")
    if head.startswith(_HDF4):
        raise InputDataError(f"{path} is HDF4, expected HDF5: convert it with 'h4toh5', or to GeoTIFF with GDAL")
    if is_hdf5(path):
        return "hdf5", "HDF5 or NetCDF"
    raise InputDataError(
        f"{path} cannot be read as HDF5 or NetCDF, it may be truncated or damaged (it does not begin like one): copy "
        "it again, or convert it to GeoTIFF"
    )


def open_array(file: GuardedFile, listing: Listing, variable: str | None) -> RasterSource:
    """Make a raster of one array of an open file, which the raster closes."""
    array, given = find_array(file.path, listing, variable)
    what = f"{file.path}:{array.name}"
    axes = find_axes(what, array, listing, given)
    shape = (array.shape[axes.y], array.shape[axes.x], 1 if axes.band is None else array.shape[axes.band])
    nodata = netcdf_cf.nodata(array)
    more: dict[str, Any] = {"nodata": nodata} if file.module == "zarr" else {}
    file.check(array.name, **more)
    bands = netcdf_cf.spectrum(file, listing, array, axes)
    place = netcdf_cf.georeference(file, listing, array, axes)
    assert array.dtype is not None  # find_axes has seen to it
    dtype, taken_as = array.dtype.newbyteorder("="), netcdf_cf.unsigned(array)
    order = [axes.y, axes.x, axes.band]

    def read(rows: slice) -> np.ndarray:
        if place.south_up:
            turned = slice(shape[0] - rows.stop, shape[0] - rows.start)
            block = file.rows(array.name, dtype, shape, turned, axes=order, **more)[::-1]
        else:
            block = file.rows(array.name, dtype, shape, rows, axes=order, **more)
        return block if taken_as is None else block.view(taken_as)

    scale, offset = netcdf_cf.scaling(array)
    return RasterSource(
        file.path,
        *shape,
        dtype if taken_as is None else taken_as,
        read,
        crs_wkt=place.crs_wkt,
        affine_transform=place.affine_transform,
        nodata=nodata,
        scale=scale,
        offset=offset,
        wavelengths=bands.wavelengths,
        fwhm=bands.fwhm,
        bad_bands=bands.bad_bands,
        class_names=netcdf_cf.class_names(array),
        warnings=bands.warnings + place.warnings,
        close=file.close,
    )
