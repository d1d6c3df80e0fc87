"""MATLAB files, version 7.3 (HDF5) included, by variable or member: ``FILE.mat:hsi``, ``FILE.mat:hsi.Data``.

Members are named as in MATLAB, counted from 1: ``hsi.Lidar{1}.z`` for a cell, ``plots(3).cube`` for an array of
structs. An HDF5 file that MATLAB did not write is read as HDF5. Wavelengths and fwhm come from vectors of such a name
beside the array or in a struct ``info`` (or ``meta``, ``header``) beside it, where they are unambiguous.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers import guard
from fastdiffclip.scene.readers.guard_files import GuardedFile
from fastdiffclip.scene.readers.hdf5 import is_hdf5, open_hdf5
from fastdiffclip.scene.readers.hdf5_arrays import WAVELENGTH_NAMES, plain
from fastdiffclip.scene.readers.source import NUMERIC_TYPES, RasterSource, choose_variable, listed
from fastdiffclip.scene.readers.spectral import guessed_factor, in_nanometres

Variables = dict[str, tuple[tuple[int, ...], str]]  # name -> shape, MATLAB class

_NESTED = ("struct", "cell")
_ABOUT = {"info", "meta", "metadata", "header", "hdr"}


def open_matlab(path: Path, variable: str | None) -> RasterSource:
    """Open one variable or member of a .mat file, (H, W) or (H, W, bands), or its only raster."""
    newer = is_hdf5(path) or _begins_like_73(path)
    file = GuardedFile(path, "matlab73" if newer else "matlab5", "a MATLAB 7.3 file" if newer else "a MATLAB file")
    try:
        found = _variables(file, "top", guard.HEADER_TIME_S)
        if newer and not found:
            file.close()
            return open_hdf5(path, variable)
        return _open(file, found, variable)
    except BaseException:
        file.close()
        raise


def _begins_like_73(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(10) == b"MATLAB 7.3"


def _variables(file: GuardedFile, call: str, seconds: float, **arguments: Any) -> Variables:
    rows = file.call(call, seconds, str(file.path), **arguments)["variables"]
    return {name: (tuple(shape), kind) for name, shape, kind in rows}


def _members(file: GuardedFile, found: Variables, name: str) -> Variables:
    """Return what lies below a variable, rasters first."""
    below = _variables(file, "members", guard.DATA_TIME_S, name=name) if found.get(name, ((), ""))[1] in _NESTED else {}
    return dict(sorted(below.items(), key=lambda item: not _is_raster(*item[1])))


def _is_raster(shape: tuple[int, ...], kind: str) -> bool:
    return len(shape) in (2, 3) and kind in NUMERIC_TYPES


def _open(file: GuardedFile, found: Variables, variable: str | None) -> RasterSource:
    if variable is None and not _wide(found):
        for name in list(found):
            found |= _members(file, found, name)
    name = variable or _only_raster(file.path, found)
    what = f"variable '{name}' of {file.path}"
    if found.get(name, ((), ""))[1] in _NESTED:
        below = listed(_members(file, found, name))
        raise InputDataError(
            f"{what} is a MATLAB {found[name][1]}, expected a numeric array: name one of its members, {below}"
        )
    try:
        opened = file.call("open", guard.DATA_TIME_S, what, name=name)
    except guard.MissingArray as error:
        known = found | _members(file, found, _root(name))
        choose_variable(file.path, name, known)
        raise error
    shape, dtype = tuple(opened["shape"]), np.dtype(opened["dtype"])
    full = (shape[0], shape[1], shape[2] if len(shape) == 3 else 1)
    waves, widths = _spectrum(file, found, name, full[2])
    return RasterSource(
        file.path,
        *full,
        dtype,
        lambda rows: file.rows(name, dtype, full, rows),
        wavelengths=waves,
        fwhm=widths,
        close=file.close,
    )


def _only_raster(path: Path, found: Variables) -> str:
    """Return the only raster, or the only one that is not a vector or a single number, which MATLAB makes 2-D too."""
    wide = _wide(found)
    return wide[0] if len(wide) == 1 else choose_variable(path, None, found)


def _wide(found: Variables) -> list[str]:
    return [name for name, (shape, kind) in found.items() if _is_raster(shape, kind) and min(shape[:2]) > 1]


def _root(name: str) -> str:
    return name.split(".")[0].split("{")[0].split("(")[0]


def _spectrum(
    file: GuardedFile, found: Variables, name: str, bands: int
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return wavelengths and fwhm in nm from vectors beside an array, None where there are none or several."""
    if bands < 2:
        return None, None
    group = name.rpartition(".")[0]
    if group:
        known = _members(file, found, _root(name))
    else:
        known = dict(found)
        for other in found:
            known |= _members(file, found, other) if plain(other) in _ABOUT else {}
    places = {f"{group}.".lstrip(".")} | {f"{group}.{about}.".lstrip(".") for about in _abouts(known, group)}
    waves = _vector(file, known, places, WAVELENGTH_NAMES, bands)
    widths = _vector(file, known, places, {"fwhm"}, bands)
    if waves is None:
        return None, None
    factor = guessed_factor(waves)
    return in_nanometres(waves, factor), None if widths is None else in_nanometres(widths, factor)


def _abouts(known: Variables, group: str) -> set[str]:
    """Return the names of structs beside the array that tell about it."""
    start = f"{group}." if group else ""
    beside = {name.removeprefix(start).partition(".")[0] for name in known if name.startswith(start)}
    return {name for name in beside if plain(name) in _ABOUT}


def _vector(file: GuardedFile, known: Variables, places: set[str], names: set[str], bands: int) -> list[float] | None:
    found: list[list[float]] = []
    for name, (shape, kind) in known.items():
        place, dot, last = name.rpartition(".")
        if place + dot in places and plain(last) in names and math.prod(shape) == bands and kind in NUMERIC_TYPES:
            values = _values(file, name, shape)
            if values not in found:
                found.append(values)
    good = len(found) == 1 and all(math.isfinite(value) and value > 0 for value in found[0])
    return found[0] if good else None


def _values(file: GuardedFile, name: str, shape: tuple[int, ...]) -> list[float]:
    opened = file.call("open", guard.DATA_TIME_S, f"variable '{name}' of {file.path}", name=name)
    block = file.rows(name, np.dtype(opened["dtype"]), (shape[0], shape[1], 1), slice(0, shape[0]))
    return block.astype(np.float64).ravel().tolist()
