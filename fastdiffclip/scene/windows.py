"""Windows around pixels: the numba gather, the edge rule, and windows read from disk in chunk order.

Legend: B windows, P side of a window (odd), L = P * P tokens, C channels, N pixels of all scenes on one flat
axis, S scenes. Token l of a window is its pixel (l // P, l % P).

Edge rule: coordinates are clamped to the scene. A neighbour that is invalid in the modality reads as the
centre pixel. A value is ``pixel * scale + offset`` in float32, rounded after each of the two operations.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fastdiffclip.errors import InputDataError, ResourceError, UsageError
from fastdiffclip.scene.blocks import RowReader, iter_row_blocks
from fastdiffclip.scene.gather_cache import NumbaUnavailableError, compile_gather
from fastdiffclip.scene.prepare import (
    FrontEnd,
    PreparedModality,
    PreparedScenes,
    pack_valid,
    storage_dtypes,
)

if TYPE_CHECKING:
    from fastdiffclip.scene.store import Scene

__all__ = [
    "centre_mask",
    "crop_centres",
    "crop_windows",
    "gather_backend",
    "gather_windows",
    "iter_row_blocks",
    "read_windows",
    "require_whole_windows",
    "token_valid",
    "window_radius",
]

logger = logging.getLogger(__name__)
# What numba compiles; float16 it cannot read on a CPU, and that path takes numpy.
_NUMBA_DTYPES = frozenset({"uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"})
_BATCH_BYTES = 64 << 20
# numba's workqueue layer aborts the process when two threads run parallel code at once.
_parallel = threading.Lock()


def window_radius(window: int) -> int:
    """Return ``window // 2``; raise UsageError for an even window or one below 1."""
    if window < 1 or window % 2 == 0:
        raise UsageError(f"the window must be odd and at least 1, not {window}: choose {max(1, window + 1)}")
    return window // 2


def crop_centres(count: int, window: int) -> np.ndarray:
    """Return the centres (count, 3) int64 of the scenes of ``read_windows``: (number, r, r)."""
    radius = window_radius(window)
    return np.stack([np.arange(count), *np.full((2, count), radius)], axis=1).astype(np.int64)


def gather_windows(
    modality: PreparedModality,
    extents: np.ndarray,
    centres: np.ndarray,
    window: int,
    out: np.ndarray | None = None,
    *,
    impl: str | None = None,
) -> np.ndarray:
    """Return the windows around ``centres`` as float32 (B, L, C).

    ``modality``: pixels (N, C), scale and offset (C,) float32, valid bitmap. ``extents`` (S, 3) int64: first
    pixel, height, width. ``centres`` (B, 3) int64: scene, row, col. ``window``: P, odd, may exceed the scene.
    ``out``: float32 (B, L, C), C-contiguous, is filled and returned. ``impl``: "numba", "numpy" or None for
    the best that is there; both give the same bits.

    Raises UsageError for an even window or an unknown ``impl``, ValueError for a centre outside its scene or
    an ``out`` that does not fit, ResourceError where ``impl="numba"`` and numba does not work here.
    """
    radius = window_radius(window)
    extents, centres = _checked(modality, extents, centres)
    shape = (len(centres), window * window, modality.pixels.shape[1])
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out must be C-contiguous float32 {shape}, got {out.dtype} {out.shape}")
    compiled = _choose(impl, modality.pixels.dtype)
    if compiled is None:
        _gather_numpy(modality, extents, centres, radius, out)
        return out
    arrays = (modality.pixels, modality.scale, modality.offset, modality.valid, extents, centres)
    with _parallel, _torch_threads_kept() as threads:
        _use_threads(threads)
        compiled(*(np.ascontiguousarray(a) for a in arrays), radius, out)
    return out


def token_valid(modality: PreparedModality, extents: np.ndarray, centres: np.ndarray, window: int) -> np.ndarray:
    """Return bool (B, L): which tokens of the windows are valid pixels of this modality, edges clamped."""
    radius = window_radius(window)
    extents, centres = _checked(modality, extents, centres)
    return _bits(modality.valid, _token_pixels(extents, centres, radius))


def centre_mask(scene: Scene) -> np.ndarray:
    """Return (height, width) bool: pixels valid in ALL modalities; of a scene that is one window, only its centre."""
    mask = scene.read_valid_everywhere()
    if scene.centre_only:
        centre = mask[scene.height // 2, scene.width // 2]
        mask[:] = False
        mask[scene.height // 2, scene.width // 2] = centre
    return mask


def require_whole_windows(scenes: Sequence[Scene], window: int) -> None:
    """Raise InputDataError where a scene that is one window is not ``window`` pixels wide."""
    for scene in scenes:
        if scene.centre_only and scene.height != window:
            raise InputDataError(
                f"scene {scene.path} is one window of {scene.height} x {scene.width} pixels and the model's window is "
                f"{window}: train with --set model.window={scene.height}, or ingest again for windows of {window}"
            )


def read_windows(
    scenes: Sequence[Scene],
    front_end: FrontEnd,
    centres: np.ndarray,
    window: int,
    between: Callable[[], None] = lambda: None,
) -> PreparedScenes:
    """Read the windows around ``centres`` (B, 3) from disk, for scenes beyond the memory budget.

    Each window becomes a scene of its own: S = B, extents (b * L, P, P), edge pixels repeated, validity
    included. Gathering at centre (b, r, r), r = P // 2, gives the same bits as ``gather_windows`` on the
    prepared scenes at ``centres[b]``. Chunks are read in order, each at most once per modality; beside the
    result, memory holds one row of chunks and 64 MiB. ``between`` is called before each of these is read; what
    it raises ends the reading.

    Raises UsageError for an even window, ValueError for a centre outside its scene, InputDataError for a
    scene that does not fit the front end.
    """
    radius = window_radius(window)
    for scene in scenes:
        front_end.check(scene)
    sizes = np.array([[0, s.height, s.width] for s in scenes], np.int64).reshape(-1, 3)
    centres = _checked_centres(sizes, centres)
    modalities = {
        name: _read_modality(scenes, front_end, name, dtype, centres, radius, between)
        for name, dtype in storage_dtypes(scenes, front_end).items()
    }
    return PreparedScenes(modalities=modalities, extents=_crop_extents(len(centres), window))


def crop_windows(prepared: PreparedScenes, centres: np.ndarray, window: int) -> PreparedScenes:
    """Return what ``read_windows`` returns for ``centres`` (B, 3), cut out of scenes that are in memory.

    Raises UsageError for an even window, ValueError for a centre outside its scene.
    """
    radius = window_radius(window)
    centres = _checked_centres(prepared.extents, centres)
    pixels = _token_pixels(prepared.extents, centres, radius).reshape(-1)
    modalities = {
        name: replace(part, pixels=part.pixels.take(pixels, axis=0), valid=pack_valid(_bits(part.valid, pixels)))
        for name, part in prepared.modalities.items()
    }
    return PreparedScenes(modalities=modalities, extents=_crop_extents(len(centres), window))


def _crop_extents(count: int, window: int) -> np.ndarray:
    starts = np.arange(count, dtype=np.int64) * window**2
    side = np.full_like(starts, window)
    return np.stack([starts, side, side], axis=1)


def gather_backend() -> tuple[str, str]:
    """Return ``(name, reason)``: ("numba", "") or ("numpy", why numba is not used). Compiles on first use."""
    compiled, reason = _compiled("uint16")
    return ("numba", "") if compiled else ("numpy", reason)


@contextmanager
def _torch_threads_kept() -> Iterator[int | None]:
    """Yield torch's number of threads (None: not imported) and see that it stays.

    numba's OpenMP layer sets the number for the whole process when it starts; torch, meant to run on one thread
    beside other processes, then spins on several and is a hundred times slower in small operations.
    """
    torch = sys.modules.get("torch")
    threads = None if torch is None else torch.get_num_threads()
    try:
        yield threads
    finally:
        if torch is not None and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import numba

        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


def _choose(impl: str | None, dtype: np.dtype) -> Callable[..., None] | None:
    if impl not in (None, "numba", "numpy"):
        raise UsageError(f"the window gather has no implementation '{impl}': choose numba or numpy")
    if impl == "numpy" or (impl is None and dtype.name not in _NUMBA_DTYPES):
        return None
    compiled, reason = _compiled(dtype.name)
    if compiled is None and impl == "numba":
        raise ResourceError(f"the numba window gather does not work here ({reason}): leave impl out to use numpy")
    return compiled


@functools.cache
def _compiled(dtype_name: str) -> tuple[Callable[..., None] | None, str]:
    """Compile once per process and dtype; where that fails, say why and leave the work to numpy."""
    if dtype_name not in _NUMBA_DTYPES:
        return None, f"numba reads no {dtype_name} on a CPU"
    try:
        with _torch_threads_kept():
            return compile_gather(np.dtype(dtype_name)), ""
    except NumbaUnavailableError as error:
        logger.debug("windows are gathered by numpy: %s", error)
        return None, str(error)


def _gather_numpy(
    modality: PreparedModality, extents: np.ndarray, centres: np.ndarray, radius: int, out: np.ndarray
) -> None:
    step = max(1, _BATCH_BYTES // max(1, out[:1].nbytes))
    for begin in range(0, len(centres), step):
        part = centres[begin : begin + step]
        pixels = _token_pixels(extents, part, radius)
        centre = _token_pixels(extents, part, 0)
        values = modality.pixels[np.where(_bits(modality.valid, pixels), pixels, centre)]
        target = out[begin : begin + step]
        np.multiply(values.astype(np.float32), modality.scale, out=target)
        target += modality.offset


def _token_pixels(extents: np.ndarray, centres: np.ndarray, radius: int) -> np.ndarray:
    """Return (B, L) int64: the flat index of every token's pixel, coordinates clamped."""
    first, height, width = extents[centres[:, 0]].T[:, :, None]
    reach = np.arange(-radius, radius + 1)
    rows = np.clip(centres[:, 1, None] + reach, 0, height - 1)
    cols = np.clip(centres[:, 2, None] + reach, 0, width - 1)
    flat = (first + rows * width)[:, :, None] + cols[:, None, :]
    return flat.reshape(len(centres), -1)


def _bits(bitmap: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    return (bitmap[pixels >> 3] >> (pixels & 7).astype(np.uint8)) & 1 == 1


def _checked(modality: PreparedModality, extents: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    extents = np.ascontiguousarray(extents, np.int64).reshape(-1, 3)
    ends = extents[:, 0] + extents[:, 1] * extents[:, 2]
    if len(ends) and (ends.max() > len(modality.pixels) or ends.max() > 8 * len(modality.valid)):
        raise ValueError(f"extents reach pixel {ends.max()}, the modality has {len(modality.pixels)}")
    return extents, _checked_centres(extents, centres)


def _checked_centres(extents: np.ndarray, centres: np.ndarray) -> np.ndarray:
    centres = np.ascontiguousarray(centres, np.int64).reshape(-1, 3)
    scene = centres[:, 0]
    bad_scene = (scene < 0) | (scene >= len(extents))
    within = extents[np.where(bad_scene, 0, scene), 1:] if len(extents) else np.zeros((len(centres), 2))
    outside = np.flatnonzero(bad_scene | np.any((centres[:, 1:] < 0) | (centres[:, 1:] >= within), axis=1))
    if len(outside):
        bad = int(outside[0])
        raise ValueError(f"centre {bad} (scene, row, col) = {tuple(centres[bad].tolist())} lies outside its scene")
    return centres


def _read_modality(
    scenes: Sequence[Scene],
    front_end: FrontEnd,
    name: str,
    dtype: np.dtype,
    centres: np.ndarray,
    radius: int,
    between: Callable[[], None],
) -> PreparedModality:
    window = 2 * radius + 1
    length = window * window
    pixels = np.empty((len(centres), length, front_end.channels[name]), dtype)
    valid = np.empty((len(centres), length), bool)
    for number, scene in enumerate(scenes):
        wanted = np.flatnonzero(centres[:, 0] == number)
        for group, raw, raw_valid in _raw_windows(scene, name, centres, wanted, radius, between):
            pixels[group], valid[group] = front_end.pack(name, raw, raw_valid, dtype)
    scale, offset = front_end.scale_offset(name, dtype)
    return PreparedModality(
        pixels=pixels.reshape(len(centres) * length, front_end.channels[name]),
        scale=scale,
        offset=offset,
        valid=pack_valid(valid),
    )


def _raw_windows(
    scene: Scene, name: str, centres: np.ndarray, wanted: np.ndarray, radius: int, between: Callable[[], None]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield ``(window numbers (b,), raw (b, L, bands), valid (b, L))``, top of the scene first."""
    wanted = wanted[np.argsort(centres[wanted, 1], kind="stable")]
    modality = scene.modalities[name]
    reader = RowReader(scene, name)
    step = max(1, scene.chunk_rows(name))
    reach = np.arange(-radius, radius + 1)
    window_bytes = len(reach) ** 2 * modality.bands * max(4, np.dtype(modality.dtype).itemsize)
    most = max(1, _BATCH_BYTES // window_bytes)
    begin = 0
    while begin < len(wanted):
        rows = centres[wanted[begin:], 1]
        count = min(most, int(np.searchsorted(rows, rows[0] + step)))
        group = wanted[begin : begin + count]
        row = np.clip(centres[group, 1, None] + reach, 0, scene.height - 1)
        col = np.clip(centres[group, 2, None] + reach, 0, scene.width - 1)
        top = int(row.min())
        between()
        raw, valid = reader.rows(top, int(row.max()) + 1)
        at = (row[:, :, None] - top, col[:, None, :])
        yield group, raw[at].reshape(count, -1, raw.shape[2]), valid[at].reshape(count, -1)
        begin += count
