"""What holds of every raster, whatever file it comes from and whichever reader opened it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers.source import RasterSource

_LARGEST = float(np.finfo(np.float32).max)


def sound(source: RasterSource) -> RasterSource:
    """Return the source, whose arithmetic no longer warns: what is beyond float32 becomes infinite, and so invalid.

    Raises InputDataError, having closed it, for a transform that places no pixel, and for a scale, an offset or
    wavelengths that are no numbers of use.
    """
    try:
        _check(source)
    except InputDataError:
        source.close()
        raise
    read_rows = source.read_rows

    def quietly(rows: slice) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            return read_rows(rows)

    return replace(source, read_rows=quietly)


def _check(source: RasterSource) -> None:
    if source.affine_transform is not None:
        a, b, c, d, e, f = source.affine_transform
        if not _finite((c, f)) or not 0 < abs(a * e - b * d) < math.inf:
            raise InputDataError(
                f"{source.path} has a transform that places no pixel (a to f are {a:g}, {b:g}, {c:g}, {d:g}, {e:g}, "
                f"{f:g}): georeference it again, or remove the transform"
            )
    if source.scale == 0 or not _finite((source.scale, source.offset)):
        raise InputDataError(
            f"{source.path} says that a physical value is the stored one times {source.scale:g} plus "
            f"{source.offset:g}, expected finite numbers and no 0: correct its metadata"
        )
    for what, values in (("wavelengths", source.wavelengths), ("widths of bands", source.fwhm)):
        if values is not None and not _finite(values):
            raise InputDataError(f"{source.path} gives {what} that are no finite numbers: correct its metadata")


def _finite(values: Iterable[float]) -> bool:
    return all(math.isfinite(value) and abs(value) <= _LARGEST for value in values)
