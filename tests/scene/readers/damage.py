"""What hostile and damaged files hold: bytes changed at random, and pickles that do something when they are read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers import open_raster
from fastdiffclip.scene.readers.source import RasterSource


def whole(source: RasterSource, step: int = 2) -> np.ndarray:
    """All rows, a few at a time."""
    starts = range(0, source.height, step)
    return np.concatenate([source.read_rows(slice(r, min(r + step, source.height))) for r in starts])


def assert_flips_are_survived(
    file: Path, variable: str, tries: int, *, places: int, seed: int, store: Path | None = None, last: int = 0,
    values: tuple[int, int] = (0, 256),
) -> None:  # fmt: skip
    """Whatever the damage, a raster reads through, or ends in one sentence that names it.

    ``places`` bytes of ``file`` at a time become any of ``values``; the ``last`` ones are left alone. ``store`` is
    what is opened, where that is not the file itself.
    """
    data, rng, path = file.read_bytes(), np.random.default_rng(seed), store or file
    for _ in range(tries):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data) - last, places):
            damaged[place] = rng.integers(*values)
        file.write_bytes(damaged)
        try:
            with open_raster(path, variable) as source:
                whole(source)
        except InputDataError as error:
            assert path.name in str(error) and "\n" not in str(error)


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return (os.mkdir, (self.folder,))
