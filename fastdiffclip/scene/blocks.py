"""Row blocks of a stored scene, read in chunk order so that no chunk is read twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    Reads whole rows of chunks and keeps only those that a later request can still want, so every chunk is
    read at most once and the buffer never exceeds one request plus one row of chunks.
    """

    def __init__(self, scene: Scene, modality: str) -> None:
        self._scene = scene
        self._modality = modality
        self._step = max(1, scene.chunk_rows(modality))
        self._start = self._stop = 0
        self._raw: np.ndarray | None = None
        self._valid: np.ndarray | None = None

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ``(raw (h, width, bands), valid (h, width) bool)`` of the rows ``start`` to ``stop``."""
        if start < self._start:
            raise ValueError(f"rows {start} to {stop} were already passed: the buffer starts at {self._start}")
        if start >= self._stop:
            self._raw = self._valid = None
            self._start = self._stop = start - start % self._step
        if stop > self._stop:
            self._fill(start, stop)
        assert self._raw is not None and self._valid is not None
        wanted = slice(start - self._start, stop - self._start)
        return self._raw[wanted], self._valid[wanted]

    def _fill(self, start: int, stop: int) -> None:
        end = min(self._scene.height, -(-stop // self._step) * self._step)
        fresh = slice(self._stop, end)
        raw = self._scene.read(self._modality, rows=fresh)
        valid = self._scene.read_valid(self._modality, rows=fresh)
        if self._raw is not None and self._valid is not None:
            kept = start - self._start
            raw = np.concatenate([self._raw[kept:], raw])
            valid = np.concatenate([self._valid[kept:], valid])
            self._start = start
        self._raw, self._valid, self._stop = raw, valid, end


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
