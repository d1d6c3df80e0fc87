"""A file in the child process, as the parent sees it: what it holds, and rows of its arrays."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastdiffclip.errors import FastDiffCLIPError
from fastdiffclip.scene.readers import guard

_NO_VARIABLE = "This is a netCDF dimension but not a netCDF variable"
_users: Counter[tuple[int, str, str]] = Counter()


@dataclass(frozen=True)
class StoredArray:
    """One array: its path from the root, shape, dtype (None where it holds no real numbers) and a word for it.

    ``dims`` names each axis: the path of its coordinate array, a plain name, or an empty text. An alias is a second
    name of an array.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype | None
    kind: str
    dims: tuple[str, ...]
    attributes: dict[str, Any] = field(repr=False)
    alias: bool = False


@dataclass(frozen=True)
class Listing:
    """What a file holds: arrays by path, attributes of groups by path, and why a path is not followed."""

    arrays: dict[str, StoredArray]
    groups: dict[str, dict[str, Any]]
    refused: dict[str, str]

    def nearby(self, start: str, name: str) -> StoredArray | None:
        """Find an array by name from the group of ``start`` upwards, as NetCDF looks for coordinates."""
        if name.startswith("/"):
            return self.arrays.get(name)
        group = start.rpartition("/")[0]
        while True:
            found = self.arrays.get(f"{group}/{name}")
            if found is not None or not group:
                return found
            group = group.rpartition("/")[0]


class GuardedFile:
    """An open file of the child process; ``module`` is one of ``child.MODULES``, ``kind`` its format in words.

    Every method raises InputDataError when the file is damaged or too much for the limits, and
    :class:`guard.MissingArray` for a name that is not there.
    """

    def __init__(self, path: Path, module: str, kind: str) -> None:
        self.path, self.module, self.kind = path, module, kind
        self._place = str(path.resolve())
        self._key = (os.getpid(), module, self._place)
        self._open = True
        _users[self._key] += 1

    def call(self, call: str, seconds: float, what: str, out: np.ndarray | None = None, **arguments: Any) -> Any:
        """Have the child carry out a call about this file."""
        message = {"module": self.module, "call": call, "arguments": {"path": self._place, **arguments}}
        return guard.request(what, self.kind, message, seconds, out)

    def listing(self) -> Listing:
        """Read what the file says of itself."""
        found = self.call("describe", guard.HEADER_TIME_S, str(self.path))
        arrays = {
            row["name"]: StoredArray(
                row["name"],
                tuple(row["shape"]),
                np.dtype(row["dtype"]) if row["dtype"] else None,
                row["kind"],
                tuple(row["dims"]),
                row["attributes"],
                row["alias"],
            )
            for row in found["arrays"]
            if not str(row["attributes"].get("NAME", "")).startswith(_NO_VARIABLE)
        }
        return Listing(arrays, found["groups"], found["refused"])

    def check(self, name: str, **more: Any) -> None:
        """Raise InputDataError where the values of an array are out of reach or declare too much."""
        self.call("open", guard.HEADER_TIME_S, f"{self.path}:{name}", name=name, **more)

    def vector(self, name: str) -> np.ndarray:
        """Return all values of a small array as float64, flat."""
        found = self.call("vector", guard.DATA_TIME_S, f"{self.path}:{name}", name=name)
        return np.asarray(found["values"], np.float64)

    def rows(
        self, name: str, dtype: np.dtype, shape: tuple[int, int, int], rows: slice, **arguments: Any
    ) -> np.ndarray:
        """Return a block of rows (h, width, bands) of an array of ``shape`` (height, width, bands)."""
        block = np.empty((rows.stop - rows.start, *shape[1:]), dtype.newbyteorder("="))
        self.call(
            "rows", guard.DATA_TIME_S, f"{self.path}:{name}", block, name=name, start=rows.start, stop=rows.stop,
            **arguments,
        )  # fmt: skip
        return block

    def close(self) -> None:
        """Let the child forget the file, once its last user is gone."""
        if not self._open:
            return
        self._open = False
        _users[self._key] -= 1
        if _users[self._key] <= 0:
            _users.pop(self._key, None)
            if guard.process_id() is not None:
                with contextlib.suppress(FastDiffCLIPError):  # a library that cannot let go of a damaged file
                    self.call("close", guard.HEADER_TIME_S, str(self.path))
