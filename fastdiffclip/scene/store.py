"""Scene: a co-registered set of rasters, labels and class names in one zarr v3 group, read-only.

:class:`fastdiffclip.scene.writer.SceneWriter` makes one; the layout is in :mod:`fastdiffclip.scene.layout`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastdiffclip.errors import InputDataError, UsageError, nearest
from fastdiffclip.scene.layout import (
    LABEL_MAPS,
    MANIFEST,
    MODALITY_DTYPES,
    Manifest,
    StoredArray,
    read_manifest,
)


@dataclass(frozen=True)
class ClassInfo:
    """One row of the class table: ``value`` is 1 to 65535 as in the label maps, ``colour`` is 8-bit RGB."""

    value: int
    name: str
    description: str = ""
    colour: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Modality:
    """One raster of a scene: physical value = stored value * ``scale`` + ``offset``.

    ``mean`` and ``std`` (population) are per band, in physical units, over the valid pixels; a band flagged
    bad may hold NaN in valid pixels, which its statistics leave out. ``std`` is exactly 0 for a constant
    band. ``nodata`` is in stored units; where it applied, the pixel is invalid.
    """

    name: str
    bands: int
    dtype: str
    wavelengths: tuple[float, ...] | None = None
    wavelength_unit: str = "nm"
    fwhm: tuple[float, ...] | None = None
    bad_bands: tuple[bool, ...] | None = None  # True = bad
    nodata: float | None = None
    scale: float = 1.0
    offset: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    valid_pixels: int = 0


@dataclass(frozen=True, eq=False)
class Scene:
    """An open scene; make one with :func:`open_scene`.

    ``affine_transform`` is (a, b, c, d, e, f): x = a * column + b * row + c, y = d * column + e * row + f,
    pixel corners. ``sha256`` identifies the content. ``sources`` are (role, file name, sha256) of the files
    it was made from. ``resampled`` says by role which rasters came on another grid, that grid, and the method.
    ``centre_only``: the scene is one window, and only its centre pixel may be that of one.
    """

    path: Path
    name: str
    height: int
    width: int
    crs_wkt: str | None
    affine_transform: tuple[float, ...] | None
    modalities: dict[str, Modality]
    classes: tuple[ClassInfo, ...]
    label_maps: tuple[str, ...]
    sources: tuple[tuple[str, str, str], ...]
    sha256: str
    arrays: dict[str, StoredArray] = field(repr=False)
    centre_only: bool = False
    resampled: dict[str, dict[str, Any]] = field(default_factory=dict)

    def read(self, modality: str, rows: slice = slice(None), cols: slice = slice(None)) -> np.ndarray:
        """Return the stored values (h, w, bands) of a window, in the stored dtype.

        Raises UsageError for an unknown modality, InputDataError naming array and chunk for a missing or
        damaged one.
        """
        self._modality(modality)
        return self._read(modality, rows, cols)

    def read_valid(self, modality: str, rows: slice = slice(None), cols: slice = slice(None)) -> np.ndarray:
        """Return the validity (h, w) of a window, bool; raises as :meth:`read`."""
        self._modality(modality)
        return self._read(f"{modality}_valid", rows, cols)

    def read_valid_everywhere(self) -> np.ndarray:
        """Return (height, width) bool: pixels that are valid in every modality."""
        return np.logical_and.reduce([self.read_valid(name) for name in self.modalities])

    def read_labels(self, name: str = "labels") -> np.ndarray:
        """Return a label map (height, width), uint16, 0 = unlabelled; raises as :meth:`read`."""
        if name not in self.label_maps:
            raise UsageError(f"scene {self.path} has no label map '{name}'; it has {_listed(self.label_maps)}")
        return self._read(name, slice(None), slice(None))

    def chunk_rows(self, modality: str) -> int:
        """Return the height of the modality's chunks in pixels."""
        return self.arrays[self._modality(modality).name].chunks[0]

    def valid_chunk_rows(self, modality: str) -> int:
        """Return the height of the chunks of the modality's validity in pixels."""
        return self.arrays[f"{self._modality(modality).name}_valid"].chunks[0]

    def chunk_cols(self, modality: str) -> int:
        """Return the width of the modality's chunks in pixels."""
        return self.arrays[self._modality(modality).name].chunks[1]

    def _modality(self, name: str) -> Modality:
        if name not in self.modalities:
            known = tuple(self.modalities)
            raise UsageError(
                f"scene {self.path} has no modality '{name}'{nearest(name, known)}; it has {_listed(known)}"
            )
        return self.modalities[name]

    def _read(self, name: str, rows: slice, cols: slice) -> np.ndarray:
        window = (_bounded(rows, self.height), _bounded(cols, self.width))
        return self.arrays[name].read(self.path, window)


def open_scene(path: Path | str) -> Scene:
    """Open a scene, having checked its metadata and that every chunk file is there with the right size.

    Raises InputDataError when there is no scene, it is unfinished, was not written by this software, was
    changed since, or lacks a chunk. Contents of chunks are checked when they are read, all of them by
    :func:`verify_scene`.
    """
    root = Path(path)
    manifest = _open_manifest(root)
    for array in manifest.arrays.values():
        for index in array.indices():
            array.check_chunk_file(root, index)
    return _build_scene(root, manifest)


def _open_manifest(root: Path) -> Manifest:
    if not root.exists():
        raise InputDataError(f"there is no scene at {root}: make one with 'fastdiffclip ingest --out {root}'")
    if not root.is_dir() or not (root / "zarr.json").is_file():
        raise InputDataError(
            f"{root} is not a scene: a scene is the folder that 'fastdiffclip ingest' writes, with a zarr.json in it"
        )
    if not (root / MANIFEST / "zarr.json").is_file():
        raise InputDataError(
            f"{root} is an unfinished scene or another program's zarr store (it has no "
            f"{MANIFEST}/zarr.json): "
            f"make it again with 'fastdiffclip ingest'"
        )
    return read_manifest(root)


def _build_scene(root: Path, manifest: Manifest) -> Scene:
    """Turn verified metadata into a Scene; metadata of the wrong form is an InputDataError."""
    try:
        group = manifest.attributes
        height, width = (int(n) for n in group["shape"])
        transform = group["affine_transform"]
        scene = Scene(
            path=root,
            name=str(group["name"]),
            height=height,
            width=width,
            crs_wkt=group["crs_wkt"],
            affine_transform=None if transform is None else tuple(float(n) for n in transform),
            modalities={name: _read_modality(manifest.arrays[name]) for name in group["modalities"]},
            classes=tuple(
                ClassInfo(row["value"], row["name"], row["description"], _triple(row["colour"]))
                for row in group["classes"]
            ),
            label_maps=tuple(name for name in LABEL_MAPS if name in group["label_maps"]),
            sources=tuple((str(role), str(name), str(digest)) for role, name, digest in group["sources"]),
            sha256=manifest.sha256,
            arrays=manifest.arrays,
            centre_only=bool(group.get("centre_only", False)),
            resampled={str(role): dict(how) for role, how in group.get("resampled", {}).items()},
        )
        _check_shapes(scene)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputDataError(f"the attributes of scene {root} do not describe a scene ({error})") from error
    return scene


def _read_modality(stored: StoredArray) -> Modality:
    attributes = stored.attributes
    nodata = attributes["nodata"]
    modality = Modality(
        name=stored.name,
        bands=stored.shape[2],
        dtype=stored.dtype,
        wavelengths=_numbers(attributes["wavelengths"]),
        wavelength_unit=str(attributes["wavelength_unit"]),
        fwhm=_numbers(attributes["fwhm"]),
        bad_bands=None if attributes["bad_bands"] is None else tuple(map(bool, attributes["bad_bands"])),
        nodata=None if nodata is None else float(nodata),
        scale=float(attributes["scale"]),
        offset=float(attributes["offset"]),
        mean=_numbers(attributes["mean"]) or (),
        std=_numbers(attributes["std"]) or (),
        valid_pixels=int(attributes["valid_pixels"]),
    )
    for values in (modality.mean, modality.std, modality.wavelengths, modality.fwhm, modality.bad_bands):
        if values is not None and len(values) != modality.bands:
            raise ValueError(f"'{stored.name}' has {modality.bands} bands and a list of {len(values)} numbers")
    if not all(map(math.isfinite, (*modality.mean, *modality.std, modality.scale, modality.offset))):
        raise ValueError(f"'{stored.name}' has statistics that are not finite")
    return modality


def _check_shapes(scene: Scene) -> None:
    plane = (scene.height, scene.width)
    wanted: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for name, modality in scene.modalities.items():
        wanted[name] = ((*plane, modality.bands), MODALITY_DTYPES)
        wanted[f"{name}_valid"] = (plane, ("bool",))
    wanted.update({name: (plane, ("uint16",)) for name in scene.label_maps})
    for name, (shape, dtypes) in wanted.items():
        stored = scene.arrays[name]
        if stored.shape != shape or stored.dtype not in dtypes:
            raise ValueError(f"'{name}' is {stored.dtype} {stored.shape}, expected {'/'.join(dtypes)} {shape}")


@dataclass(frozen=True)
class SceneReport:
    """What :func:`verify_scene` read and found; every problem names array, chunk and file."""

    path: Path
    chunks: int
    bytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True when nothing is wrong."""
        return not self.problems


def verify_scene(path: Path | str) -> SceneReport:
    """Read every chunk of a scene and compare it with its own checksum and with the manifest's.

    Raises InputDataError where there is no finished scene or its metadata was changed; missing, truncated
    and damaged chunks are in the report.
    """
    root = Path(path)
    manifest = _open_manifest(root)
    _build_scene(root, manifest)
    problems: list[str] = []
    chunks = size = 0
    for array in manifest.arrays.values():
        for index in array.indices():
            chunks, size = chunks + 1, size + array.chunk_bytes
            try:
                array.read_chunk(root, index)
            except InputDataError as error:
                problems.append(str(error))
    return SceneReport(root, chunks, size, tuple(problems))


def scene_summary(scene: Scene) -> dict[str, Any]:
    """Return what ``scene info`` shows, as JSON-able types; reads the label maps, not the modalities."""
    pixels = scene.height * scene.width
    counts = {name: np.bincount(scene.read_labels(name).ravel(), minlength=1) for name in scene.label_maps}
    return {
        "path": str(scene.path),
        "name": scene.name,
        "height": scene.height,
        "width": scene.width,
        "crs_wkt": scene.crs_wkt,
        "affine_transform": scene.affine_transform,
        "modalities": [
            {
                "name": m.name,
                "bands": m.bands,
                "dtype": m.dtype,
                "wavelength_range": [min(m.wavelengths), max(m.wavelengths)] if m.wavelengths else None,
                "wavelength_unit": m.wavelength_unit if m.wavelengths else None,
                "bad_bands": sum(m.bad_bands or ()),
                "constant_bands": m.std.count(0.0),
                "nodata": None if m.nodata is None or math.isnan(m.nodata) else m.nodata,
                "scale": m.scale,
                "offset": m.offset,
                "valid_percent": 100.0 * m.valid_pixels / pixels,
                "chunk": list(scene.arrays[m.name].chunks),
            }
            for m in scene.modalities.values()
        ],
        "label_maps": {name: int(count[1:].sum()) for name, count in counts.items()},
        "classes": [
            {
                "value": c.value,
                "name": c.name,
                "description": c.description,
                "colour": c.colour,
                "pixels": {name: int(n[c.value]) if c.value < n.size else 0 for name, n in counts.items()},
            }
            for c in scene.classes
        ],
        "sources": [{"role": role, "file": name, "sha256": digest} for role, name, digest in scene.sources],
        "resampled": scene.resampled,
        "sha256": scene.sha256,
        "bytes": sum(array.chunk_bytes * len(array.checksums) for array in scene.arrays.values()),
    }


def _bounded(part: slice, size: int) -> slice:
    start, stop, step = part.indices(size)
    if step != 1:
        raise UsageError(f"a scene is read in contiguous blocks, not with step {step}")
    return slice(start, max(start, stop))


def _numbers(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


def _triple(values: Sequence[int] | None) -> tuple[int, int, int] | None:
    if values is None:
        return None
    red, green, blue = (int(value) for value in values)
    return red, green, blue


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
