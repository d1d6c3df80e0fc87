"""Which array of an HDF5, NetCDF or zarr file is read, and which of its axes are rows, columns and bands.

An axis is known by the name of its dimension (y, lat, lines, ...; x, lon, samples, ...; band, wavelength, ...), by its
coordinate array (``axis``, ``standard_name``, units of length for bands), or, for bands, because exactly one axis is
as long as the wavelengths that the file names. Where only the bands are known, rows come before columns. Where
nothing is known the axes are (height, width) or (height, width, bands), as in every other format, unless the last one
is not the shortest: then the user says ``FILE:/group/array@byx``, with b, y and x in the order of the axes. Axes of
length 1 beyond these are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fastdiffclip.errors import InputDataError, nearest
from fastdiffclip.scene.readers.guard_files import Listing, StoredArray
from fastdiffclip.scene.readers.source import choose_variable, listed
from fastdiffclip.scene.readers.spectral import nanometres_per_unit

_NAMES = {
    "y": {"y", "lat", "latitude", "northing", "row", "rows", "line", "lines", "height", "downtrack", "nrow", "nrows",
          "ny", "alongtrack", "yc", "ydim", "nlat"},
    "x": {"x", "lon", "longitude", "easting", "col", "cols", "column", "columns", "sample", "samples", "pixel", "width",
          "crosstrack", "ncol", "ncols", "nx", "acrosstrack", "xc", "xdim", "nlon", "long"},
    "b": {"band", "bands", "wavelength", "wavelengths", "wl", "wvl", "lambda", "channel", "channels", "spectral", "nb",
          "spectralband", "spectralbands", "nband", "nbands", "bandnumber", "spectralindex"},
}  # fmt: skip
_STANDARD = {
    "projection_y_coordinate": "y", "latitude": "y", "projection_x_coordinate": "x", "longitude": "x",
    "radiation_wavelength": "b", "sensor_band_central_radiation_wavelength": "b",
}  # fmt: skip
WAVELENGTH_NAMES = {
    "wavelength", "wavelengths", "wavlength", "wavlengths", "wavelengthnm", "wavelengthsnm", "wl", "wvl", "lambda",
    "bandwavelengths", "bandwavelength", "centralwavelength", "centralwavelengths", "centerwavelength",
    "centerwavelengths", "bandcenters", "bandcentres",
}  # fmt: skip


@dataclass(frozen=True)
class Axes:
    """Places of rows, columns and bands among the axes of an array; band is None where there is none."""

    y: int
    x: int
    band: int | None


def plain(name: str) -> str:
    """Return the last part of a path in small letters without separators, as names are compared."""
    return re.sub(r"[^a-z0-9]", "", name.rsplit("/", 1)[-1].lower())


def find_array(path: Path, listing: Listing, wanted: str | None) -> tuple[StoredArray, str | None]:
    """Return the array of a spec ``/group/name[@axes]`` and its axes; its only raster where nothing is wanted.

    A name without its groups will do where it is the only one. Raises InputDataError that lists the rasters.
    """
    name, axes = wanted, None
    if wanted is not None and wanted not in listing.arrays:
        head, at, tail = wanted.rpartition("@")
        if at and re.fullmatch(r"(?:b|y|x){2,3}", tail):
            name, axes = head, tail
    rasters = {
        known: (tuple(array.shape[axis] for axis in trimmed(array)), array.kind)
        for known, array in _rasters(listing).items()
    }
    if name is not None:
        full = "/" + name.strip("/")
        for place, reason in listing.refused.items():
            if full == place or full.startswith(f"{place}/"):
                raise InputDataError(f"{path}:{place} {reason}")
        same = [known for known, array in listing.arrays.items() if known.endswith(full) and not array.alias]
        if full in listing.arrays or len(same) == 1:
            return listing.arrays[full if full in listing.arrays else same[0]], axes
        raise InputDataError(
            f"{path} has no array '{name}'{nearest(full, list(rasters))}; it holds {listed(rasters) or 'no raster'}"
        )
    if not rasters and listing.refused:
        place, reason = next(iter(listing.refused.items()))
        raise InputDataError(f"{path}:{place} {reason}")
    return listing.arrays[choose_variable(path, None, rasters)], None


def _rasters(listing: Listing) -> dict[str, StoredArray]:
    """Return the arrays that may be rasters; not coordinates, bounds and the like."""
    helpers: set[str] = set()
    for array in listing.arrays.values():
        for key in ("coordinates", "bounds", "grid_mapping", "ancillary_variables"):
            words = array.attributes.get(key)
            found = [listing.nearby(array.name, word) for word in words.split()] if isinstance(words, str) else []
            helpers |= {other.name for other in found if other is not None}
    return {
        name: array
        for name, array in listing.arrays.items()
        if array.dtype is not None and not array.alias and name not in helpers and len(trimmed(array)) in (2, 3)
    }


def trimmed(array: StoredArray) -> list[int]:
    """Return the places of the axes that count: all of 2 or 3, else those longer than 1 and those with a role."""
    axes = list(range(len(array.shape)))
    told = set().union(*_NAMES.values())
    spare = [axis for axis in axes if array.shape[axis] == 1 and plain(array.dims[axis]) not in told]
    while len(axes) > 3 and spare:
        axes.remove(spare.pop(0))
    return axes


def find_axes(what: str, array: StoredArray, listing: Listing, given: str | None) -> Axes:
    """Settle the axes of an array; raises InputDataError where it is no raster or nothing tells them apart."""
    if array.dtype is None:
        raise InputDataError(f"{what} holds {array.kind}, expected real numbers: convert it first")
    axes = trimmed(array)
    if len(axes) not in (2, 3) or 0 in array.shape:
        raise InputDataError(
            f"{what} has shape {array.shape}, expected (height, width) or (height, width, bands) in any order"
        )
    if given is not None:
        if sorted(given) != sorted("yxb"[: len(axes)]):
            letters = ", ".join("yxb"[: len(axes)])
            raise InputDataError(f"{what} has {len(axes)} axes, expected '@' and each of {letters} once")
        roles: dict[str, int] = dict(zip(given, axes, strict=True))
    else:
        roles = _roles(array, axes, listing)
        _complete(what, array, axes, listing, roles)
    return Axes(roles["y"], roles["x"], roles.get("b"))


def _roles(array: StoredArray, axes: list[int], listing: Listing) -> dict[str, int]:
    """Return the axes that names and coordinates tell, each role once."""
    told = {axis: _role(array, array.dims[axis], listing) for axis in axes}
    roles: dict[str, int] = {}
    for axis, role in told.items():
        if role and list(told.values()).count(role) == 1:
            roles[role] = axis
    if len(axes) == 2 and "b" in roles:  # a plane has no bands
        del roles["b"]
    return roles


def _role(array: StoredArray, dim: str, listing: Listing) -> str | None:
    for role, names in _NAMES.items():
        if plain(dim) in names:
            return role
    values = listing.nearby(array.name, dim) if dim else None
    if values is None:
        return None
    axis, standard, units = (str(values.attributes.get(key, "")) for key in ("axis", "standard_name", "units"))
    if axis.lower() in ("x", "y"):
        return axis.lower()
    return _STANDARD.get(standard, "b" if nanometres_per_unit(units) is not None else None)


def _complete(what: str, array: StoredArray, axes: list[int], listing: Listing, roles: dict[str, int]) -> None:
    """Add the roles that follow from those that are known."""
    if len(axes) == 3 and "b" not in roles:
        rest = [axis for axis in axes if axis not in roles.values()]
        if len(rest) == 1:
            roles["b"] = rest[0]
        else:
            roles["b"] = _band_axis(what, array, rest, axes, listing)
    rest = [axis for axis in axes if axis not in roles.values()]
    for role in [role for role in "yx" if role not in roles]:
        roles[role] = rest.pop(0)


def _band_axis(what: str, array: StoredArray, rest: list[int], axes: list[int], listing: Listing) -> int:
    vectors = [other.shape for name, other in listing.arrays.items() if plain(name) in WAVELENGTH_NAMES]
    lengths = {shape[0] for shape in vectors if len(shape) == 1}
    lists = [value for key, value in array.attributes.items() if plain(key) in WAVELENGTH_NAMES]
    lengths |= {len(value) for value in lists if isinstance(value, list)}
    fitting = [axis for axis in rest if array.shape[axis] in lengths]
    if len(fitting) == 1:
        return fitting[0]
    size = {axis: array.shape[axis] for axis in axes}
    single = [axis for axis in rest if size[axis] == 1]
    if len(single) == 1:
        return single[0]
    if rest[-1] == axes[-1] and size[axes[-1]] == min(size.values()):
        return axes[-1]
    raise InputDataError(
        f"{what} has the shape {' x '.join(map(str, array.shape))} and does not say which axis holds the bands: say it "
        f"as in {what}@byx (bands, rows, columns) or @yxb"
    )
