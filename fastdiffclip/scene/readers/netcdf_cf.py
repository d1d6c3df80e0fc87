"""What the attributes of an array say by the CF conventions (NetCDF, HDF5, zarr) and by GeoZarr.

``_FillValue``, ``missing_value``; ``scale_factor``, ``add_offset``; ``_Unsigned``; ``flag_values`` with
``flag_meanings``; wavelengths, fwhm and good bands from attributes, coordinate arrays or arrays of those names as long
as the bands; CRS from the grid mapping's ``crs_wkt`` or ``spatial_ref``, from ``proj:wkt2``, ``proj:code`` or GDAL's
``_CRS``; the transform from coordinate arrays with regular steps, else from ``GeoTransform`` or ``spatial:transform``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers.guard_files import GuardedFile, Listing, StoredArray
from fastdiffclip.scene.readers.hdf5_arrays import WAVELENGTH_NAMES, Axes, plain
from fastdiffclip.scene.readers.quiet import quiet_gdal
from fastdiffclip.scene.readers.spectral import guessed_factor, in_nanometres, nanometres_per_unit

_FWHM_NAMES = {"fwhm", "fwhms", "bandwidth", "bandwidths", "fwhmnm"}
_GOOD_NAMES = {"goodwavelengths", "goodbands", "bbl"}
_NODATA = ("_FillValue", "missing_value", "nodata", "no_data", "nodata_value", "Data_Ignore_Value", "data_ignore_value")
_LONGEST_CRS = 2**16
_EVEN = 1e-3  # of a step; float32 coordinates are allowed their rounding besides


@dataclass(frozen=True)
class Georeference:
    """CRS as WKT2, transform (a, b, c, d, e, f) of pixel corners; ``south_up``: rows stand in the reverse order."""

    crs_wkt: str | None = None
    affine_transform: tuple[float, ...] | None = None
    south_up: bool = False
    warnings: tuple[str, ...] = ()


def number(value: Any) -> float | None:
    """Return an attribute that is one number, None for anything else."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def nodata(array: StoredArray) -> float | None:
    """Return the value that stands for no data, in stored units."""
    found = (_fill(array, array.attributes.get(key)) for key in _NODATA)
    return next((value for value in found if value is not None), None)


def _fill(array: StoredArray, value: Any) -> float | None:
    if isinstance(value, str) and array.dtype is not None:
        return _spelt_fill(value)
    known = number(value)
    if known is not None and known < 0 and unsigned(array) is not None:
        known += 2.0 ** (8 * unsigned(array).itemsize)  # type: ignore[union-attr]
    return known


def _spelt_fill(value: str) -> float | None:
    """Read a number in text: plain, or as xarray writes it to zarr v3, the base64 of a double."""
    import base64
    import binascii
    import struct

    try:
        return float(value)
    except ValueError:
        pass
    try:
        return float(struct.unpack("<d", base64.b64decode(value, validate=True))[0])
    except (struct.error, binascii.Error, ValueError):
        return None


def unsigned(array: StoredArray) -> np.dtype | None:
    """Return the dtype of an integer array that is to be taken as unsigned, None where it is what it says."""
    if array.dtype is None or array.dtype.kind != "i" or str(array.attributes.get("_Unsigned", "")).lower() != "true":
        return None
    return np.dtype(f"u{array.dtype.itemsize}")


def scaling(array: StoredArray) -> tuple[float, float]:
    """Return scale and offset; 1 and 0 where the array names none that is of use."""
    scale, offset = number(array.attributes.get("scale_factor")), number(array.attributes.get("add_offset"))
    if scale is None or not math.isfinite(scale) or scale == 0:
        scale = 1.0
    return scale, offset if offset is not None and math.isfinite(offset) else 0.0


def class_names(array: StoredArray) -> dict[int, str]:
    """Return the names of ``flag_values``."""
    values, words = array.attributes.get("flag_values"), array.attributes.get("flag_meanings")
    if not isinstance(words, str) or not isinstance(values, list) or len(words.split()) != len(values):
        return {}
    named = zip(map(number, values), words.split(), strict=True)
    return {int(value): word for value, word in named if value is not None and value in range(2**16)}


@dataclass(frozen=True)
class Spectrum:
    """Per band: wavelength and fwhm in nm, True where it is bad; None where it is not said."""

    wavelengths: tuple[float, ...] | None = None
    fwhm: tuple[float, ...] | None = None
    bad_bands: tuple[bool, ...] | None = None
    warnings: tuple[str, ...] = ()


def spectrum(file: GuardedFile, listing: Listing, array: StoredArray, axes: Axes) -> Spectrum:
    """Return what the file says of the bands of an array."""
    if axes.band is None:
        return Spectrum()
    waves, unit = _per_band(file, listing, array, axes.band, WAVELENGTH_NAMES)
    widths, own_unit = _per_band(file, listing, array, axes.band, _FWHM_NAMES)
    good, _ = _per_band(file, listing, array, axes.band, _GOOD_NAMES)
    bad = tuple(value == 0 for value in good) if good is not None and set(good) <= {0.0, 1.0} else None
    if waves is None:
        return Spectrum(bad_bands=None if bad is None or all(bad) else bad)
    factor = nanometres_per_unit(unit) if unit else guessed_factor(waves)
    if factor is None or not all(math.isfinite(value) and value > 0 for value in waves):
        what = f"in '{unit}'" if factor is None else "that are not positive numbers"
        return Spectrum(warnings=(f"{file.path}: the wavelengths of {array.name} are left out, they are given {what}",))
    own_factor = nanometres_per_unit(own_unit) if own_unit else factor
    fitting = widths is not None and own_factor is not None and all(math.isfinite(v) and v > 0 for v in widths)
    return Spectrum(
        in_nanometres(waves, factor),
        in_nanometres(widths, own_factor) if fitting and widths and own_factor else None,
        None if bad is None or all(bad) else bad,
    )


def _per_band(
    file: GuardedFile, listing: Listing, array: StoredArray, axis: int, names: set[str]
) -> tuple[list[float] | None, str]:
    """Return one number per band and their unit, from attributes, the coordinate or an array of such a name."""
    size = array.shape[axis]
    for key, value in array.attributes.items():
        held = [number(item) for item in value] if plain(key) in names and isinstance(value, list) else []
        known = [item for item in held if item is not None]
        if len(known) == len(held) == size:
            units = (f"{key}_units", f"{key}_unit", f"{key.rstrip('s')}_units", f"{key.rstrip('s')}_unit")
            return known, str(next((array.attributes[u] for u in units if u in array.attributes), ""))
    found: list[tuple[list[float], str]] = []
    for other in _candidates(listing, array, axis, names):
        values = file.vector(other.name).tolist()
        if other.dims and other.dims[0] and other.dims[0] == array.dims[axis]:
            return values, str(other.attributes.get("units", ""))
        if values not in [known for known, _ in found]:
            found.append((values, str(other.attributes.get("units", ""))))
    return found[0] if len(found) == 1 else (None, "")


def _candidates(listing: Listing, array: StoredArray, axis: int, names: set[str]) -> Iterator[StoredArray]:
    """Yield arrays as long as the bands: the band axis' coordinate first, then those of a fitting name."""
    own = listing.nearby(array.name, array.dims[axis]) if array.dims[axis] else None
    if own is not None and own.shape == (array.shape[axis],) and own.dtype is not None:
        is_length = nanometres_per_unit(str(own.attributes.get("units", ""))) is not None
        if is_length and names is WAVELENGTH_NAMES:
            yield own
    for other in listing.arrays.values():
        fits = math.prod(other.shape) == array.shape[axis] and other.dtype is not None and not other.alias
        if fits and plain(other.name) in names:
            yield other


def georeference(file: GuardedFile, listing: Listing, array: StoredArray, axes: Axes) -> Georeference:
    """Return where an array lies; raises InputDataError for a CRS that cannot be understood."""
    mapping = _grid_mapping(listing, array)
    inherited = _inherited(listing, array)
    wkt = next((mapping[key] for key in ("crs_wkt", "spatial_ref") if isinstance(mapping.get(key), str)), None)
    for key in ("proj:wkt2", "proj:code", "proj:epsg"):
        if wkt is None and key in inherited:
            wkt = f"EPSG:{inherited[key]}" if key == "proj:epsg" else str(inherited[key])
    gdal = inherited.get("_CRS")
    if wkt is None and isinstance(gdal, dict):
        wkt = next((gdal[key] for key in ("wkt", "url") if isinstance(gdal.get(key), str)), None)
    columns, rows = (_coordinates(file, listing, array, axis) for axis in (axes.x, axes.y))
    transform = _from_steps(columns, rows)
    uneven = transform is None and columns is not None and rows is not None
    if transform is None and not uneven:
        transform = from_numbers(mapping.get("GeoTransform"), gdal=True)
    if transform is None and not uneven:
        transform = from_numbers(inherited.get("spatial:transform"), gdal=False)
    south_up = transform is not None and transform[4] > 0 and transform[3] == 0
    if transform is not None and south_up:
        a, b, c, d, e, f = transform
        transform = (a, b, c, d, -e, f + e * array.shape[axes.y])
    told = (f"{file.path}: the coordinates of {array.name} are unevenly spaced, so its place on the map is left out",)
    return Georeference(None if wkt is None else wkt2(file.path, wkt), transform, south_up, told if uneven else ())


def wkt2(path: Path, text: str) -> str:
    """Return a CRS, given as WKT, PROJJSON or EPSG:n, as WKT2."""
    from rasterio.crs import CRS

    try:
        if len(text) > _LONGEST_CRS:
            raise ValueError(f"it is {len(text)} characters long")
        with quiet_gdal():
            return str(CRS.from_user_input(text).to_wkt(version="WKT2_2019"))
    except (ValueError, OverflowError) as error:  # CRSError is a ValueError
        shown = " ".join(str(error).split())[:200]
        raise InputDataError(f"{path} names a CRS that cannot be understood ({shown}): mend or convert it") from error


def _grid_mapping(listing: Listing, array: StoredArray) -> dict[str, Any]:
    """Return the attributes of the array's grid mapping, or of the only one that nobody refers to."""
    named = array.attributes.get("grid_mapping")
    if isinstance(named, str) and named.strip():
        found = listing.nearby(array.name, re.split(r"[:\s]", named.strip())[0])
        return found.attributes if found is not None else {}
    usual = [
        other.attributes
        for other in listing.arrays.values()
        if plain(other.name) in ("spatialref", "crs") and {"crs_wkt", "spatial_ref"} & set(other.attributes)
    ]
    return usual[0] if len(usual) == 1 else {}


def _inherited(listing: Listing, array: StoredArray) -> dict[str, Any]:
    """Return attributes of the array and, where it has none of a name, of the groups that hold it."""
    found = dict(array.attributes)
    group = array.name
    while group:
        group = group.rpartition("/")[0]
        for key, value in listing.groups.get(group or "/", {}).items():
            found.setdefault(key, value)
    return found


@dataclass(frozen=True)
class _Coordinates:
    """Pixel centres along an axis, and how far rounding may have moved them."""

    values: np.ndarray
    rounding: float


def _coordinates(file: GuardedFile, listing: Listing, array: StoredArray, axis: int) -> _Coordinates | None:
    other = listing.nearby(array.name, array.dims[axis]) if array.dims[axis] else None
    if other is None or other.dtype is None or other.shape != (array.shape[axis],) or other.shape[0] < 2:
        return None
    scale, offset = scaling(other)
    with np.errstate(over="ignore", invalid="ignore"):
        values = file.vector(other.name) * scale + offset
    if values[0] == values[-1]:  # never written
        return None
    if other.dtype.itemsize > 4 or not np.isfinite(values).all():
        return _Coordinates(values, 0.0)
    return _Coordinates(values, float(4 * np.finfo(np.float32).eps * np.abs(values).max()))


def _from_steps(columns: _Coordinates | None, rows: _Coordinates | None) -> tuple[float, ...] | None:
    """Return the transform of coordinates with regular steps."""
    found = []
    for axis in (columns, rows):
        if axis is None or not np.isfinite(axis.values).all():
            return None
        first, count = axis.values[0], len(axis.values)
        with np.errstate(over="ignore", invalid="ignore"):
            step = (axis.values[-1] - first) / (count - 1)
            strayed = np.abs(axis.values - (first + step * np.arange(count)))
        if not (strayed <= _EVEN * abs(step) + axis.rounding).all():
            return None
        found.append((float(first), float(step)))
    (left, wide), (top, high) = found
    return (wide, 0.0, left - wide / 2, 0.0, high, top - high / 2)


def from_numbers(value: Any, gdal: bool) -> tuple[float, ...] | None:
    """Return six numbers, in a text or a list, as a transform; GDAL's order is c, a, b, f, d, e."""
    words = value.split() if isinstance(value, str) else value if isinstance(value, list) else []
    try:
        found = [float(word) for word in words][:6]
    except (TypeError, ValueError, OverflowError):
        return None
    if len(found) != 6 or not all(map(math.isfinite, found)):
        return None
    c, a, b, f, d, e = found if gdal else (found[2], found[0], found[1], found[5], found[3], found[4])
    return (a, b, c, d, e, f) if a * e - b * d else None
