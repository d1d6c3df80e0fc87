"""NumPy files. A .npy file is mapped, so it may be larger than memory; one array of a .npz is read whole."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers.source import RasterSource, choose_variable, source_of_array

_DEFLATE_AT_MOST = 1040  # no deflate stream expands further


def open_npy(path: Path, variable: str | None) -> RasterSource:
    """Open a .npy file of shape (H, W) or (H, W, bands); Python objects are refused, never unpickled."""
    if variable is not None:
        raise InputDataError(f"{path} is a .npy file and has no variables: leave out ':{variable}'")
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise InputDataError(
            f"{path} cannot be read as .npy: truncated, damaged or Python objects ({error})"
        ) from error
    return source_of_array(path, str(path), array)


def open_npz(path: Path, variable: str | None) -> RasterSource:
    """Open one array of a .npz file, or its only raster when ``variable`` is None."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = {
                entry.filename.removesuffix(".npy"): _shape_and_type(archive, entry)
                for entry in archive.infolist()
                if entry.filename.endswith(".npy")
            }
            name = choose_variable(path, variable, found)
            with archive.open(f"{name}.npy") as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise InputDataError(
            f"{path} cannot be read as .npz: truncated, damaged or Python objects ({error})"
        ) from error
    return source_of_array(path, f"array '{name}' of {path}", array)


def _shape_and_type(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[tuple[int, ...], str]:
    """Read the header; one that promises more than the archive holds is refused before it is allocated."""
    with archive.open(entry) as stream:
        shape, dtype = _header(stream)
        size = math.prod(shape) * dtype.itemsize
        if not dtype.hasobject and size > min(entry.file_size, entry.compress_size * _DEFLATE_AT_MOST):
            raise ValueError(f"'{entry.filename}' declares {size} bytes and holds {entry.file_size}")
    return shape, dtype.name


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"version {version} of the format is for structured arrays")
    return shape, dtype
