"""A small cube in zarr stores of both versions, folders and archives."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

CUBE = np.random.default_rng(6).integers(1, 9999, (9, 8, 5)).astype(np.int16)
FORMATS = pytest.mark.parametrize("version", [2, 3])


def write(path: Path, cube: np.ndarray = CUBE, version: int = 3, name: str = "cube", **options: Any) -> Path:
    """Write one array into a group; every chunk is written unless the options say otherwise."""
    group = zarr.open_group(path, mode="a", zarr_format=version)
    config = {"write_empty_chunks": options.pop("write_empty_chunks", True)}
    attributes = options.pop("attributes", {})
    array = group.create_array(
        name, shape=cube.shape, dtype=cube.dtype, **{"chunks": (4, 3, 5)[: cube.ndim], "config": config, **options}
    )
    array[...] = cube
    array.attrs.update(attributes)
    return path


def zipped(folder: Path, method: int = zipfile.ZIP_STORED) -> Path:
    path = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return path
