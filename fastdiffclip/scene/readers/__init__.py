"""Readers of raster files. To add a format, write a reader and give it its suffixes in READERS."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from pathlib import Path

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers.enmap import is_enmap, open_enmap
from fastdiffclip.scene.readers.envi import DATA_SUFFIXES, envi_header_beside, open_envi
from fastdiffclip.scene.readers.geotiff import open_geotiff
from fastdiffclip.scene.readers.hdf5 import open_hdf5
from fastdiffclip.scene.readers.matlab import open_matlab
from fastdiffclip.scene.readers.numpy_files import open_npy, open_npz
from fastdiffclip.scene.readers.quiet import quiet_gdal
from fastdiffclip.scene.readers.sound import sound
from fastdiffclip.scene.readers.source import RasterSource
from fastdiffclip.scene.readers.zarr_arrays import is_zarr, open_zarr

__all__ = ["READERS", "RasterSource", "expand", "open_raster"]

READERS: dict[str, Callable[[Path, str | None], RasterSource]] = {
    ".mat": open_matlab,
    ".tif": open_geotiff,
    ".tiff": open_geotiff,
    ".npy": open_npy,
    ".npz": open_npz,
    ".hdr": open_envi,
    ".xml": open_enmap,
    **dict.fromkeys((".h5", ".hdf5", ".he5", ".hdf", ".nc", ".nc4"), open_hdf5),
    **dict.fromkeys((".zarr", ".zip"), open_zarr),
}


def open_raster(path: Path, variable: str | None = None) -> RasterSource:
    """Open a raster with the reader of its suffix; other files where an ENVI header lies beside them.

    Raises InputDataError when there is no such file, no reader for it, or it cannot be read.
    """
    if not path.exists():
        raise InputDataError(f"there is no file {path}")
    if is_zarr(path):
        return sound(open_zarr(path, variable))
    reader = _reader(path)
    if reader is None or not path.is_file():
        raise InputDataError(f"{path} is not a raster that can be read: give one of {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise InputDataError(f"{path} is empty (0 bytes): was it copied completely?")
    with quiet_gdal():
        return sound(reader(path, variable))


def _reader(path: Path) -> Callable[[Path, str | None], RasterSource] | None:
    suffix = path.suffix.lower()
    if suffix in (".tif", ".tiff") and is_enmap(path):
        return open_enmap
    if suffix not in READERS and (suffix in DATA_SUFFIXES or envi_header_beside(path)):
        return open_envi
    return READERS.get(suffix)


def expand(spec: str) -> tuple[list[Path], str | None]:
    """Turn ``FILE[:VARIABLE]``, FILE possibly a glob, into its files in natural order and the variable.

    A colon in a name is no separator where the whole is a file, nor is that of a drive letter; the last colon after a
    file is the separator. VARIABLE may be a path, as in ``FILE.h5:/group/array``, where FILE is a file or a zarr store.
    Raises InputDataError when nothing matches.
    """
    files, file = _files(spec), spec
    if files:
        return files, None
    colons = [match.start() for match in re.finditer(":", spec) if match.start() > 1 and match.end() < len(spec)]
    for place in reversed(colons):
        head, tail = spec[:place], spec[place + 1 :]
        within = re.search(r"[/\\]", tail) is not None
        files = _files(head)
        if files and (not within or all(found.is_file() or is_zarr(found) for found in files)):
            return files, tail
        if file == spec and (not within or Path(head).suffix.lower() in READERS):
            file = head
    kind = "no file matches" if glob.has_magic(file) else "there is no file"
    raise InputDataError(f"{kind} {file}: check the name (expected FILE or FILE:VARIABLE)")


def _files(pattern: str) -> list[Path]:
    if Path(pattern).exists():
        return [Path(pattern)]
    return sorted(map(Path, glob.glob(pattern, recursive=True)), key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]
