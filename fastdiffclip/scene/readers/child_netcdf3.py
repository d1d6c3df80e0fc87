"""Classic NetCDF files in the child process, through scipy; the file is mapped, so it may be larger than memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from child_common import LARGEST_VECTOR, Missing, Refused, Rows, json_value
from child_common import vector as numbers
from scipy.io import netcdf_file

_open: dict[str, netcdf_file] = {}
_rows: dict[tuple[str, str, tuple[int, int, int | None]], Rows] = {}


def _file(path: str) -> netcdf_file:
    if path not in _open:
        _open[path] = netcdf_file(path, "r", mmap=True, maskandscale=False)
    return _open[path]


def close(path: str) -> dict[str, Any]:
    """Forget the file; its mapping goes with the last array."""
    for key in [key for key in _rows if key[0] == path]:
        del _rows[key]
    file = _open.pop(path, None)
    if file is not None:
        file.variables.clear()
        file.close()
    return {}


def describe(path: str) -> dict[str, Any]:
    """List arrays and attributes in the form of :func:`child_hdf5.describe`; names and dimensions are in group /."""
    file = _file(path)
    arrays = []
    for name, variable in file.variables.items():
        data = variable.data
        real = data.dtype.kind in "biuf"
        arrays.append(
            {
                "name": f"/{name}",
                "shape": list(data.shape),
                "dtype": data.dtype.str if real else "",
                "kind": data.dtype.name if real else "text",
                "dims": [f"/{dimension}" for dimension in variable.dimensions],
                "attributes": _attributes(variable._attributes),
                "alias": False,
            }
        )
    return {"arrays": arrays, "groups": {"/": _attributes(file._attributes)}, "refused": {}}


def open(path: str, name: str) -> dict[str, Any]:
    """Check that an array is there."""
    _data(path, name)
    return {}


def rows(path: str, name: str, axes: tuple[int, int, int | None], start: int, stop: int) -> np.ndarray:
    """Return rows of an array as (rows, width, bands); ``axes`` are the places of y, x and band."""
    key = (path, name, (axes[0], axes[1], axes[2]))
    if key not in _rows:
        data = _data(path, name)
        _rows[key] = Rows(data.shape, data.dtype, key[2], data.__getitem__, None)
    return _rows[key].rows(start, stop)


def vector(path: str, name: str) -> dict[str, Any]:
    """Return all numbers of a small array."""
    data = _data(path, name)
    if data.size > LARGEST_VECTOR:
        raise Refused(f"has {data.size} values, expected at most {LARGEST_VECTOR}")
    return numbers(np.array(data))


def _data(path: str, name: str) -> np.ndarray:
    file = _file(path)
    if name.lstrip("/") not in file.variables:
        raise Missing("is not there")
    return file.variables[name.lstrip("/")].data


def _attributes(found: dict[str, Any]) -> dict[str, Any]:
    held = {name: json_value(value) for name, value in found.items()}
    return {name: value for name, value in held.items() if value is not None}
