"""NumPy files. A .npy file is mapped, so it may be larger than memory; one array of a .npz is read whole.

The header is matched against the one form that numpy writes, and nothing of it is evaluated.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Literal

import numpy as np

from fastdiffclip.errors import InputDataError, ResourceError
from fastdiffclip.scene.readers.source import RasterSource, choose_variable, source_of_array

_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 10_000
_ITEM = re.compile(r"'(\w+)'\s*:\s*('[^']*'|True|False|\([\d\s,L]*\)|\[.*\])\s*,?\s*", re.DOTALL)
_KEYS = {"descr", "fortran_order", "shape"}
_DEFLATE_AT_MOST = 1040  # no deflate stream expands further
_BYTES_AT_ONCE = 2**24
_ENCRYPTED = 1
# What the zip reader raises for damaged archives.
_DAMAGE = (
    ValueError, EOFError, OSError, LookupError, OverflowError, RuntimeError, struct.error, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


class _NoNumbersError(ValueError):
    """An array of Python objects or of records."""


def open_npy(path: Path, variable: str | None) -> RasterSource:
    """Open a .npy file of shape (H, W) or (H, W, bands); Python objects are refused, never unpickled."""
    if variable is not None:
        raise InputDataError(f"{path} is a .npy file and has no variables: leave out ':{variable}'")
    try:
        with path.open("rb") as stream:
            shape, order, dtype = _read_header(stream)
            offset, held = stream.tell(), path.stat().st_size - stream.tell()
        _check_form(str(path), shape, dtype)
        declared = math.prod(shape) * dtype.itemsize
        if declared > held:
            raise ValueError(f"it declares {declared} bytes and holds {held}")
        array = np.memmap(path, dtype, "r", offset, shape, order)
    except (ValueError, EOFError, OSError, OverflowError) as error:
        raise _unreadable(path, ".npy", error) from error
    return source_of_array(path, str(path), array)


def open_npz(path: Path, variable: str | None) -> RasterSource:
    """Open one array of a .npz file, or its only raster when ``variable`` is None."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {
                entry.filename.removesuffix(".npy"): entry
                for entry in archive.infolist()
                if entry.filename.endswith(".npy")
            }
            found = {name: _shape_and_type(archive, entry) for name, entry in entries.items()}
            name = choose_variable(path, variable, found)
            what = f"array '{name}' of {path}"
            with archive.open(entries[name]) as stream:
                array = _read_array(what, stream)
    except _DAMAGE as error:
        raise _unreadable(path, ".npz", error) from error
    return source_of_array(path, what, array)


def _unreadable(path: Path, form: str, error: Exception) -> InputDataError:
    return InputDataError(f"{path} cannot be read as {form}: truncated, damaged or Python objects ({error})")


def _check_form(what: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.kind not in "biuf":
        raise InputDataError(f"{what} holds {dtype}, expected real numbers: convert it first")
    if len(shape) not in (2, 3) or 0 in shape:
        raise InputDataError(f"{what} has shape {shape}, expected (height, width) or (height, width, bands)")


def _shape_and_type(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[tuple[int, ...], str]:
    """Read the header; one that promises more than the archive holds is refused before it is allocated."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & _ENCRYPTED:
        raise ValueError(f"'{entry.filename[:80]}' is encrypted or not compressed as numpy does it")
    with archive.open(entry) as stream:
        try:
            shape, _, dtype = _read_header(stream)
        except _NoNumbersError:  # another array of the file may be the raster
            return (), "no numbers"
        size = math.prod(shape) * dtype.itemsize
        if size > min(entry.file_size, entry.compress_size * _DEFLATE_AT_MOST):
            raise ValueError(f"'{entry.filename[:80]}' declares {size} bytes and holds {entry.file_size}")
    return shape, dtype.name


def _read_array(what: str, stream: IO[bytes]) -> np.ndarray:
    import psutil

    shape, order, dtype = _read_header(stream)
    _check_form(what, shape, dtype)
    size, free = math.prod(shape) * dtype.itemsize, psutil.virtual_memory().available
    if size > free:
        raise ResourceError(
            f"{what} takes {size / 2**30:.3g} GiB of memory and {free / 2**30:.3g} GiB are free: save it as .npy, "
            "which is not read as a whole"
        )
    buffer, filled = np.empty(size, np.uint8), 0
    while filled < size:
        block = stream.read(min(_BYTES_AT_ONCE, size - filled))
        if not block:
            raise EOFError(f"it ends after {filled} of {size} bytes")
        buffer[filled : filled + len(block)] = np.frombuffer(block, np.uint8)
        filled += len(block)
    return buffer.view(dtype).reshape(shape, order=order)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype]:
    """Return shape, order ("C" or "F") and dtype; the stream then stands at the values. Raises ValueError, EOFError."""
    start = _exactly(stream, 8)
    if start[:6] != _MAGIC or start[6] not in (1, 2, 3):
        raise ValueError("it does not begin as a numpy array does")
    form = "<H" if start[6] == 1 else "<I"
    length = struct.unpack(form, _exactly(stream, struct.calcsize(form)))[0]
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header has {length} bytes, one of numbers has at most {_LONGEST_HEADER}")
    text = _exactly(stream, length).decode("utf-8" if start[6] == 3 else "latin-1").strip()
    items = dict(_ITEM.findall(text))
    if set(items) != _KEYS or _ITEM.sub("", text).strip() != "{}":
        raise ValueError(f"its header is '{text[:80]}'")
    descr, shape = items["descr"], items["shape"]
    if not descr.startswith("'") or not shape.startswith("(") or items["fortran_order"] not in ("True", "False"):
        raise _NoNumbersError(f"its header is '{text[:80]}', which is no array of numbers")
    try:
        dtype = np.dtype(descr.strip("'"))
    except (TypeError, SyntaxError) as error:
        raise ValueError(f"its type '{descr[:40]}' is unknown") from error
    if dtype.hasobject:
        raise _NoNumbersError("it holds Python objects, which are never unpickled")
    sizes = tuple(int(part) for part in re.findall(r"\d+", shape))
    return sizes, "F" if items["fortran_order"] == "True" else "C", dtype


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError(f"it ends within its header, after {len(data)} of {count} bytes")
    return data
