"""Raw files of results on their way to a GeoTIFF, and a common view of arrays and raw files by rectangles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

from fastdiffclip.infer.tiles import Rect


@dataclass(frozen=True)
class Layer:
    """A raw file ``(bands, height, width)``, one band after the other, little-endian."""

    name: str
    bands: int
    dtype: str

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a pixel."""
        return self.bands * np.dtype(self.dtype).itemsize


class RawFile:
    """A layer on disk, made and filled with zeros where it is not there. Everything raises OSError.

    It is written and read by position and not mapped: mapped pages would count as memory of the process.
    """

    def __init__(self, folder: Path, layer: Layer, height: int, width: int) -> None:
        self.path, self.layer, self.height, self.width = folder / f"{layer.name}.raw", layer, height, width
        self.dtype = np.dtype(layer.dtype).newbyteorder("<")
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if os.fstat(self._file).st_size != layer.pixel_bytes * height * width:
            os.ftruncate(self._file, layer.pixel_bytes * height * width)

    def __enter__(self) -> RawFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, rect: Rect, values: np.ndarray) -> int:
        """Put ``values`` (bands, h, w) at ``rect``; returns their CRC-32."""
        data = np.ascontiguousarray(values, self.dtype)
        for offset, part in zip(self._offsets(rect), self._runs(rect, data), strict=True):
            left = memoryview(part).cast("B")
            while left:
                done = os.pwrite(self._file, left, offset)
                left, offset = left[done:], offset + done
        return crc32(data.data)

    def read(self, rect: Rect) -> np.ndarray:
        """``(bands, h, w)`` of ``rect``, a new array."""
        data = np.empty((self.layer.bands, rect.height, rect.width), self.dtype)
        for offset, part in zip(self._offsets(rect), self._runs(rect, data), strict=True):
            if os.preadv(self._file, [part], offset) != part.nbytes:
                raise OSError(f"{self.path} is shorter than it was")
        return data

    def rects(self, rows: int = 256, bytes_at_once: int = 16 << 20) -> Iterator[Rect]:
        """Rectangles that cover the file, ``rows`` high (even) and of a multiple of that in width, and small enough."""
        width = max(1, bytes_at_once // (rows * self.layer.pixel_bytes) // rows) * rows
        for top in range(0, self.height, rows):
            for left in range(0, self.width, width):
                yield Rect(top, min(top + rows, self.height), left, min(left + width, self.width))

    def _runs(self, rect: Rect, data: np.ndarray) -> np.ndarray:
        """``(n, length)``: what lies together on disk, whole bands of rows or single rows of a part of the width."""
        whole = rect.width == self.width
        return data.reshape(self.layer.bands if whole else self.layer.bands * rect.height, -1)

    def _offsets(self, rect: Rect) -> list[int]:
        rows = [rect.top] if rect.width == self.width else range(rect.top, rect.bottom)
        size = self.dtype.itemsize
        return [
            ((band * self.height + row) * self.width + rect.left) * size
            for band in range(self.layer.bands)
            for row in rows
        ]

    def sync(self) -> None:
        """Wait until the disk has it."""
        os.fdatasync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
