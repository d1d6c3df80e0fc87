"""Readers of raster files. To add a format, write a reader and give it its suffixes in READERS."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from pathlib import Path

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers.geotiff import open_geotiff
from fastdiffclip.scene.readers.matlab import open_matlab
from fastdiffclip.scene.readers.numpy_files import open_npy, open_npz
from fastdiffclip.scene.readers.source import RasterSource

__all__ = ["READERS", "RasterSource", "expand", "open_raster"]

READERS: dict[str, Callable[[Path, str | None], RasterSource]] = {
    ".mat": open_matlab,
    ".tif": open_geotiff,
    ".tiff": open_geotiff,
    ".npy": open_npy,
    ".npz": open_npz,
}


def open_raster(path: Path, variable: str | None = None) -> RasterSource:
    """Open a raster with the reader of its suffix.

    Raises InputDataError when there is no such file, no reader for it, or it cannot be read.
    """
    if not path.exists():
        raise InputDataError(f"there is no file {path}")
    reader = READERS.get(path.suffix.lower())
    if reader is None or not path.is_file():
        raise InputDataError(f"{path} is not a raster that can be read: give one of {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise InputDataError(f"{path} is empty (0 bytes): was it copied completely?")
    return reader(path, variable)


def expand(spec: str) -> tuple[list[Path], str | None]:
    """Turn ``FILE[:VARIABLE]``, FILE possibly a glob, into its files in natural order and the variable.

    A colon in a name is no separator where the whole is a file, nor is that of a drive letter. Raises
    InputDataError when nothing matches.
    """
    file, variable = spec, None
    if not _files(spec):
        head, colon, tail = spec.rpartition(":")
        if colon and len(head) > 1 and tail and not re.search(r"[/\\]", tail):
            file, variable = head, tail
    files = _files(file)
    if not files:
        kind = "no file matches" if glob.has_magic(file) else "there is no file"
        raise InputDataError(f"{kind} {file}: check the name (expected FILE or FILE:VARIABLE)")
    return files, variable


def _files(pattern: str) -> list[Path]:
    if Path(pattern).exists():
        return [Path(pattern)]
    return sorted(map(Path, glob.glob(pattern, recursive=True)), key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]
