"""MATLAB files up to version 7 in the child process, through scipy.

A member is named as in MATLAB: ``hsi.Data``, ``hsi.Lidar{1}.z``, ``plots(3).cube``; numbers count from 1 in MATLAB's
order of elements. A variable is read whole, since it is one compressed stream; the array that is asked for stays in
memory until its file is closed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from child_common import DEEPEST, Missing, Refused, alive
from scipy.io import loadmat, whosmat
from scipy.io.matlab import MatlabFunction, MatlabObject, MatlabOpaque

NUMERIC = {"double", "single", "logical"} | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
MOST_MEMBERS = 500
MOST_ELEMENTS = 32  # of a cell or struct array, that are listed
_loaded: dict[tuple[str, str], Any] = {}  # the last variable
_arrays: dict[tuple[str, str], np.ndarray] = {}


def steps(name: str) -> Iterator[tuple[str, Any]]:
    """Split ``a.b{2}(1)`` into ("field", "a"), ("field", "b"), ("cell", 2), ("element", 1)."""
    pattern = r"\{([1-9]\d{0,8})\}|\(([1-9]\d{0,8})\)|\.?([^.{}()]+)"
    # Every part but the first begins with a sign of its own, or the match would try all ways to cut a word.
    if not re.fullmatch(r"[^.{}()]+(?:\{[1-9]\d{0,8}\}|\([1-9]\d{0,8}\)|\.[^.{}()]+)*", name):
        raise Missing("is no name such as hsi.Data or hsi.Lidar{1}.z")
    for cell, element, field in re.findall(pattern, name):
        yield ("cell", int(cell)) if cell else ("element", int(element)) if element else ("field", field)


def close(path: str) -> dict[str, Any]:
    """Forget the file."""
    _loaded.clear()
    for key in [key for key in _arrays if key[0] == path]:
        del _arrays[key]
    return {}


def top(path: str) -> dict[str, Any]:
    """List the variables: rows of (name, shape, MATLAB class); reads headers only."""
    return {"variables": [[name, list(shape), kind] for name, shape, kind in whosmat(path, appendmat=False)]}


def members(path: str, name: str) -> dict[str, Any]:
    """List what lies below a struct or cell: rows of (full name, shape, class)."""
    found: list[list[Any]] = []
    _collect(name, _variable(path, name), found, 0)
    return {"variables": found}


def open(path: str, name: str) -> dict[str, Any]:
    """Load an array of numbers; return its shape and dtype."""
    value = _find(path, name)
    if _kind(value) in ("struct", "cell", "char", "function", "object", "sparse") or value.dtype.kind not in "biuf":
        raise Refused(f"is a MATLAB {_kind(value)}, expected a numeric array")
    if value.ndim not in (2, 3) or 0 in value.shape:
        raise Refused(f"has shape {value.shape}, expected (height, width) or (height, width, bands)")
    _arrays[path, name] = value
    return {"shape": list(value.shape), "dtype": value.dtype.newbyteorder("=").str}


def rows(path: str, name: str, start: int, stop: int) -> np.ndarray:
    """Return rows of an array as (rows, width, bands)."""
    if (path, name) not in _arrays:
        open(path, name)
    values = _arrays[path, name]
    block = values[start:stop].reshape(stop - start, values.shape[1], -1)
    return np.ascontiguousarray(block, values.dtype.newbyteorder("="))


def _variable(path: str, name: str) -> Any:
    if (path, name) not in _loaded:
        _loaded.clear()
        found = loadmat(path, variable_names=[name], appendmat=False, verify_compressed_data_integrity=True)
        if name not in found:
            raise Missing("is not there")
        alive()
        _loaded[path, name] = found[name]
    return _loaded[path, name]


def _find(path: str, name: str) -> Any:
    way = list(steps(name))
    here = _variable(path, way[0][1])
    for kind, key in way[1:]:
        if kind == "field":
            if _kind(here) != "struct" or key not in here.dtype.names or here.size != 1:
                raise Missing("is not there")
            here = here.ravel()[0][key]
        elif kind == "cell" and _kind(here) == "cell" and key <= here.size:
            here = here.ravel(order="F")[key - 1]
        elif kind == "element" and _kind(here) == "struct" and key <= here.size:
            here = here.ravel(order="F")[key - 1 : key]
        else:
            raise Missing("is not there")
    return here


def _kind(value: Any) -> str:
    if isinstance(value, MatlabFunction):
        return "function"
    if isinstance(value, MatlabObject | MatlabOpaque):
        return "object"
    if not isinstance(value, np.ndarray):
        return "sparse"
    if value.dtype.names is not None:
        return "struct"
    if value.dtype.kind in "OSU":
        return "cell" if value.dtype.kind == "O" else "char"
    return value.dtype.name


def _collect(name: str, value: Any, found: list[list[Any]], depth: int) -> None:
    """Append what is neither struct nor cell, depth first."""
    kind = _kind(value)
    if len(found) >= MOST_MEMBERS or depth > DEEPEST:
        return
    if kind == "struct":
        several = value.size > 1
        for number, element in enumerate(value.ravel(order="F")[:MOST_ELEMENTS], 1):
            for field in value.dtype.names:
                here = f"{name}({number})" if several else name
                _collect(f"{here}.{field}", element[field], found, depth + 1)
    elif kind == "cell":
        for number, element in enumerate(value.ravel(order="F")[:MOST_ELEMENTS], 1):
            _collect(f"{name}{{{number}}}", element, found, depth + 1)
    else:
        found.append([name, list(getattr(value, "shape", ())), kind])
