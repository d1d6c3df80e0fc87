"""A prediction that is not finished: raw files beside the output, and a journal of the tiles that stand in them.

The folder ``.<output>.partial`` holds one raw file per layer (classes, probabilities, confidence), ``run.json`` (what
is predicted, with what, how it is cut), a journal per process (``journal-<rank>``: a tile and the CRC-32 of its bytes
in each layer, on a line that has a checksum itself), and locks, which the system releases when their process dies. A
line is written after what it stands for has reached the disk, so whatever ends a process leaves a state to go on from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from fastdiffclip.errors import UsageError
from fastdiffclip.files import write_atomic
from fastdiffclip.infer.rawfile import Layer, RawFile
from fastdiffclip.infer.tiles import Rect
from fastdiffclip.locks import Lock

RUN, LOCK = "run.json", "lock"


class Unfinished:
    """The folder of a prediction, open in one process. Closed by leaving it as a context manager.

    Attributes:
        done: the tiles that this and, as of the last :meth:`refresh`, other processes have finished.
    """

    def __init__(self, out: Path, layers: Sequence[Layer], area: Rect, rank: int) -> None:
        self.folder, self.area, self.rank = folder_of(out), area, rank
        self.files: dict[str, RawFile] = {}
        self.done: set[int] = set()
        self._read: dict[str, int] = {}
        self._alive = Lock(self.folder / f"rank-{rank}.lock")
        self._alive.acquire()
        for layer in layers:
            self.files[layer.name] = RawFile(self.folder, layer, area.height, area.width)
        self._journal = os.open(self._journal_path(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            file.close()
        os.close(self._journal)
        self._alive.release()

    def write(self, tile: Rect, layers: Mapping[str, np.ndarray]) -> list[int]:
        """Put a tile's part of the area into the raw files; returns the CRC-32 of each layer."""
        inside = tile.within(self.area)
        place, here = inside.relative_to(self.area), inside.relative_to(tile).slices
        return [file.write(place, layers[name][:, *here]) for name, file in self.files.items()]

    def commit(self, tiles: Mapping[int, Sequence[int]]) -> None:
        """Enter tiles and the CRC-32 of their layers into the journal, once the disk has them."""
        for file in self.files.values():
            file.sync()
        data = "".join(_line(number, sums) for number, sums in tiles.items()).encode()
        while data:
            data = data[os.write(self._journal, data) :]
        os.fdatasync(self._journal)
        self.done |= tiles.keys()

    def refresh(self) -> None:
        """Take up what other processes have entered since."""
        for path in self._journals():
            if path != self._journal_path(self.rank):
                self.done |= self._entries(path).keys()

    def _journals(self) -> list[Path]:
        return sorted(self.folder.glob("journal-*"))

    def verify(self, tiles: Mapping[int, Rect]) -> None:
        """Take up all journals of an earlier run; a tile whose bytes differ from its entry counts as missing."""
        entries: dict[int, tuple[int, ...]] = {}
        for path in self._journals():
            entries |= self._entries(path)
        for number, sums in entries.items():
            if number in tiles and sums == tuple(self._sums(tiles[number])):
                self.done.add(number)
        # One journal of what is right: nothing of the other kind is left to mislead a later process.
        kept = "".join(_line(number, entries[number]) for number in sorted(self.done))
        for path in self._journals():
            if path != self._journal_path(self.rank):
                path.unlink()
        self._read.clear()
        write_atomic(self._journal_path(self.rank), kept.encode())
        os.close(self._journal)
        self._journal = os.open(self._journal_path(self.rank), os.O_WRONLY | os.O_APPEND)

    def _sums(self, tile: Rect) -> list[int]:
        place = tile.within(self.area).relative_to(self.area)
        return [crc32(file.read(place).data) for file in self.files.values()]

    def _entries(self, path: Path) -> dict[int, tuple[int, ...]]:
        """Entries of a journal that were not read before; a line that was cut off is left for later."""
        found: dict[int, tuple[int, ...]] = {}
        with open(path, "rb") as file:
            file.seek(self._read.get(path.name, 0))
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read[path.name] = self._read.get(path.name, 0) + len(line)
                entry = _parsed(line)
                if entry is not None and len(entry) == len(self.files) + 1:
                    found[entry[0]] = entry[1:]
        return found

    def _journal_path(self, rank: int) -> Path:
        return self.folder / f"journal-{rank}"


def _line(number: int, sums: Sequence[int]) -> str:
    text = " ".join(map(str, (number, *sums)))
    return f"{text} {crc32(text.encode())}\n"


def _parsed(line: bytes) -> tuple[int, ...] | None:
    """Tile and sums of a line; None for one that was not written as a whole."""
    try:
        *numbers, _ = (int(word) for word in line.split())
        return tuple(numbers) if numbers and line == _line(numbers[0], numbers[1:]).encode() else None
    except ValueError:
        return None


def folder_of(out: Path) -> Path:
    """Where the unfinished prediction of an output lies."""
    return out.with_name(f".{out.name}.partial")


def start(out: Path, run: Mapping[str, Any], resume: bool) -> tuple[Lock, bool]:
    """Take the folder of ``out`` for a run; returns the lock that keeps others out, and whether it resumes.

    ``run`` is JSON-able and identifies what is predicted. Without ``resume`` what a dead process left is removed.

    Raises:
        UsageError: another process is at work on ``out``; or what is to be resumed was started as another prediction.
        OSError: the folder cannot be made.
    """
    folder = folder_of(out)
    lock = _locked(folder)
    if lock is None:
        raise UsageError(f"another process is predicting into {out} at this moment; wait for it, or give another --out")
    try:
        found = _stored(folder)
        resumed = resume and found is not None
        if resume and found is not None and found != run:
            raise UsageError(
                f"the unfinished prediction of {out} was started with {_difference(found, run)}; "
                f"resume with the same, or leave out --resume to start again"
            )
        if not resumed:
            for path in folder.iterdir():
                if path.name != LOCK:
                    _remove(path)
            try:
                write_atomic(folder / RUN, json.dumps(run).encode())
            except BaseException:  # nothing to resume
                discard(out)
                raise
    except BaseException:
        lock.release()
        raise
    return lock, resumed


def _locked(folder: Path) -> Lock | None:
    """The lock of the folder, which is made; None where another process has it."""
    lock = Lock(folder / LOCK)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # its last user removed the folder in between
            return lock if lock.acquire(blocking=False) else None


def discard(out: Path) -> None:
    """Remove the folder of ``out`` at one stroke: under its name nobody finds half of it, or adds to it."""
    folder = folder_of(out)
    away = folder.with_name(f"{folder.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        folder.rename(away)
        shutil.rmtree(away, ignore_errors=True)


def _stored(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / RUN).read_bytes())
    except (OSError, ValueError):  # killed before the run began
        return None
    return found if isinstance(found, dict) else None


def _difference(found: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    names = [name for name in run if found.get(name) != run[name]]
    return f"another {' and '.join(names)}" if names else "another version"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
