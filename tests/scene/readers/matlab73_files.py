"""Writes files in the layout of MATLAB 7.3, as far as the reader's tests need it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np

HEADER = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: Mon Jan 01 00:00:00 2024 HDF5 schema 1.00 ."
_CLASSES = {"float64": "double", "float32": "single", "bool": "logical"}


def write_matlab73(path: Path, variables: dict[str, Any], **options: Any) -> Path:
    """Write variables: arrays (2-D or more), dict = struct, list of dicts = struct array, other list = cell row."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, value in variables.items():
            _write(file, name, value, options)
    with path.open("r+b") as stream:
        stream.write(HEADER.ljust(124) + b"\x00\x02IM")
    return path


def _write(group: h5py.Group, name: str, value: Any, options: dict[str, Any]) -> None:
    if isinstance(value, dict):
        struct = group.create_group(name)
        struct.attrs["MATLAB_class"] = np.bytes_("struct")
        for field, inner in value.items():
            _write(struct, field, inner, options)
    elif isinstance(value, list) and value and all(isinstance(element, dict) for element in value):
        struct = group.create_group(name)
        struct.attrs["MATLAB_class"] = np.bytes_("struct")
        for field in value[0]:
            struct[field] = _references(group, [element[field] for element in value], options)
    elif isinstance(value, list):
        group[name] = _references(group, value, options)
        group[name].attrs["MATLAB_class"] = np.bytes_("cell")
    else:
        _write_array(group, name, np.atleast_2d(np.asarray(value)), options)


def _references(group: h5py.Group, values: list[Any], options: dict[str, Any]) -> np.ndarray:
    """Return references to values written to #refs#, shaped as MATLAB stores a row (1, n): reversed."""
    held = group.file.require_group("#refs#")
    found = []
    for value in values:
        name = f"r{len(held)}"
        _write(held, name, value, options)
        found.append(held[name].ref)
    return np.array(found, h5py.ref_dtype).reshape(len(found), 1)


def _write_array(group: h5py.Group, name: str, array: np.ndarray, options: dict[str, Any]) -> None:
    kind = "char" if array.dtype.kind == "U" else _CLASSES.get(array.dtype.name, array.dtype.name)
    if kind == "char":
        array = np.array([[ord(letter) for letter in str(array[0, 0])]], np.uint16)
    stored = array.astype(np.uint8) if array.dtype == bool else array
    if array.dtype.kind == "c":
        pairs = np.zeros(array.shape, [("real", "f8"), ("imag", "f8")])
        pairs["real"], pairs["imag"], kind, stored = array.real, array.imag, "double", pairs
    if math.prod(array.shape) == 0:
        group[name] = np.array(array.shape, np.uint64)
        group[name].attrs["MATLAB_empty"] = np.uint8(1)
    else:
        group.create_dataset(name, data=np.ascontiguousarray(stored.T), **options)
    group[name].attrs["MATLAB_class"] = np.bytes_(kind)
