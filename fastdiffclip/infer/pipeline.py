"""Read, compute, write: three threads that overlap, with at most two blocks of the scene in memory."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from fastdiffclip.infer.engine import Engine, Region
from fastdiffclip.infer.tiles import Block, Rect, Tiling
from fastdiffclip.infer.unfinished import Unfinished
from fastdiffclip.scene.blocks import RowReader
from fastdiffclip.scene.store import Scene

COMMIT_SECONDS = 1.0
BLOCKS_AT_ONCE = 2
_TICK = 0.1  # seconds between looks at the other side of a queue
Item = TypeVar("Item")


@dataclass(frozen=True)
class Piece:
    """What is read for a block.

    Attributes:
        rect: rows and columns of the arrays; empty where nothing of the block is wanted, or nothing new is needed.
        region: the block and its halo. follows: whether the rows above ``rect`` are those of the piece before.
        raw: per modality ``(h, w, bands)`` as stored. valid: ``(h, w)`` bool.
    """

    block: Block
    rect: Rect
    region: Rect
    follows: bool
    raw: dict[str, np.ndarray]
    valid: dict[str, np.ndarray]


class Room:
    """Room for a few blocks in memory."""

    def __init__(self, blocks: int = BLOCKS_AT_ONCE) -> None:
        self._free, self._closed = threading.Semaphore(blocks), threading.Event()

    def take(self) -> bool:
        """Wait for room; False where nobody gives it back any more."""
        while not self._closed.is_set():
            if self._free.acquire(timeout=_TICK):
                return True
        return False

    def give(self) -> None:
        """Room for one more."""
        self._free.release()

    def close(self) -> None:
        """Let nobody wait for room any more."""
        self._closed.set()


def read_pieces(
    scene: Scene, names: Sequence[str], blocks: Iterable[Block], needed: Callable[[Block], bool], radius: int,
    room: Room,
) -> Iterator[Piece]:  # fmt: skip
    """Read blocks with their halo, in order; rows that two of them share are read once.

    Of a block that is not ``needed`` nothing is read. ``room`` is taken before a block is read; whoever has used the
    piece gives it back.
    """
    before = nothing = Rect(0, 0, 0, 0)
    whole = Rect(0, scene.height, 0, scene.width)
    readers: dict[str, RowReader] = {}
    for block in blocks:
        if not needed(block):
            yield Piece(block, nothing, nothing, False, {}, {})
            continue
        if not room.take():
            return
        region = block.rect.grown(radius).within(whole)
        beside = (before.left, before.right) == (region.left, region.right) and before.top <= region.top
        if not beside:
            readers = {name: RowReader(scene, name, slice(region.left, region.right)) for name in names}
        follows = beside and region.top <= before.bottom
        rect = Rect(before.bottom if follows else region.top, region.bottom, region.left, region.right)
        before = region
        yield Piece(block, rect, region, follows, *_read(readers, rect))


def _read(readers: dict[str, RowReader], rect: Rect) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values and validity per modality. Of its own, so that nothing here keeps them alive while they are used."""
    raw: dict[str, np.ndarray] = {}
    valid: dict[str, np.ndarray] = {}
    for name, reader in readers.items() if rect.pixels else ():
        raw[name], valid[name] = reader.rows(rect.top, rect.bottom, rect.bottom)
    return raw, valid


@contextmanager
def in_background(items: Iterator[Item]) -> Iterator[Iterator[Item]]:
    """The items, made by a thread of their own, one ahead; its errors come out of the iteration."""
    made: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(1)
    leaving = threading.Event()

    def run() -> None:
        try:
            for item in items:
                if not _put(made, (item, None), leaving):
                    return
            _put(made, (None, StopIteration()), leaving)
        except BaseException as error:
            _put(made, (None, error), leaving)

    def take() -> Iterator[Item]:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]

    thread = threading.Thread(target=run, name="predict-read", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        leaving.set()
        thread.join()


def _put(target: queue.Queue[Item], item: Item, leaving: threading.Event) -> bool:
    """Wait until there is room; False where nobody wants it any more."""
    while not leaving.is_set():
        try:
            target.put(item, timeout=_TICK)
            return True
        except queue.Full:
            continue
    return False


class Writer:
    """Puts tiles to disk on a thread of its own and enters them into the journal about once a second.

    A context manager; leaving it waits until everything is there. Errors come out of :meth:`put` and of leaving.
    """

    def __init__(self, unfinished: Unfinished) -> None:
        self._unfinished = unfinished
        self._given: queue.Queue[tuple[int, Rect, dict[str, np.ndarray]] | None] = queue.Queue(4)
        self._failed = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="predict-write", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _put(self._given, None, self._failed)
        self._thread.join()
        if kind is None:
            self._raise()

    def put(self, number: int, tile: Rect, layers: dict[str, np.ndarray]) -> None:
        """Hand over a tile, ``(bands, h, w)`` per layer; waits while the disk is behind."""
        if not _put(self._given, (number, tile, layers), self._failed):
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        pending: dict[int, list[int]] = {}
        last = time.monotonic()
        try:
            while (given := self._given.get()) is not None:
                number, tile, layers = given
                pending[number] = self._unfinished.write(tile, layers)
                if time.monotonic() - last > COMMIT_SECONDS:
                    self._unfinished.commit(pending)
                    pending, last = {}, time.monotonic()
            self._unfinished.commit(pending)
        except BaseException as error:
            self._error = error
            self._failed.set()


class Rolling:
    """The projected region of the block at hand; what the next one shares with it is kept."""

    def __init__(self, engine: Engine, tiling: Tiling) -> None:
        self.engine, self.tiling = engine, tiling
        self._region: Region | None = None

    def move_to(self, piece: Piece) -> Region:
        """The region of ``piece``, with its new pixels projected."""
        planes, masks = self._tail(piece) if piece.follows else ([], [])
        self._region = None  # its memory, before the next one is made
        region = self.engine.region(piece.region)
        for plane, kept in zip(region.planes, planes, strict=False):
            plane[: len(kept)] = kept
        for valid, known in zip(region.valid, masks, strict=False):
            valid[: len(known)] = known
        if piece.rect.pixels:
            self.engine.project(region, piece.rect, piece.raw, piece.valid, self.tiling)
        piece.raw.clear()
        piece.valid.clear()
        self._region = region
        return region

    def _tail(self, piece: Piece) -> tuple[list[Tensor], list[np.ndarray]]:
        assert self._region is not None
        first = piece.region.top - self._region.rect.top
        planes = [plane[first * piece.region.width :].clone() for plane in self._region.planes]
        return planes, [valid[first:].copy() for valid in self._region.valid]
