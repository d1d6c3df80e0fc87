"""The per-pixel spectral front end, `standard` or `mnf`, and scenes prepared with it.

It is fitted without labels on the training scenes and stored with the model. `standard` centres and scales
each band; `mnf` does so for modalities of few channels, and projects the others (see ``mnf``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fastdiffclip.errors import InputDataError, ResourceError, UsageError, nearest
from fastdiffclip.scene.blocks import iter_row_blocks
from fastdiffclip.scene.front_end import (
    FOLDED_DTYPES,
    FrontEnd,
    ModalityInput,
    Standard,
    physical_values,
    wavelengths_in_nm,
)
from fastdiffclip.scene.mnf import Projection, fit_projection

if TYPE_CHECKING:
    from fastdiffclip.scene.store import Scene

__all__ = [
    "FrontEnd",
    "PreparedModality",
    "PreparedScenes",
    "fit_front_end",
    "pack_valid",
    "prepare_scenes",
    "prepared_bytes",
    "storage_dtypes",
    "unpack_valid",
]

KINDS = ("standard", "mnf")
_FEW_CHANNELS = 8
_SPECTRAL_CHANNELS = 16


@dataclass(frozen=True)
class PreparedModality:
    """One modality of all scenes on a flat pixel axis of N pixels.

    ``pixels`` (N, C): uint16, int16 or float16 as stored, or float32 prepared values; ``scale``, ``offset``
    (C,) float32 with value = pixels * scale + offset; ``valid`` (ceil(N/8),) uint8: pixel n is bit n % 8
    (least significant first) of byte n // 8. Invalid pixels hold finite numbers: 0, or the mean as closely as
    the stored type can.
    """

    pixels: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    valid: np.ndarray


@dataclass(frozen=True)
class PreparedScenes:
    """All modalities, and ``extents`` (S, 3) int64: first flat pixel, height and width of each scene."""

    modalities: dict[str, PreparedModality]
    extents: np.ndarray


def fit_front_end(kind: str, scenes: Sequence[Scene], components: int = 30) -> FrontEnd:
    """Fit the front end ``kind`` ("standard" or "mnf") on the valid pixels of ``scenes``, without labels.

    `standard`: per band, value = (x - mean) / std over the valid pixels of all scenes; 0 for a constant band;
    bad bands are dropped. `mnf`: spectra (a modality of at least 8 bands with wavelengths, or the first one
    with at least 16) get at most ``components`` minimum noise fraction components, other modalities of at
    least 8 bands a half-whitened PCA of as many, and the rest stays `standard`. A band counts as bad where
    any scene marks it so. Projections also leave constant bands out.

    Raises UsageError for an unknown kind, no scene or ``components < 1``; InputDataError where the scenes do
    not go together, or a modality has no valid pixel or no good band.
    """
    if kind not in KINDS:
        raise UsageError(f"there is no front end '{kind}'{nearest(kind, KINDS)}: choose {' or '.join(KINDS)}")
    if not scenes or components < 1:
        raise UsageError(f"a front end needs at least one scene and one component, got {len(scenes)} and {components}")
    inputs = {name: _common_input(scenes, name) for name in scenes[0].modalities}
    for scene in scenes:
        FrontEnd(kind, inputs, {}).check(scene)
    transforms: dict[str, Standard | Projection] = {}
    for name in inputs:
        inputs[name], transforms[name] = _fit_modality(kind, scenes, name, inputs[name], components)
    return FrontEnd(kind, inputs, transforms)


def storage_dtypes(scenes: Sequence[Scene], front_end: FrontEnd) -> dict[str, np.dtype]:
    """Return the dtype in which each modality of ``scenes`` is prepared.

    Where all scenes store one type of 16 bits, it stays, and scale and offset are folded into the kernels;
    elsewhere, and after a projection, it is float32 values.
    """
    dtypes = {}
    for name, transform in front_end.transforms.items():
        stored = {np.dtype(scene.modalities[name].dtype).name for scene in scenes}
        folded = isinstance(transform, Standard) and len(stored) == 1 and stored <= FOLDED_DTYPES
        dtypes[name] = np.dtype(stored.pop() if folded else "float32")
    return dtypes


def prepared_bytes(scenes: Sequence[Scene], front_end: FrontEnd) -> int:
    """Return the memory that ``prepare_scenes`` keeps, in bytes."""
    pixels = sum(scene.height * scene.width for scene in scenes)
    dtypes = storage_dtypes(scenes, front_end)
    return sum(pixels * c * dtypes[name].itemsize + -(-pixels // 8) for name, c in front_end.channels.items())


def prepare_scenes(scenes: Sequence[Scene], front_end: FrontEnd, memory_bytes: int | None = None) -> PreparedScenes:
    """Read all scenes block by block and return them prepared, concatenated on one flat pixel axis.

    Raises ResourceError where the result would exceed ``memory_bytes``, InputDataError where a scene does not
    fit the front end.
    """
    for scene in scenes:
        front_end.check(scene)
    needed = prepared_bytes(scenes, front_end)
    if memory_bytes is not None and needed > memory_bytes:
        raise ResourceError(
            f"the prepared scenes need {needed / 2**30:.2f} GiB, more than the budget of "
            f"{memory_bytes / 2**30:.2f} GiB: raise the budget, or read windows from disk"
        )
    sizes = np.array([[s.height, s.width] for s in scenes], np.int64).reshape(-1, 2)
    ends = np.cumsum(sizes.prod(axis=1))
    extents = np.column_stack([ends - sizes.prod(axis=1), sizes])
    modalities = {
        name: _prepare_modality(scenes, front_end, name, dtype, extents)
        for name, dtype in storage_dtypes(scenes, front_end).items()
    }
    return PreparedScenes(modalities=modalities, extents=extents)


def pack_valid(valid: np.ndarray) -> np.ndarray:
    """Return the bitmap (ceil(N/8),) uint8 of ``valid`` (N,) bool, least significant bit first."""
    return np.packbits(valid.reshape(-1), bitorder="little")


def unpack_valid(bitmap: np.ndarray, pixels: int) -> np.ndarray:
    """Return (pixels,) bool, the inverse of ``pack_valid``."""
    return np.unpackbits(bitmap, count=pixels, bitorder="little").astype(bool)


def _prepare_modality(
    scenes: Sequence[Scene], front_end: FrontEnd, name: str, dtype: np.dtype, extents: np.ndarray
) -> PreparedModality:
    total = int((extents[:, 1] * extents[:, 2]).sum())
    pixels = np.empty((total, front_end.channels[name]), dtype)
    valid = np.zeros(total, bool)
    for scene, first in zip(scenes, extents[:, 0], strict=True):
        for block in iter_row_blocks(scene, modalities=[name]):
            packed, packed_valid = front_end.pack(name, block.raw[name], block.valid[name], dtype)
            at = slice(first + block.rows.start * scene.width, first + block.rows.stop * scene.width)
            pixels[at], valid[at] = packed.reshape(-1, packed.shape[-1]), packed_valid.reshape(-1)
    scale, offset = front_end.scale_offset(name, dtype)
    return PreparedModality(pixels=pixels, scale=scale, offset=offset, valid=pack_valid(valid))


def _fit_modality(
    kind: str, scenes: Sequence[Scene], name: str, source: ModalityInput, components: int
) -> tuple[ModalityInput, Standard | Projection]:
    mean, std = _combined_statistics(scenes, name)
    standard = _standard(source, mean[source.kept], std[source.kept])
    varying = replace(source, kept=source.kept[standard.scale != 0])
    method = _choose_method(kind, name == next(iter(scenes[0].modalities)), varying)
    if method == "standard":
        return source, standard
    power = mean[varying.kept] ** 2 + std[varying.kept] ** 2
    projection = fit_projection(
        scenes,
        name,
        physical=lambda raw: physical_values(raw[:, varying.kept], varying),
        rms_floor=1e-3 * float(np.sqrt(power.mean())) if method == "mnf" else None,
        components=components,
    )
    return (source, standard) if projection is None else (varying, projection)


def _choose_method(kind: str, first: bool, source: ModalityInput) -> str:
    bands = len(source.kept)
    if kind == "standard" or bands < _FEW_CHANNELS:
        return "standard"
    spectral = source.wavelengths_nm is not None or (first and bands >= _SPECTRAL_CHANNELS)
    return "mnf" if spectral else "pca"


def _common_input(scenes: Sequence[Scene], name: str) -> ModalityInput:
    first = scenes[0].modalities[name]
    bad = np.zeros(first.bands, bool)
    for scene in scenes:
        modality = scene.modalities.get(name)
        if modality is not None and modality.bad_bands is not None and modality.bands == first.bands:
            bad |= np.asarray(modality.bad_bands, bool)
    if bad.all():
        raise InputDataError(f"'{name}' of scene '{scenes[0].name}' has no good band: all {first.bands} are marked bad")
    return ModalityInput(first.bands, np.flatnonzero(~bad), wavelengths_in_nm(first), first.scale, first.offset)


def _combined_statistics(scenes: Sequence[Scene], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return per-band mean and standard deviation, in physical units, of the valid pixels of all scenes."""
    parts = [s.modalities[name] for s in scenes if s.modalities[name].valid_pixels > 0]
    if not parts:
        raise InputDataError(
            f"'{name}' has no valid pixel in {', '.join(s.name for s in scenes)}: check nodata and the validity masks"
        )
    counts = np.array([p.valid_pixels for p in parts], np.float64)[:, None]
    means = np.array([p.mean for p in parts], np.float64)
    variances = np.array([p.std for p in parts], np.float64) ** 2
    mean = (counts * means).sum(axis=0) / counts.sum()
    variance = (counts * (variances + (means - mean) ** 2)).sum(axis=0) / counts.sum()
    return mean, np.sqrt(variance)


def _standard(source: ModalityInput, mean: np.ndarray, std: np.ndarray) -> Standard:
    # Below this, what varies is the rounding of float32 and not the scene.
    varies = std > 1e-7 * np.abs(mean)
    scale = np.divide(source.scale, std, out=np.zeros_like(std), where=varies)
    offset = np.divide(source.offset - mean, std, out=np.zeros_like(std), where=varies)
    return Standard(scale=scale, offset=offset)
