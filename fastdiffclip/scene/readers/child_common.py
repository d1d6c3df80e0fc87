"""What the readers of the child process share: saying that work goes on, refusing, and rows of chunked arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_SLAB_BYTES = 32 * 2**20
_LARGEST_CACHE = 2**30
_MOST_ABSENT = 1000  # declared bytes to one byte that is there; the rest is fill value
_ALWAYS_ALLOWED = 64 * 2**20
LARGEST_VECTOR = 2**20
LARGEST_ATTRIBUTE = 2**18
MOST_OBJECTS = 20_000
DEEPEST = 64

_memory = 2**30
_alive: Callable[[], None] | None = None


class Refused(ValueError):
    """The file asks for something that is not done; the text goes on from the name of the array or file."""

    reply = "refused"


class Missing(ValueError):
    """There is no array of that name."""

    reply = "missing"


def start(memory: int, alive: Callable[[], None]) -> None:
    """Set how much memory there is and how to say that work goes on; called for each request."""
    global _memory, _alive
    _memory, _alive = memory, alive


def alive() -> None:
    """Tell the parent that the last step ended, which starts the time limit anew."""
    if _alive is not None:
        _alive()


def check_size(shape: tuple[int, ...], itemsize: int, stored: int, chunk: tuple[int, ...] | None = None) -> None:
    """Refuse an array that declares far more than the ``stored`` bytes of whole chunks, or a chunk beyond memory."""
    declared = math.prod(shape) * itemsize
    if declared > max(stored * _MOST_ABSENT, _ALWAYS_ALLOWED):
        raise Refused(f"declares {declared} bytes and the file holds {stored} for it, it is damaged or made up")
    if chunk is not None and math.prod(chunk) * itemsize > _memory // 4:
        size = math.prod(chunk) * itemsize
        raise Refused(f"has chunks of {size} bytes, more than can be read at once: store it in smaller ones")


class Rows:
    """Rows of a stored array as (rows, width, bands).

    ``axes`` are the places of y, x and band in ``shape``, band None where there is none; any other axis has length 1.
    ``read`` takes one slice per axis. A chunk taller than the rows asked for is decoded once where memory allows:
    the rows it holds are kept for the next request, up to an eighth of the memory.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        axes: tuple[int, int, int | None],
        read: Callable[[tuple[slice, ...]], np.ndarray],
        chunk: tuple[int, ...] | None,
    ) -> None:
        self.shape, self.dtype, self.axes, self.read = shape, dtype.newbyteorder("="), axes, read
        self.chunk = chunk or (1,) * len(shape)
        y, x, band = axes
        self.height, self.width = shape[y], shape[x]
        self.bands = 1 if band is None else shape[band]
        row_bytes = self.width * self.bands * self.dtype.itemsize
        held = max(1, min(_memory // 8, _LARGEST_CACHE) // max(1, row_bytes))
        tall = min(self.chunk[y], self.height)
        self._step = tall if tall <= held else held
        self._kept, self._first = np.empty((0, self.width, self.bands), self.dtype), 0

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return rows ``start`` to ``stop``, contiguous."""
        if not 0 <= start < stop <= self.height:
            raise Refused(f"has {self.height} rows, {start} to {stop} were asked for")
        if self._step == 1:
            return self._load(start, stop)
        out = np.empty((stop - start, self.width, self.bands), self.dtype)
        at = start
        while at < stop:
            if not self._first <= at < self._first + len(self._kept):
                self._kept = self._kept[:0]
                self._first = at - at % self._step
                self._kept = self._load(self._first, min(self._first + self._step, self.height))
            end = min(stop, self._first + len(self._kept))
            out[at - start : end - start] = self._kept[at - self._first : end - self._first]
            at = end
        return out

    def _load(self, start: int, stop: int) -> np.ndarray:
        y, x, band = self.axes
        out = np.empty((stop - start, self.width, self.bands), self.dtype)
        order = [y, x] + ([] if band is None else [band])
        rest = [axis for axis in range(len(self.shape)) if axis not in order]
        for slab in self._slabs(stop - start):
            selection = tuple(slice(start, stop) if axis == y else slab[axis] for axis in range(len(self.shape)))
            block = self.read(selection).transpose(order + rest)
            bands = slice(0, 1) if band is None else slab[band]
            out[:, slab[x], bands] = block.reshape(block.shape[0], block.shape[1], -1)
            alive()
        return out

    def _slabs(self, rows: int) -> Iterator[dict[int, slice]]:
        """Yield slices of the axes other than y, whole chunks of about 32 MiB, in storage order."""
        y = self.axes[0]
        whole = {axis: slice(0, size) for axis, size in enumerate(self.shape) if axis != y}
        cut = min((axis for axis in whole if self.shape[axis] > 1), default=None)
        if cut is None:
            yield whole
            return
        plane = rows * self.dtype.itemsize * math.prod(self.shape[axis] for axis in whole if axis != cut)
        step = max(1, _SLAB_BYTES // max(1, plane) // self.chunk[cut]) * self.chunk[cut]
        for first in range(0, self.shape[cut], step):
            yield {**whole, cut: slice(first, min(first + step, self.shape[cut]))}


def json_value(value: Any) -> Any:
    """Turn an attribute into what JSON holds: numbers, texts, lists of them; None for anything else."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace").rstrip("\0")
    if isinstance(value, str):
        return value.rstrip("\0")
    if isinstance(value, np.ndarray):
        return [json_value(item) for item in value.ravel().tolist()] if value.size <= LARGEST_VECTOR else None
    if isinstance(value, np.generic):
        return json_value(value.item())
    if isinstance(value, bool | int | float):
        return value
    return None


def vector(values: np.ndarray) -> dict[str, list[float]]:
    """Return the numbers of a small array."""
    if values.dtype.kind not in "biuf":
        raise Refused(f"holds {values.dtype}, expected real numbers")
    return {"values": values.astype(np.float64).ravel().tolist()}
