"""zarr stores in the child process: a folder whose links may not lead out of it, or a .zip file read in place."""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Iterator
from typing import Any

from child_common import DEEPEST, Refused

_LARGEST_METADATA = 8 * 2**20
_EXPANSION = 1040  # no deflate stream grows by more


class Folder:
    """A store that is a folder; what its links lead out to does not belong to it."""

    def __init__(self, path: str) -> None:
        self.root = os.path.realpath(path)
        self.refused: dict[str, str] = {}

    def file(self, key: str) -> str | None:
        """Return the path of a key's file, None where there is none."""
        full = os.path.realpath(os.path.join(self.root, key))
        if os.path.commonpath([full, self.root]) != self.root:
            raise Refused(f"leads out of the store: '{key}' is a link to {full}")
        try:
            mode = os.stat(full).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(mode):
            raise Refused(f"is damaged: '{key}' is no regular file")
        return full

    def size(self, key: str) -> int | None:
        """Return the bytes of a key's file, None where there is none."""
        file = self.file(key)
        return None if file is None else os.path.getsize(file)

    def read(self, key: str, start: int = 0, size: int = _LARGEST_METADATA) -> bytes | None:
        """Return part of a key's file, counted from its end where ``start`` is negative."""
        file = self.file(key)
        if file is None:
            return None
        with open(file, "rb") as stream:
            stream.seek(start, os.SEEK_SET if start >= 0 else os.SEEK_END)
            return stream.read(size)

    def nodes(self) -> Iterator[str]:
        """Yield the paths of groups and arrays, '' for the root; nothing below an array."""
        waiting = [("", 0)]
        while waiting:
            path, depth = waiting.pop(0)
            names = sorted(os.listdir(os.path.join(self.root, path)))
            yield path
            if depth < DEEPEST and ".zarray" not in names and not self._holds_array(path, names):
                below = [f"{path}/{name}" if path else name for name in names]
                waiting += [(key, depth + 1) for key in below if self._is_folder(key)]

    def _holds_array(self, path: str, names: list[str]) -> bool:
        return "zarr.json" in names and metadata(self, path, "zarr.json").get("node_type") == "array"

    def _is_folder(self, key: str) -> bool:
        full = os.path.join(self.root, key)
        if os.path.islink(full):
            self.refused[f"/{key}"] = "is a link, which is not followed: give what it leads to"
            return False
        return os.path.isdir(full)

    def files(self, path: str) -> int:
        """Count the files below a path."""
        return sum(len(names) for _, _, names in os.walk(os.path.join(self.root, path)))

    def store(self) -> Any:
        from zarr.storage import LocalStore

        return LocalStore(self.root, read_only=True)


class Archive:
    """A store in a .zip file; entries are read in place, never unpacked."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.refused: dict[str, str] = {}
        self.entries: dict[str, zipfile.ZipInfo] = {}
        self.archive = zipfile.ZipFile(path)
        for entry in self.archive.infolist():
            parts = entry.filename.split("/")
            if entry.filename.startswith("/") or "\\" in entry.filename or ".." in parts:
                raise Refused(f"is refused: its entry '{entry.filename}' climbs out of the archive")
            if entry.flag_bits & 1:
                raise Refused("is encrypted: unpack it first")
            if entry.file_size > max(entry.compress_size, 1) * _EXPANSION:
                raise Refused(f"is refused: its entry '{entry.filename}' claims to unpack to {entry.file_size} bytes")
            self.entries[entry.filename] = entry

    def size(self, key: str) -> int | None:
        """Return the unpacked bytes of an entry, None where there is none."""
        return self.entries[key].file_size if key in self.entries else None

    def read(self, key: str, start: int = 0, size: int = _LARGEST_METADATA) -> bytes | None:
        """Return part of an entry, counted from its end where ``start`` is negative."""
        entry = self.entries.get(key)
        if entry is None:
            return None
        with self.archive.open(entry) as stream:
            stream.seek(start if start >= 0 else max(0, entry.file_size + start))
            return stream.read(size)

    def nodes(self) -> Iterator[str]:
        """Yield the paths of groups and arrays, '' for the root."""
        yield from sorted(
            {
                os.path.dirname(name)
                for name in self.entries
                if os.path.basename(name) in ("zarr.json", ".zarray", ".zgroup")
            }
        )

    def files(self, path: str) -> int:
        """Count the entries below a path."""
        return sum(name.startswith(f"{path}/" if path else "") for name in self.entries)

    def store(self) -> Any:
        from zarr.storage import ZipStore

        return ZipStore(self.path, mode="r")


Store = Folder | Archive


def metadata(store: Store, path: str, name: str) -> dict[str, Any]:
    """Read a JSON file of a node; empty where there is none."""
    text = store.read(f"{path}/{name}" if path else name)
    found = json.loads(text) if text is not None else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}/{name} is no JSON object")
    return found
