"""Writes files in the layout of NetCDF-4 with h5py: dimensions as scales, attributes on variables and groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

# name -> (dimensions, values, attributes); a name may have groups
Variables = dict[str, tuple[tuple[str, ...], Any, dict[str, Any]]]


def write_netcdf4(path: Path, variables: Variables, attributes: dict[str, Any] | None = None, **options: Any) -> Path:
    """Write variables; a dimension is the variable of its name, or a scale without values where there is none."""
    with h5py.File(path, "w", track_order=True) as file:
        file.attrs["_NCProperties"] = np.bytes_("version=2,netcdf=4.9.2,hdf5=1.14.2")
        file.attrs.update(attributes or {})
        for name, (_, values, own) in variables.items():
            values = np.asarray(values)
            file.create_dataset(name, data=values, **(options if values.ndim > 1 else {}))
            file[name].attrs.update({key: _bytes(value) for key, value in own.items()})
        named = [pair for dims, values, _ in variables.values() for pair in zip(dims, np.shape(values), strict=True)]
        for dim, size in dict(named).items():
            if dim not in file:
                file.create_dataset(dim, (size,), ">f4")
                file[dim].make_scale(f"This is a netCDF dimension but not a netCDF variable.{size:10d}")
            elif file[dim].shape == (size,):
                file[dim].make_scale(dim)
        for name, (dims, _, _) in variables.items():
            for axis, dim in enumerate(dims):
                if name != dim:
                    file[name].dims[axis].attach_scale(file[dim])
    return path


def _bytes(value: Any) -> Any:
    return np.bytes_(value) if isinstance(value, str) else value
