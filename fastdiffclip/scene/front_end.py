"""The fitted front end: what it does to a pixel, what it accepts, how it is stored with a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiffclip.errors import InputDataError, nearest
from fastdiffclip.scene.mnf import Projection

if TYPE_CHECKING:
    from fastdiffclip.scene.store import Modality, Scene

# Types that stay as they are, with scale and offset for the kernels; others are prepared to float32 values.
FOLDED_DTYPES = frozenset({"uint16", "int16", "float16"})
_WAVELENGTH_TOLERANCE_NM = 1.0
# Far beyond what the scenes of the fit can give; other scenes may hold anything, and a loss has to stay finite.
_LARGEST_VALUE = 1e6
_TO_NM = {"nm": 1.0, "nanometers": 1.0, "nanometres": 1.0, "um": 1e3, "µm": 1e3, "micrometers": 1e3}


@dataclass(frozen=True)
class ModalityInput:
    """What the front end takes from a modality: ``kept`` (G,) int64 of its ``bands``, physical units."""

    bands: int
    kept: np.ndarray
    wavelengths_nm: tuple[float, ...] | None
    scale: float
    offset: float


@dataclass(frozen=True)
class Standard:
    """``value = stored * scale + offset``, (G,) float64 each; both 0 for a constant band."""

    scale: np.ndarray
    offset: np.ndarray


@dataclass(frozen=True)
class FrontEnd:
    """Turns stored pixels of each modality into prepared values; made by ``fit_front_end``."""

    kind: str
    inputs: dict[str, ModalityInput]
    transforms: dict[str, Standard | Projection]

    @property
    def channels(self) -> dict[str, int]:
        """Output channels per modality, in order."""
        return {
            name: t.matrix.shape[1] if isinstance(t, Projection) else len(t.scale)
            for name, t in self.transforms.items()
        }

    def apply(self, modality: str, block: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Return prepared values (h, w, C) float32 of ``block`` (h, w, bands) in its stored dtype.

        ``valid`` (h, w) bool; an invalid pixel, or one that is not finite in a band that is used, becomes 0.
        The bits of a pixel do not depend on the block it comes in. Raises InputDataError for a wrong band
        count.
        """
        return self.pack(modality, block, valid, np.dtype(np.float32))[0]

    def pack(
        self, modality: str, block: np.ndarray, valid: np.ndarray, dtype: np.dtype
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ``(pixels (..., C) of a PreparedModality, valid (...) bool)`` of ``block`` (..., bands).

        ``dtype`` is what ``storage_dtypes`` says: float32 holds values, any other type stored numbers.
        """
        source, transform = self.inputs[modality], self.transforms[modality]
        if block.shape[-1] != source.bands:
            raise InputDataError(
                f"'{modality}' has {block.shape[-1]} bands, but the front end was fitted on {source.bands}"
            )
        x = block if len(source.kept) == source.bands else block[..., source.kept]
        valid = valid & np.isfinite(x).all(axis=-1) if x.dtype.kind == "f" else valid
        if isinstance(transform, Standard) and dtype != np.float32:
            packed = x.astype(dtype)
            packed[~valid] = _closest_to_zero(transform, dtype)
            return packed, valid
        if isinstance(transform, Standard):
            filled = np.where(valid[..., None], x, 0)
            if x.dtype.name in FOLDED_DTYPES:
                values = _folded_values(filled, transform)
            else:  # in float32, a large number times a small scale would lose what wider pixels hold
                wide = filled * transform.scale + transform.offset
                values = np.clip(wide, -_LARGEST_VALUE, _LARGEST_VALUE).astype(np.float32)
        else:
            flat = np.where(valid[..., None], x, 0).reshape(-1, x.shape[-1])
            values = transform.apply(physical_values(flat, source)).reshape(*valid.shape, -1)
            np.clip(values, -_LARGEST_VALUE, _LARGEST_VALUE, out=values)
        values[~valid] = 0
        return values, valid

    def scale_offset(self, modality: str, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Return (C,) float32 scale and offset that turn what ``pack`` gives into values."""
        transform = self.transforms[modality]
        if isinstance(transform, Standard) and dtype != np.float32:
            return transform.scale.astype(np.float32), transform.offset.astype(np.float32)
        channels = self.channels[modality]
        return np.ones(channels, np.float32), np.zeros(channels, np.float32)

    def check(self, scene: Scene) -> None:
        """Raise InputDataError, naming the difference, unless ``scene`` fits what this was fitted on.

        Every modality must be there with the same band count, stored scale and offset, wavelengths that
        differ by at most 1 nm, and none of the bands in use marked bad.
        """
        for name, source in self.inputs.items():
            if name not in scene.modalities:
                raise InputDataError(
                    f"scene '{scene.name}' has no modality '{name}'{nearest(name, list(scene.modalities))}: "
                    f"the front end needs {', '.join(self.inputs)}, "
                    f"the scene has {', '.join(scene.modalities)}"
                )
            _check_modality(f"'{name}' of scene '{scene.name}'", scene.modalities[name], source)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the fitted numbers by name, for a safetensors file."""
        arrays = {f"{name}.kept": source.kept for name, source in self.inputs.items()}
        for name, t in self.transforms.items():
            if isinstance(t, Projection):
                arrays |= {f"{name}.mean": t.mean, f"{name}.matrix": t.matrix}
            else:
                arrays |= {f"{name}.scale": t.scale, f"{name}.offset": t.offset}
        return arrays

    def to_meta(self) -> dict[str, Any]:
        """Return everything else as JSON data."""
        return {
            "kind": self.kind,
            "modalities": [
                {
                    "name": name,
                    "bands": source.bands,
                    "wavelengths_nm": source.wavelengths_nm and list(source.wavelengths_nm),
                    "scale": source.scale,
                    "offset": source.offset,
                    "method": _method_of(self.transforms[name]),
                    "rms_floor": getattr(self.transforms[name], "rms_floor", None),
                }
                for name, source in self.inputs.items()
            ],
        }

    @classmethod
    def from_parts(cls, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> FrontEnd:
        """Rebuild exactly what ``to_arrays`` and ``to_meta`` gave; InputDataError where a part is missing."""
        inputs: dict[str, ModalityInput] = {}
        transforms: dict[str, Standard | Projection] = {}
        try:
            for entry in meta["modalities"]:
                name, waves = entry["name"], entry["wavelengths_nm"]
                inputs[name] = ModalityInput(
                    bands=entry["bands"],
                    kept=arrays[f"{name}.kept"],
                    wavelengths_nm=None if waves is None else tuple(waves),
                    scale=entry["scale"],
                    offset=entry["offset"],
                )
                if entry["method"] == "standard":
                    transforms[name] = Standard(arrays[f"{name}.scale"], arrays[f"{name}.offset"])
                else:
                    parts = arrays[f"{name}.mean"], arrays[f"{name}.matrix"]
                    transforms[name] = Projection(*parts, rms_floor=entry["rms_floor"])
            return cls(kind=meta["kind"], inputs=inputs, transforms=transforms)
        except KeyError as error:
            raise InputDataError(f"the stored front end lacks {error}: the model file is damaged") from error


def _folded_values(stored: np.ndarray, transform: Standard) -> np.ndarray:
    return stored.astype(np.float32) * transform.scale.astype(np.float32) + transform.offset.astype(np.float32)


def _closest_to_zero(transform: Standard, dtype: np.dtype) -> np.ndarray:
    """Return (G,) in ``dtype``: the stored number whose value is closest to 0."""
    scale, offset = transform.scale, transform.offset
    mean = np.divide(-offset, scale, out=np.zeros_like(scale), where=scale != 0)
    if dtype.kind == "f":
        return mean.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(mean), limits.min, limits.max).astype(dtype)


def physical_values(raw: np.ndarray, source: ModalityInput) -> np.ndarray:
    """Return ``raw`` in physical units, a new float32 array."""
    x = raw.astype(np.float32)
    if source.scale != 1:
        x *= np.float32(source.scale)
    if source.offset != 0:
        x += np.float32(source.offset)
    return x


def wavelengths_in_nm(modality: Modality) -> tuple[float, ...] | None:
    """Return the modality's wavelengths in nanometres, or None."""
    if modality.wavelengths is None:
        return None
    factor = _TO_NM.get(modality.wavelength_unit.lower(), 1.0)
    return tuple(float(w) * factor for w in modality.wavelengths)


def _method_of(transform: Standard | Projection) -> str:
    if isinstance(transform, Standard):
        return "standard"
    return "pca" if transform.rms_floor is None else "mnf"


def _check_modality(where: str, modality: Modality, source: ModalityInput) -> None:
    if modality.bands != source.bands:
        raise InputDataError(f"{where} has {modality.bands} bands, but the front end was fitted on {source.bands}")
    if (modality.scale, modality.offset) != (source.scale, source.offset):
        raise InputDataError(
            f"{where} has scale {modality.scale:g} and offset {modality.offset:g}, but the front end was "
            f"fitted on scale {source.scale:g} and offset {source.offset:g}: ingest the scenes with the same "
            "--scale"
        )
    waves = wavelengths_in_nm(modality)
    if waves is not None and source.wavelengths_nm is not None:
        apart = np.abs(np.subtract(waves, source.wavelengths_nm))
        band = int(apart.argmax())
        if apart[band] > _WAVELENGTH_TOLERANCE_NM:
            raise InputDataError(
                f"{where} has band {band + 1} at {waves[band]:g} nm, but the front end was fitted with "
                f"that band at {source.wavelengths_nm[band]:g} nm: at most {_WAVELENGTH_TOLERANCE_NM:g} nm "
                "may lie between them"
            )
    if modality.bad_bands is not None:
        lost = source.kept[np.asarray(modality.bad_bands, bool)[source.kept]]
        if len(lost):
            raise InputDataError(
                f"{where} marks band {lost[0] + 1} as bad, but the front end was fitted on it: train on "
                "scenes that mark it bad as well, or clear the mark"
            )
