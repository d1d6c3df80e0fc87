"""How the numbers of a file become one of the few dtypes a scene stores, without loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers import RasterSource

_BYTES_AT_ONCE = 64 * 2**20
_LARGEST_ROW = 2**30
_DIRECT = {"bool": "uint16", "uint8": "uint16", "int8": "int16", "uint16": "uint16", "int16": "int16"}
_DIRECT.update({"float16": "float16", "float32": "float32"})


def stored_dtype(source: RasterSource, on_rows: Callable[[int], None] = lambda rows: None) -> str:
    """Return the dtype that a scene stores ``source`` in.

    uint8 becomes uint16, int8 int16, wider floats float32; wider integers become uint16, int16 or float32,
    the first that holds every value exactly (this reads the file once, and ``on_rows`` hears how many rows each
    block had). Raises InputDataError where none does.
    """
    name = np.dtype(source.dtype).name
    if source.dtype.kind == "f":
        return _DIRECT.get(name, "float32")
    if name in _DIRECT:
        return _DIRECT[name]
    low, high, exact = 0, 0, True
    for rows in row_blocks(source):
        block = source.read_rows(rows)
        low, high = min(low, int(block.min())), max(high, int(block.max()))
        exact = exact and bool((block.astype(np.float32).astype(np.float64) == block).all())
        on_rows(rows.stop - rows.start)
    for candidate in ("uint16", "int16"):
        limits = np.iinfo(candidate)
        if limits.min <= low and high <= limits.max:
            return candidate
    if not exact:
        raise InputDataError(
            f"{source.path} holds {name} values from {low} to {high} that neither 16-bit integers nor "
            "float32 hold exactly: "
            "rescale it first"
        )
    return "float32"


def require_readable_rows(source: RasterSource) -> None:
    """Raise InputDataError where a single row is too large to be held in memory."""
    size = source.width * source.bands * source.dtype.itemsize
    if size > _LARGEST_ROW:
        raise InputDataError(
            f"{source.path} has rows of {source.width} pixels with {source.bands} bands, {size / 2**30:.3g} GiB each, "
            "expected at most 1 GiB: cut it into scenes, or is it damaged?"
        )


def row_blocks(source: RasterSource) -> Iterator[slice]:
    """Yield row slices that cover the raster in blocks of about 64 MiB."""
    row_bytes = source.width * source.bands * source.dtype.itemsize
    step = max(1, _BYTES_AT_ONCE // row_bytes)
    for start in range(0, source.height, step):
        yield slice(start, min(start + step, source.height))


def converted_rows(source: RasterSource, dtype: str) -> Callable[[slice], np.ndarray]:
    """Return a reader of rows in ``dtype``; a float too large for it becomes infinite, and so invalid."""

    def read(rows: slice) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(source.read_rows(rows), dtype=dtype)

    return read
