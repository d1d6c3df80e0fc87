"""What every reader returns: a raster whose rows can be read a block at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from fastdiffclip.errors import InputDataError

_INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_MOST_LISTED = 40
NUMERIC_TYPES = {"double", "single", "logical", "bool", "float16", "float32", "float64", *_INTEGERS}


@dataclass
class RasterSource:
    """An open raster (height, width, bands); physical value = stored value * ``scale`` + ``offset``.

    ``read_rows`` takes a row slice with bounds and returns (h, width, bands) in ``dtype``; ``read_mask``
    likewise (h, width) bool, True = valid, where the file has a mask of its own. What a file does not say
    is None. ``companions`` are further files that were read, ``warnings`` what the user should know. ``close``
    releases the file; a source is its own context manager.
    """

    path: Path
    height: int
    width: int
    bands: int
    dtype: np.dtype
    read_rows: Callable[[slice], np.ndarray]
    read_mask: Callable[[slice], np.ndarray] | None = None
    crs_wkt: str | None = None
    affine_transform: tuple[float, ...] | None = None
    nodata: float | None = None
    scale: float = 1.0
    offset: float = 0.0
    wavelengths: tuple[float, ...] | None = None  # nm
    fwhm: tuple[float, ...] | None = None  # nm
    bad_bands: tuple[bool, ...] | None = None
    class_names: dict[int, str] = field(default_factory=dict)
    class_colours: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    companions: tuple[Path, ...] = ()
    close: Callable[[], None] = lambda: None

    def __enter__(self) -> RasterSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def source_of_array(path: Path, what: str, array: np.ndarray, close: Callable[[], None] = lambda: None) -> RasterSource:
    """Wrap an array (H, W) or (H, W, bands), mapped or in memory; raises InputDataError for any other."""
    if array.dtype.kind not in "biuf":
        raise InputDataError(f"{what} holds {array.dtype}, expected real numbers: convert it first")
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise InputDataError(f"{what} has shape {array.shape}, expected (height, width) or (height, width, bands)")
    raster = array[:, :, np.newaxis] if array.ndim == 2 else array
    height, width, bands = raster.shape
    return RasterSource(path, height, width, bands, array.dtype, raster.__getitem__, close=close)


def choose_variable(path: Path, wanted: str | None, found: dict[str, tuple[tuple[int, ...], str]]) -> str:
    """Return the variable to read from ``found`` (name -> shape, type), the only numeric raster if none is
    wanted.

    Raises InputDataError that lists what is there.
    """
    listing = listed(found)
    if wanted is not None:
        if wanted not in found:
            raise InputDataError(f"{path} has no variable '{wanted}'; it holds {listing or 'nothing'}")
        return wanted
    rasters = [name for name, (shape, kind) in found.items() if len(shape) in (2, 3) and kind in NUMERIC_TYPES]
    if len(rasters) != 1:
        raise InputDataError(
            f"{path} holds {listing or 'nothing'}: say which variable to read, as in "
            f"{path.name}:{(rasters or ['NAME'])[0]}"
        )
    return rasters[0]


def listed(found: dict[str, tuple[tuple[int, ...], str]]) -> str:
    """Return variables (name -> shape, type) as a text, the first 40 of them."""
    shown = [f"{name} ({' x '.join(map(str, shape))} {kind})" for name, (shape, kind) in found.items()]
    more = f" and {len(shown) - _MOST_LISTED} more" if len(shown) > _MOST_LISTED else ""
    return ", ".join(shown[:_MOST_LISTED]) + more
