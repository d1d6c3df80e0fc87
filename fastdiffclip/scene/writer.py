"""SceneWriter: writes a scene under a temporary name and renames it when it is complete."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from fastdiffclip.errors import InputDataError, ResourceError, UsageError
from fastdiffclip.scene.georeference import geozarr_attributes, grid_mapping_attributes
from fastdiffclip.scene.layout import (
    ATTRIBUTE,
    FORMAT_VERSION,
    LABEL_MAPS,
    MANIFEST,
    MODALITY_DTYPES,
    SPATIAL_REF,
    chunk_shape,
    write_manifest,
)
from fastdiffclip.scene.pending import is_scene, pending_folder
from fastdiffclip.scene.statistics import BandStatistics
from fastdiffclip.scene.store import ClassInfo, Modality

ArrayOrRows = np.ndarray | Callable[[slice], np.ndarray]

_RESERVED = {*LABEL_MAPS, SPATIAL_REF, MANIFEST, "x", "y", "band"}


class SceneWriter:
    """Context manager that writes one scene; the scene appears at ``path`` only on a clean exit.

    ``crs_wkt`` is WKT2 or None; ``affine_transform`` (a, b, c, d, e, f) as in
    :class:`~fastdiffclip.scene.store.Scene`, as is ``centre_only``. ``name`` defaults to the stem of ``path``.
    On an error or Ctrl-C nothing is left. Raises UsageError when ``path`` exists (with ``overwrite``, only when what is
    there is not a scene) and ResourceError when the disk is full.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        height: int,
        width: int,
        crs_wkt: str | None = None,
        affine_transform: Sequence[float] | None = None,
        name: str | None = None,
        overwrite: bool = False,
        centre_only: bool = False,
    ) -> None:
        if height < 1 or width < 1:
            raise InputDataError(f"a scene has at least one pixel, {path} would have {height} x {width}")
        if centre_only and (height != width or height % 2 == 0):
            raise UsageError(f"a scene that is one window is an odd square, {path} would be {height} x {width}")
        self.path = Path(path)
        self.height, self.width = height, width
        self.crs_wkt = crs_wkt
        self.affine_transform = None if affine_transform is None else tuple(map(float, affine_transform))
        self.name = name or self.path.stem
        self.overwrite = overwrite
        self.centre_only = centre_only
        self.invalid_counts: dict[str, dict[str, int]] = {}
        self._modalities: list[str] = []
        self._labels: dict[str, np.ndarray] = {}
        self._classes: tuple[ClassInfo, ...] = ()
        self._sources: list[tuple[str, str, str]] = []
        self._resampled: dict[str, dict[str, Any]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> SceneWriter:
        # zarr writes on threads of its own, which an interrupt does not stop. So all calls of zarr are made by one
        # worker, which runs before the folder is there and has finished before an interrupted folder is removed.
        self._worker = ThreadPoolExecutor(1)
        try:
            self._worker.submit(int).result()
            self._root = self._stack.enter_context(pending_folder(self.path, self.overwrite, is_scene))
            self._stack.callback(self._worker.shutdown)
            self._group = self._wait(zarr.create_group, self._root, zarr_format=3)
        except BaseException as error:
            self._worker.shutdown()
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with self._stack:
                self._finish()
        else:
            self._stack.__exit__(kind, error, trace)

    def add_modality(
        self,
        name: str,
        source: ArrayOrRows,
        *,
        bands: int,
        dtype: str,
        valid: ArrayOrRows | None = None,
        wavelengths: Sequence[float] | None = None,
        wavelength_unit: str = "nm",
        fwhm: Sequence[float] | None = None,
        bad_bands: Sequence[bool] | None = None,
        nodata: float | None = None,
        scale: float = 1.0,
        offset: float = 0.0,
        block_rows: int | None = None,
        on_rows: Callable[[int], None] | None = None,
    ) -> Modality:
        """Write one modality, a block of rows at a time, and its validity and statistics.

        ``source`` is (H, W, bands) or a callable of a row slice that returns (h, W, bands); ``valid``
        likewise without bands, True = valid, None = all. A pixel is invalid where ``valid`` says so, where
        a band that is not bad is NaN or infinite, or where all bands that are not bad equal ``nodata``
        (stored units); the counts are in ``invalid_counts[name]``. ``dtype`` is one of uint16, int16,
        float16, float32. ``block_rows`` is rounded up to whole chunks; ``on_rows`` is told the number of
        rows after each block. Raises UsageError for a bad name or dtype, InputDataError when the lengths of
        band lists or the shape of a block do not fit.
        """
        self._check_name(name, dtype)
        lists = {"wavelengths": wavelengths, "fwhm": fwhm, "bad_bands": bad_bands}
        for what, values in lists.items():
            if values is not None and len(values) != bands:
                raise InputDataError(f"{name} has {bands} bands, {what} has {len(values)} entries; give one per band")
        self.require_space(self.height * self.width * (bands * np.dtype(dtype).itemsize + 1))
        rows, columns = chunk_shape(self.height, self.width, bands, np.dtype(dtype).itemsize)
        array = self._create(name, (self.height, self.width, bands), (rows, columns, bands), dtype)
        good = np.ones(bands, bool) if bad_bands is None else ~np.asarray(bad_bands, bool)
        valid_map = np.empty((self.height, self.width), bool)
        statistics = BandStatistics(bands)
        counts = {"masked": 0, "nonfinite": 0, "nodata": 0}
        step = rows * math.ceil((block_rows or 1) / rows)
        for start in range(0, self.height, step):
            part = slice(start, min(start + step, self.height))
            shape = (part.stop - part.start, self.width)
            block = _block(source, part, (*shape, bands), name).astype(dtype, casting="same_kind", copy=False)
            given = np.ones(shape, bool) if valid is None else _block(valid, part, shape, f"{name} validity")
            valid_map[part] = _validity(block, given.astype(bool), good, nodata, counts)
            statistics.add(block[valid_map[part]] if not valid_map[part].all() else block.reshape(-1, bands))
            self._wait(array.__setitem__, part, block)
            if on_rows:
                on_rows(part.stop - part.start)
        self._add_plane(f"{name}_valid", valid_map)
        mean, std = statistics.result()
        modality = Modality(
            name=name,
            bands=bands,
            dtype=dtype,
            wavelengths=None if wavelengths is None else tuple(map(float, wavelengths)),
            wavelength_unit=wavelength_unit,
            fwhm=None if fwhm is None else tuple(map(float, fwhm)),
            bad_bands=None if bad_bands is None else tuple(map(bool, bad_bands)),
            nodata=nodata,
            scale=float(scale),
            offset=float(offset),
            mean=tuple((mean * scale + offset).tolist()),
            std=tuple((std * abs(scale)).tolist()),
            valid_pixels=statistics.pixels,
        )
        self._wait(array.update_attributes, _modality_attributes(modality))
        self._modalities.append(name)
        self.invalid_counts[name] = counts
        return modality

    def add_labels(self, name: str, array: np.ndarray) -> None:
        """Write a label map (H, W), integers 0 to 65535, 0 = unlabelled, as labels, train or test."""
        if name not in LABEL_MAPS or name in self._labels:
            raise UsageError(f"a label map is called one of {', '.join(LABEL_MAPS)}, each once, not '{name}'")
        if array.shape != (self.height, self.width):
            raise InputDataError(
                f"label map '{name}' is {array.shape}, expected {(self.height, self.width)} as the scene"
            )
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 65535:
            raise InputDataError(f"label map '{name}' must hold integers 0 to 65535 ({array.dtype} given)")
        labels = array.astype(np.uint16)
        self._add_plane(name, labels)
        self._labels[name] = labels

    def set_classes(self, classes: Sequence[ClassInfo]) -> None:
        """Set the class table; on exit every label value must be in it."""
        self._classes = tuple(classes)

    def add_source_file(self, path: Path | str, sha256: str, role: str = "") -> None:
        """Record a file that the scene is made from: its name without folder, its sha256, what it is for."""
        self._sources.append((role, Path(path).name, sha256))

    def add_resampling(self, role: str, description: Mapping[str, Any]) -> None:
        """Record that a raster came on another grid: what it is for, and JSON-able words on method and grid."""
        self._resampled[role] = dict(description)

    def _wait(self, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Call zarr on the worker, which an interrupt of this thread cannot leave half way."""
        return self._worker.submit(call, *args, **named).result()

    def _check_name(self, name: str, dtype: str) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in _RESERVED or name.endswith("_valid"):
            raise UsageError(
                f"'{name}' cannot name a modality: use lower-case letters, digits and '_', starting "
                "with a letter, "
                f"not ending in '_valid', and none of {', '.join(sorted(_RESERVED))}"
            )
        if name in self._modalities:
            raise UsageError(f"modality '{name}' is given twice")
        if dtype not in MODALITY_DTYPES:
            raise UsageError(
                f"modality '{name}' cannot be stored as {dtype}; a scene holds {', '.join(MODALITY_DTYPES)}"
            )

    def require_space(self, needed: int) -> None:
        """Raise ResourceError where the disk has less than ``needed`` bytes free."""
        free = shutil.disk_usage(self._root).free
        if needed > free:
            raise ResourceError(
                f"{self.path} needs about {needed / 2**30:.2g} GiB more, its disk has "
                f"{free / 2**30:.2g} GiB free: "
                "make room or choose another --out"
            )

    def _create(self, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str) -> Any:
        # xarray wants one size per dimension name, so only the first modality has plain `band`.
        band = "band" if not self._modalities else f"band_{name}"
        return self._wait(
            self._group.create_array,
            name,
            shape=shape,
            chunks=chunks,
            dtype=dtype,
            filters=None,
            serializer=BytesCodec(),
            compressors=[Crc32cCodec()],
            fill_value=0,
            config={"write_empty_chunks": True},
            dimension_names=["y", "x", band][: len(shape)],
            attributes={"grid_mapping": SPATIAL_REF} if shape and self._is_georeferenced else {},
        )

    @property
    def _is_georeferenced(self) -> bool:
        return self.crs_wkt is not None or self.affine_transform is not None

    def _add_plane(self, name: str, values: np.ndarray) -> None:
        chunks = chunk_shape(self.height, self.width, 1, values.itemsize)
        array = self._create(name, values.shape, chunks, str(values.dtype))
        self._wait(array.__setitem__, slice(None), values)

    def _finish(self) -> None:
        if not self._modalities:
            raise UsageError(f"scene {self.path} has no modality")
        known = {row.value for row in self._classes}
        for name, labels in self._labels.items():
            missing = sorted(set(np.unique(labels).tolist()) - known - {0})
            if missing and known:
                raise InputDataError(f"label map '{name}' has values without a class: {missing}; add them to the table")
        names = [*self._modalities, *(f"{name}_valid" for name in self._modalities), *self._labels]
        if self._is_georeferenced:
            array = self._create(SPATIAL_REF, (), (), "int64")
            self._wait(array.__setitem__, ..., 0)
            self._wait(array.update_attributes, grid_mapping_attributes(self.crs_wkt, self.affine_transform))
            names.append(SPATIAL_REF)
        self._wait(self._group.update_attributes, self._group_attributes())
        write_manifest(self._root, names)

    def _group_attributes(self) -> dict[str, Any]:
        own = {
            "version": FORMAT_VERSION,
            "name": self.name,
            "shape": [self.height, self.width],
            "modalities": self._modalities,
            "label_maps": list(self._labels),
            "classes": [
                {"value": c.value, "name": c.name, "description": c.description, "colour": c.colour}
                for c in self._classes
            ],
            "crs_wkt": self.crs_wkt,
            "affine_transform": self.affine_transform,
            "sources": self._sources,
        }
        if self.centre_only:
            own["centre_only"] = True
        if self._resampled:
            own["resampled"] = self._resampled
        return {
            ATTRIBUTE: own,
            **geozarr_attributes(self.crs_wkt, self.affine_transform, self.height, self.width),
        }


def _block(source: ArrayOrRows, rows: slice, shape: tuple[int, ...], what: str) -> np.ndarray:
    block = np.asarray(source(rows) if callable(source) else source[rows])
    if block.shape != shape:
        raise InputDataError(f"{what}: rows {rows.start} to {rows.stop} have shape {block.shape}, expected {shape}")
    return block


def _validity(
    block: np.ndarray, given: np.ndarray, good: np.ndarray, nodata: float | None, counts: dict[str, int]
) -> np.ndarray:
    """Return (h, w) validity of a block (h, w, B) and add to the counts; each invalid pixel counts once."""
    values = block if good.all() else block[..., good]
    valid = given.copy()
    counts["masked"] += int(np.count_nonzero(~given))
    if nodata is not None and not math.isnan(nodata):
        empty = _all_equal(values, nodata) & valid
        counts["nodata"] += int(np.count_nonzero(empty))
        valid &= ~empty
    if block.dtype.kind == "f":
        broken = ~np.isfinite(values).all(axis=-1) & valid
        counts["nonfinite"] += int(np.count_nonzero(broken))
        valid &= ~broken
    return valid


def _all_equal(values: np.ndarray, number: float) -> np.ndarray:
    """Return (h, w): True where all bands equal ``number`` as the dtype of ``values`` (h, w, B) holds it."""
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            target = np.array(number).astype(values.dtype)
    else:
        limits = np.iinfo(values.dtype)
        if not limits.min <= number <= limits.max or number != int(number):
            return np.zeros(values.shape[:-1], bool)
        target = np.array(int(number), values.dtype)
    equal = values[..., 0] == target
    equal[equal] = (values[equal] == target).all(axis=-1)
    return equal


def _modality_attributes(modality: Modality) -> dict[str, Any]:
    nodata = modality.nodata
    return {
        "wavelengths": modality.wavelengths,
        "wavelength_unit": modality.wavelength_unit,
        "fwhm": modality.fwhm,
        "bad_bands": modality.bad_bands,
        # JSON has no NaN and no infinity.
        "nodata": nodata if nodata is None or math.isfinite(nodata) else str(nodata),
        "scale": modality.scale,
        "offset": modality.offset,
        "mean": modality.mean,
        "std": modality.std,
        "valid_pixels": modality.valid_pixels,
    }
