"""MATLAB 7.3 files in the child process: HDF5 whose axes are reversed, structs as groups, cells as references.

Names are those of :mod:`child_matlab5`. A struct array is a group whose data sets hold one reference per element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from child_common import DEEPEST, LARGEST_VECTOR, Missing, Refused, Rows
from child_hdf5 import check, kind_of, open_file, resolve, rows_of
from child_hdf5 import close as close_file
from child_matlab5 import MOST_ELEMENTS, MOST_MEMBERS, NUMERIC, steps

_HIDDEN = ("#refs#", "#subsystem#")
_ready: dict[tuple[str, str], Rows] = {}


@dataclass(frozen=True)
class _Element:
    """One element of a struct array."""

    group: h5py.Group
    number: int


def close(path: str) -> dict[str, Any]:
    """Forget the file."""
    for key in [key for key in _ready if key[0] == path]:
        del _ready[key]
    return close_file(path)


def top(path: str) -> dict[str, Any]:
    """List the variables: rows of (name, shape, MATLAB class); empty where nothing says that MATLAB wrote it."""
    file = open_file(path)
    items = {name: resolve(file, name) for name in file if name not in _HIDDEN}
    if not any("MATLAB_class" in item.attrs for item in items.values()):
        return {"variables": []}
    return {"variables": [[name, list(_shape(item)), _kind(item)] for name, item in items.items()]}


def members(path: str, name: str) -> dict[str, Any]:
    """List what lies below a struct or cell: rows of (full name, shape, class)."""
    found: list[list[Any]] = []
    _collect(name, resolve(open_file(path), name), found, 0)
    return {"variables": found}


def open(path: str, name: str) -> dict[str, Any]:
    """Find an array of numbers; return its MATLAB shape and dtype."""
    item = _find(open_file(path), name)
    kind = _kind(item)
    if not isinstance(item, h5py.Dataset) or not kind_of(item)[0] or kind not in {*NUMERIC, item.dtype.name}:
        raise Refused(f"is a MATLAB {kind}, expected a numeric array")
    check(item)
    shape = _shape(item)
    if len(shape) not in (2, 3) or 0 in shape:
        raise Refused(f"has shape {shape}, expected (height, width) or (height, width, bands)")
    if item.ndim == 1:  # MATLAB writes none; others do, and MATLAB shows it as a column
        if item.size > LARGEST_VECTOR:
            raise Refused(f"has {item.size} elements in one dimension, expected at most {LARGEST_VECTOR}")
        _ready[path, name] = Rows((1, item.size), item.dtype, (1, 0, None), item[()][None].__getitem__, None)
    else:
        _ready[path, name] = rows_of(item, (1, 0, None) if len(shape) == 2 else (2, 1, 0))
    return {"shape": list(shape), "dtype": item.dtype.newbyteorder("=").str}


def rows(path: str, name: str, start: int, stop: int) -> np.ndarray:
    """Return rows of an array as (rows, width, bands)."""
    if (path, name) not in _ready:
        open(path, name)
    return _ready[path, name].rows(start, stop)


def _find(file: h5py.File, name: str) -> h5py.HLObject | _Element:
    here: h5py.HLObject | _Element = file
    for kind, key in steps(name):
        if kind == "field":
            here = _field(here, key)
        elif kind == "cell" and _kind(here) == "cell":
            here = _pointed_at(here, key)
        elif kind == "element" and isinstance(here, h5py.Group) and _array_fields(here):
            here = _Element(here, key)
        elif not (kind == "element" and isinstance(here, h5py.Group) and key == 1):
            raise Missing("is not there")
    return here


def _field(here: h5py.HLObject | _Element, name: str) -> h5py.HLObject:
    if isinstance(here, _Element):
        return _pointed_at(resolve(here.group, name), here.number)
    if not isinstance(here, h5py.Group) or name in _HIDDEN or _array_fields(here):
        raise Missing("is not there")
    return resolve(here, name)


def _pointed_at(references: h5py.HLObject, number: int) -> h5py.HLObject:
    """Return what the numbered reference of a data set leads to; the file's order is MATLAB's."""
    if not _holds_references(references) or number > references.size:
        raise Missing("is not there")
    check(references)
    if references.size > LARGEST_VECTOR:
        raise Refused(f"has {references.size} elements, expected at most {LARGEST_VECTOR}")
    return references.file[references[()].ravel()[number - 1]]


def _holds_references(item: Any) -> bool:
    return isinstance(item, h5py.Dataset) and kind_of(item)[1] == "reference"


def _array_fields(group: h5py.Group) -> list[h5py.Dataset]:
    """Return the fields of a struct array, nothing for a scalar struct: its cells say that they are cells."""
    fields = [resolve(group, name) for name in group if name not in _HIDDEN]
    plain = all(_holds_references(field) and "MATLAB_class" not in field.attrs for field in fields)
    return fields if plain else []


def _kind(item: h5py.HLObject | _Element) -> str:
    if isinstance(item, _Element):
        return "struct"
    if "MATLAB_sparse" in item.attrs:
        return "sparse"
    if "MATLAB_object_decode" in item.attrs:
        return "object"
    named = item.attrs.get("MATLAB_class", "struct" if isinstance(item, h5py.Group) else b"")
    word = named.decode("utf-8", "replace") if isinstance(named, bytes) else str(named)
    if isinstance(item, h5py.Dataset):
        dtype, kind = kind_of(item)
        return word if word and (dtype or word not in NUMERIC) else kind
    return word


def _shape(item: h5py.HLObject | _Element) -> tuple[int, ...]:
    """Return the shape as MATLAB shows it."""
    if isinstance(item, h5py.Group):
        fields = _array_fields(item)
        return _shape(fields[0]) if fields else (1, 1)
    if not isinstance(item, h5py.Dataset) or item.shape is None:
        return (0, 0)
    if item.attrs.get("MATLAB_empty") and item.size <= DEEPEST:
        return tuple(int(size) for size in item[()].ravel())
    return (item.size, 1) if item.ndim == 1 else tuple(reversed(item.shape))


def _collect(name: str, item: h5py.HLObject | _Element, found: list[list[Any]], depth: int) -> None:
    """Append what is neither struct nor cell, depth first."""
    if len(found) >= MOST_MEMBERS or depth > DEEPEST:
        return
    if isinstance(item, h5py.Group) and _kind(item) == "struct":
        fields = _array_fields(item)
        for number in range(1, 1 + min(MOST_ELEMENTS, fields[0].size if fields else 0)):
            element = _Element(item, number)
            for field in item:
                _collect(f"{name}({number}).{field}", _field(element, field), found, depth + 1)
        for field in [] if fields else [field for field in item if field not in _HIDDEN]:
            _collect(f"{name}.{field}", resolve(item, field), found, depth + 1)
    elif isinstance(item, h5py.Dataset) and _kind(item) == "cell" and _holds_references(item):
        for number in range(1, 1 + min(MOST_ELEMENTS, item.size)):
            _collect(f"{name}{{{number}}}", _pointed_at(item, number), found, depth + 1)
    else:
        found.append([name, list(_shape(item)), _kind(item)])
