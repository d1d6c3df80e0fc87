"""HDF5 and NetCDF4 in the child process: what a file holds, and rows of its arrays.

Links are resolved here, never by the library, so nothing outside the file is opened: external links, external storage
and virtual data sets are refused. Filters are those that come with h5py; plugins are switched off by the parent's
choice of environment.
"""

from __future__ import annotations

import math
from typing import Any

import h5py
import numpy as np
from child_common import (
    DEEPEST,
    LARGEST_ATTRIBUTE,
    LARGEST_VECTOR,
    MOST_OBJECTS,
    Missing,
    Refused,
    Rows,
    alive,
    check_size,
    json_value,
)
from child_common import vector as numbers

_FILTERS = {1: "deflate", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf"}
_EXTERNAL = "is a link to another file, which is not followed: give that file"
_open: dict[str, h5py.File] = {}
_rows: dict[tuple[str, str, tuple[int, int, int | None]], Rows] = {}


def open_file(path: str) -> h5py.File:
    """Return the file, kept open until :func:`close`."""
    if path not in _open:
        _open[path] = h5py.File(path, "r", locking=False)
    return _open[path]


def close(path: str) -> dict[str, Any]:
    """Forget the file."""
    for key in [key for key in _rows if key[0] == path]:
        del _rows[key]
    file = _open.pop(path, None)
    if file is not None:
        file.close()
    return {}


def describe(path: str) -> dict[str, Any]:
    """List arrays (name, shape, dtype or a word, dimensions, attributes), groups' attributes and refused links."""
    file = open_file(path)
    found: dict[str, Any] = {"arrays": [], "groups": {"/": _attributes(file)}, "refused": {}}
    seen = {_address(file)}
    waiting: list[tuple[str, h5py.Group, int]] = [("", file, 0)]
    while waiting:
        prefix, group, depth = waiting.pop(0)
        for name in group:
            full = f"{prefix}/{name}"
            try:
                item = resolve(file, full)
                described = _description(full, item) if isinstance(item, h5py.Dataset) else {}
            except (Refused, Missing) as error:
                found["refused"][full] = str(error)
                continue
            except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
                found["refused"][full] = f"cannot be read, it may be truncated or damaged ({error}): copy it again"
                continue
            if len(found["arrays"]) + len(found["groups"]) + len(found["refused"]) > MOST_OBJECTS:
                raise Refused(f"holds more than {MOST_OBJECTS} objects")
            alive()
            alias = item.name != full or _address(item) in seen
            if not alias:
                seen.add(_address(item))
            if isinstance(item, h5py.Dataset):
                found["arrays"].append({**described, "alias": alias})
            elif isinstance(item, h5py.Group) and depth < DEEPEST and not alias:
                found["groups"][full] = _attributes(item)
                waiting.append((full, item, depth + 1))
    return found


def resolve(group: h5py.Group, path: str, depth: int = 0) -> h5py.HLObject:
    """Return the object at a path from a group; soft links are followed within the file, no link leaves it."""
    if depth > DEEPEST:
        raise Refused("is a link that leads round in a circle")
    here: h5py.HLObject = group.file if path.startswith("/") else group
    for name in path.split("/"):
        if name in ("", "."):
            continue
        if not isinstance(here, h5py.Group) or not here.id.links.exists(name.encode()):
            raise Missing("is not there")
        kind = here.id.links.get_info(name.encode()).type
        if kind == h5py.h5l.TYPE_SOFT:
            here = resolve(here, here.id.links.get_val(name.encode()).decode(), depth + 1)
        elif kind == h5py.h5l.TYPE_HARD:
            here = here[name]
        else:
            raise Refused(_EXTERNAL)
    return here


def find(file: h5py.File, name: str) -> h5py.Dataset:
    """Return the data set of that name; Missing where there is none."""
    item = resolve(file, name)
    if not isinstance(item, h5py.Dataset):
        raise Missing("is no array")
    return item


def check(dataset: h5py.Dataset) -> None:
    """Refuse a data set that is stored elsewhere, needs an unknown filter or declares too much."""
    properties = dataset.id.get_create_plist()
    layout = properties.get_layout()
    if layout == h5py.h5d.VIRTUAL:
        raise Refused("is a virtual data set, made of other files: give those, or store the values in one file")
    if layout == h5py.h5d.CONTIGUOUS and properties.get_external_count():
        raise Refused("keeps its values in other files, which are not opened: store them in one file")
    for place in range(properties.get_nfilters()):
        code, _, _, text = properties.get_filter(place)
        if code not in _FILTERS:
            label = f"{code} {text.decode('utf-8', 'replace')}".strip()
            raise Refused(f"is compressed with the HDF5 filter {label}, which is not read: use 'h5repack -f GZIP=4'")
    if dataset.shape is None:
        raise Refused("is empty")
    held = dataset.id.get_storage_size()
    if dataset.chunks is not None:
        held = dataset.id.get_num_chunks() * math.prod(dataset.chunks) * dataset.dtype.itemsize
    check_size(dataset.shape, dataset.dtype.itemsize, held, dataset.chunks)


def open(path: str, name: str) -> dict[str, Any]:
    """Check that an array can be read and was written."""
    dataset = find(open_file(path), name)
    check(dataset)
    if dataset.id.get_storage_size() == 0:
        raise Refused("was declared and never written: copy the file again, or write it to the end")
    return {}


def rows(path: str, name: str, axes: tuple[int, int, int | None], start: int, stop: int) -> np.ndarray:
    """Return rows of an array as (rows, width, bands); ``axes`` are the places of y, x and band."""
    key = (path, name, (axes[0], axes[1], axes[2]))
    if key not in _rows:
        dataset = find(open_file(path), name)
        check(dataset)
        _rows[key] = rows_of(dataset, key[2])
    return _rows[key].rows(start, stop)


def rows_of(dataset: h5py.Dataset, axes: tuple[int, int, int | None]) -> Rows:
    """Return the rows of a data set that was checked."""
    return Rows(dataset.shape, dataset.dtype, axes, dataset.__getitem__, dataset.chunks)


def vector(path: str, name: str) -> dict[str, Any]:
    """Return all numbers of a small array."""
    dataset = find(open_file(path), name)
    check(dataset)
    if dataset.size > LARGEST_VECTOR:
        raise Refused(f"has {dataset.size} values, expected at most {LARGEST_VECTOR}")
    return numbers(np.asarray(dataset[()]))


def _description(name: str, dataset: h5py.Dataset) -> dict[str, Any]:
    dtype, kind = kind_of(dataset)
    return {
        "name": name,
        "shape": list(dataset.shape or ()),
        "dtype": dtype,
        "kind": kind,
        "dims": _dimensions(name, dataset),
        "attributes": _attributes(dataset),
    }


def kind_of(dataset: h5py.Dataset) -> tuple[str, str]:
    """Return the dtype of real numbers as numpy spells it, else an empty text, and a word for it."""
    try:
        dtype = dataset.dtype
    except (TypeError, ValueError):  # a type that numpy has no word for
        return "", "unknown"
    if h5py.check_ref_dtype(dtype) is not None:
        return "", "reference"
    if h5py.check_string_dtype(dtype) is not None:
        return "", "text"
    if dtype.kind in "biuf":
        return dtype.str, dtype.name
    if dtype.names == ("real", "imag"):
        return "", "complex"
    return "", {"c": "complex", "V": "compound", "O": "variable-length"}.get(dtype.kind, dtype.name)


def _dimensions(name: str, dataset: h5py.Dataset) -> list[str]:
    """Return the path of each axis' coordinate array, its label, or an empty text."""
    if dataset.is_scale and dataset.ndim == 1:
        return [name]
    found = []
    for axis in range(dataset.ndim):
        scales = h5py.h5ds.get_num_scales(dataset.id, axis) if "DIMENSION_LIST" in dataset.attrs else 0
        if scales:
            paths: list[str] = []
            h5py.h5ds.iterate(dataset.id, axis, lambda scale, to=paths: to.append(h5py.h5i.get_name(scale).decode()), 0)
            found.append(paths[0] if paths else "")
        else:
            found.append(h5py.h5ds.get_label(dataset.id, axis).decode("utf-8", "replace"))
    return found


def _attributes(item: h5py.HLObject) -> dict[str, Any]:
    """Return attributes that JSON can hold; structural and oversized ones are left out."""
    found = {}
    for name in item.attrs:
        attribute = h5py.h5a.open(item.id, name.encode())
        if name in ("DIMENSION_LIST", "REFERENCE_LIST") or attribute.get_storage_size() > LARGEST_ATTRIBUTE:
            continue
        try:
            value = json_value(item.attrs[name])
        except (OSError, TypeError, ValueError):  # a type that numpy has no word for
            continue
        if value is not None:
            found[name] = value
    return found


def _address(item: h5py.HLObject) -> int:
    return int(h5py.h5o.get_info(item.id).addr)
