"""PRISMA L2D products (.he5): surface reflectance on a UTM grid, VNIR and SWIR joined by wavelength.

The layout is that of the PRISMA product specification: cubes (northing, band, easting) of uint16, where physical
value = minimum + stored / 65535 * (maximum - minimum) with ``L2ScaleVnirMin`` and the like; ``List_Cw_Vnir``,
``List_Fwhm_Vnir`` and their flags, in descending order, 0 where a band was not acquired; corners as the centres of
the corner pixels. Bands that were not acquired are left out. Where the two spectrometers overlap, from the shortest
wavelength of SWIR on, the bands of VNIR are flagged bad. A pixel that is 0 in every band of both is outside of the
image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers.guard_files import GuardedFile, Listing, StoredArray
from fastdiffclip.scene.readers.netcdf_cf import number, wkt2
from fastdiffclip.scene.readers.source import RasterSource

_FIELDS = "/HDFEOS/SWATHS/PRS_L2D_HCO/Data Fields"
_PIXEL = 30.0  # metres
_FULL_SCALE = 65535.0


@dataclass(frozen=True)
class _Cube:
    """One spectrometer: its array, the places of its bands that were acquired, and what they are."""

    array: StoredArray
    order: tuple[int, int, int]
    shape: tuple[int, int, int]
    kept: np.ndarray
    wavelengths: np.ndarray
    fwhm: np.ndarray
    scale: float
    offset: float


def is_prisma(listing: Listing) -> bool:
    """Tell whether a file is a PRISMA L2D product, by what it holds."""
    return f"{_FIELDS}/VNIR_Cube" in listing.arrays and f"{_FIELDS}/SWIR_Cube" in listing.arrays


def open_prisma(file: GuardedFile, listing: Listing) -> RasterSource:
    """Open the joined cube as float32 reflectance; raises InputDataError where attributes are missing or do not fit."""
    about = listing.groups["/"]
    height, width, transform = _grid(file, listing, about)
    vnir, swir = (_cube(file, listing, about, name, (height, width)) for name in ("Vnir", "Swir"))
    waves = np.concatenate([vnir.wavelengths, swir.wavelengths])
    order = np.argsort(waves, kind="stable")
    overlap = np.concatenate([vnir.wavelengths >= swir.wavelengths.min(), np.zeros(len(swir.wavelengths), bool)])
    epsg = number(about.get("Epsg_Code"))

    def stored(rows: slice) -> list[np.ndarray]:
        return [
            file.rows(cube.array.name, np.dtype(np.uint16), cube.shape, rows, axes=list(cube.order))[:, :, cube.kept]
            for cube in (vnir, swir)
        ]

    def read(rows: slice) -> np.ndarray:
        parts = [
            block * np.float32(cube.scale) + np.float32(cube.offset)
            for block, cube in zip(stored(rows), (vnir, swir), strict=True)
        ]
        return np.ascontiguousarray(np.concatenate(parts, axis=-1)[:, :, order])

    return RasterSource(
        file.path,
        height,
        width,
        len(waves),
        np.dtype(np.float32),
        read,
        read_mask=lambda rows: np.logical_or.reduce([block.any(axis=-1) for block in stored(rows)]),
        crs_wkt=None if not epsg else wkt2(file.path, f"EPSG:{epsg:.0f}"),
        affine_transform=transform,
        wavelengths=tuple(waves[order].round(6).tolist()),
        fwhm=tuple(np.concatenate([vnir.fwhm, swir.fwhm])[order].round(6).tolist()),
        bad_bands=tuple(overlap[order].tolist()) if overlap.any() else None,
        close=file.close,
    )


def _grid(file: GuardedFile, listing: Listing, about: dict[str, Any]) -> tuple[int, int, tuple[float, ...]]:
    """Return height, width and transform from the corners, which are centres of pixels of 30 m."""
    names = [f"Product_{corner}corner_{axis}" for corner in ("UL", "LR") for axis in ("easting", "northing")]
    corners = [number(about.get(name)) for name in names]
    if not all(value is not None and math.isfinite(value) for value in corners):
        raise InputDataError(f"{file.path} is a PRISMA product without {', '.join(names)}: expected a whole one")
    left, top, right, bottom = (float(value or 0.0) for value in corners)
    shape = listing.arrays[f"{_FIELDS}/VNIR_Cube"].shape
    sizes = {shape[0], shape[-1]}
    for inset in (1, 0):  # corners are centres, or in some versions outer edges
        height, width = round((top - bottom) / _PIXEL) + inset, round((right - left) / _PIXEL) + inset
        if {height, width} == sizes and len(shape) == 3:
            shift = _PIXEL / 2 * inset
            return height, width, (_PIXEL, 0.0, left - shift, 0.0, -_PIXEL, top + shift)
    raise InputDataError(
        f"{file.path}: the corners of the product span {height} x {width} pixels of 30 m and VNIR_Cube has shape "
        f"{shape}, expected (northing, band, easting): the product is damaged"
    )


def _cube(file: GuardedFile, listing: Listing, about: dict[str, Any], name: str, grid: tuple[int, int]) -> _Cube:
    array = listing.arrays[f"{_FIELDS}/{name.upper()}_Cube"]
    rows_first = (array.shape[0], array.shape[-1]) == grid
    if len(array.shape) != 3 or array.dtype != np.dtype(np.uint16) or {array.shape[0], array.shape[-1]} != set(grid):
        raise InputDataError(
            f"{file.path}:{array.name} is {array.kind} of shape {array.shape}, expected uint16 on the grid of {grid}"
        )
    bands = array.shape[1]
    lists = {key: _list(file, about, f"List_{key}_{name}", bands) for key in ("Cw", "Fwhm")}
    flags = about.get(f"List_Cw_{name}_Flags", [1] * bands)
    used = np.asarray(flags if isinstance(flags, list) and len(flags) == bands else [1] * bands, float) != 0
    kept = np.flatnonzero(used & (lists["Cw"] > 0) & (lists["Fwhm"] > 0))
    low, high = (number(about.get(f"L2Scale{name}{end}")) for end in ("Min", "Max"))
    if low is None or high is None or not 0 < high - low < math.inf or not kept.size:
        raise InputDataError(
            f"{file.path} has no usable L2Scale{name}Min and L2Scale{name}Max, or no band of {name.upper()} with a "
            "wavelength: expected a whole PRISMA L2D product"
        )
    file.check(array.name)
    return _Cube(
        array,
        (0, 2, 1) if rows_first else (2, 0, 1),
        (*grid, bands),
        kept,
        lists["Cw"][kept],
        lists["Fwhm"][kept],
        (high - low) / _FULL_SCALE,
        low,
    )


def _list(file: GuardedFile, about: dict[str, Any], name: str, bands: int) -> np.ndarray:
    values = about.get(name)
    if not isinstance(values, list) or len(values) != bands or not all(isinstance(v, int | float) for v in values):
        raise InputDataError(f"{file.path} is a PRISMA product whose {name} has not {bands} numbers: it is damaged")
    return np.nan_to_num(np.asarray(values, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
