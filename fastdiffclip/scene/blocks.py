"""Row blocks of a stored scene, read in chunk order so that no chunk is read twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fastdiffclip.scene.store import Scene


@dataclass(frozen=True)
class RowBlock:
    """Some rows of a scene, with the neighbouring rows that windows reach into.

    ``rows`` are the block's own rows, ``halo_rows`` the rows that the arrays hold (a superset, cut at the
    scene's edge). ``raw[m]`` is (h, width, bands) in the stored dtype, ``valid[m]`` (h, width) bool, with
    h = halo_rows.stop - halo_rows.start.
    """

    rows: slice
    halo_rows: slice
    raw: dict[str, np.ndarray]
    valid: dict[str, np.ndarray]


class RowReader:
    """Reads rows of one modality; requested ranges must not move backwards.

    Reads whole rows of chunks and keeps only those that a later request can still want, so every chunk is read at most
    once and memory holds one request and two rows of chunks. With ``cols`` it reads only those columns.
    """

    def __init__(self, scene: Scene, modality: str, cols: slice = slice(None)) -> None:
        self._raw = _Rows(lambda rows: scene.read(modality, rows, cols), scene.chunk_rows(modality), scene.height)
        self._valid = _Rows(
            lambda rows: scene.read_valid(modality, rows, cols), scene.valid_chunk_rows(modality), scene.height
        )

    def rows(self, start: int, stop: int, keep: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return ``(raw (h, width, bands), valid (h, width) bool)`` of the rows ``start`` to ``stop``.

        No later request may begin above row ``keep``, which is ``start`` or further down; None stands for ``start``.
        """
        keep = start if keep is None else max(keep, start)
        return self._raw.rows(start, stop, keep), self._valid.rows(start, stop, keep)


class _Rows:
    """Rows of one stored array, a row of chunks at a time; chunks of values and of validity differ in height."""

    def __init__(self, read: Callable[[slice], np.ndarray], step: int, height: int) -> None:
        self._read, self._step, self._height = read, max(1, step), height
        self._kept: list[tuple[int, np.ndarray]] = []  # first row and rows, one after the other
        self._lowest = 0

    def rows(self, start: int, stop: int, keep: int) -> np.ndarray:
        if start < self._lowest:
            raise ValueError(f"rows {start} to {stop} were already passed: the buffer starts at {self._lowest}")
        parts, self._kept, self._lowest = self._kept, [], keep
        out: np.ndarray | None = None
        for first, part in self._parts(parts, start, stop):
            end = first + len(part)
            if end > keep:
                self._kept.append((first, part))
            if first <= start and stop <= end:
                self._kept += parts
                return part[start - first : stop - first]
            if first >= stop:
                self._kept += parts
                break
            if out is None:
                out = np.empty((stop - start, *part.shape[1:]), part.dtype)
            top, bottom = max(start, first), min(stop, end)
            out[top - start : bottom - start] = part[top - first : bottom - first]
        assert out is not None
        return out

    def _parts(self, kept: list[tuple[int, np.ndarray]], start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """The rows of chunks from ``start`` to ``stop``: those that are kept, then fresh ones."""
        at = start - start % self._step
        while kept:
            first, part = kept.pop(0)
            if first + len(part) > start:
                yield first, part
                at = first + len(part)
        while at < stop:
            end = min(self._height, at + self._step)
            yield at, self._read(slice(at, end))
            at = end


def iter_row_blocks(
    scene: Scene, block_rows: int | None = None, halo: int = 0, modalities: Sequence[str] | None = None
) -> Iterator[RowBlock]:
    """Yield the scene top to bottom in blocks of ``block_rows`` rows with ``halo`` rows above and below.

    ``block_rows=None`` takes the chunk height of the first modality. Every chunk is read exactly once; memory
    stays near ``block_rows + 2 * halo`` rows plus one row of chunks per modality.
    """
    names = tuple(scene.modalities) if modalities is None else tuple(modalities)
    step = scene.chunk_rows(names[0]) if block_rows is None else block_rows
    if step < 1 or halo < 0:
        raise ValueError(f"block_rows must be at least 1 and halo at least 0, got {step} and {halo}")
    readers = {name: RowReader(scene, name) for name in names}
    for top in range(0, scene.height, step):
        bottom = min(scene.height, top + step)
        held = slice(max(0, top - halo), min(scene.height, bottom + halo))
        parts = {name: reader.rows(held.start, held.stop) for name, reader in readers.items()}
        yield RowBlock(
            rows=slice(top, bottom),
            halo_rows=held,
            raw={name: part[0] for name, part in parts.items()},
            valid={name: part[1] for name, part in parts.items()},
        )
