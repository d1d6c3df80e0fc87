"""Raster files read as a scene, without a conversion: what ``ingest`` would store, block by block."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastdiffclip.errors import UsageError
from fastdiffclip.scene.convert import converted_rows, stored_dtype
from fastdiffclip.scene.ingest import IngestRequest, _as_said, _check_request
from fastdiffclip.scene.ingest_inputs import SceneInputs, is_located
from fastdiffclip.scene.matching import match_scenes
from fastdiffclip.scene.readers import RasterSource
from fastdiffclip.scene.resample import method_of
from fastdiffclip.scene.store import Modality, Scene
from fastdiffclip.scene.writer import _validity

_BYTES_AT_ONCE = 8 << 20
_MOST_ROWS = 256
_REMEMBERED = 64  # blocks whose validity is kept until it is asked for


@dataclass(frozen=True, eq=False)
class RasterScene(Scene):
    """Open raster files with the interface of a scene; make one with :func:`open_raster_scene`.

    ``sha256`` stands for names, sizes and times of the files and what was said of them: to read every file once only
    for its checksum would take as long as many predictions. Statistics, labels and classes are empty.
    """

    rasters: dict[str, _Raster] = field(default_factory=dict, repr=False)

    def read(self, modality: str, rows: slice = slice(None), cols: slice = slice(None)) -> np.ndarray:
        """Return (h, w, bands) as ``ingest`` would store them. Raises UsageError, InputDataError."""
        return self._raster(modality).values(self._rows(rows))[:, cols]

    def read_valid(self, modality: str, rows: slice = slice(None), cols: slice = slice(None)) -> np.ndarray:
        """Return the validity (h, w) as ``ingest`` would find it."""
        return self._raster(modality).validity(self._rows(rows))[:, cols]

    def chunk_rows(self, modality: str) -> int:
        """Return the number of rows that are read at once."""
        return self._raster(modality).step

    def valid_chunk_rows(self, modality: str) -> int:
        """As :meth:`chunk_rows`: values tell validity, so both are read together."""
        return self._raster(modality).step

    def chunk_cols(self, modality: str) -> int:
        """Return the width: rows are read whole."""
        return self.width

    def _raster(self, modality: str) -> _Raster:
        return self.rasters[self._modality(modality).name]

    def _rows(self, rows: slice) -> slice:
        start, stop, _ = rows.indices(self.height)
        return slice(start, max(start, stop))


class _Raster:
    """One modality, and the validity of what was read and not yet asked for."""

    def __init__(self, source: RasterSource, dtype: str) -> None:
        self.source, self.dtype = source, dtype
        self._read: Callable[[slice], np.ndarray] = converted_rows(source, dtype)
        bad = source.bad_bands or (False,) * source.bands
        self._good = ~np.asarray(bad, bool)
        row_bytes = source.width * source.bands * max(source.dtype.itemsize, np.dtype(dtype).itemsize)
        self.step = min(_MOST_ROWS, max(1, _BYTES_AT_ONCE // row_bytes))
        self._known: dict[tuple[int, int], np.ndarray] = {}

    def values(self, rows: slice) -> np.ndarray:
        block = self._read(rows)
        mask = self.source.read_mask
        given = np.ones(block.shape[:2], bool) if mask is None else mask(rows).astype(bool)
        counts = dict.fromkeys(("masked", "nonfinite", "nodata"), 0)
        self._known[rows.start, rows.stop] = _validity(block, given, self._good, self.source.nodata, counts)
        if len(self._known) > _REMEMBERED:
            self._known.pop(next(iter(self._known)))
        return block

    def validity(self, rows: slice) -> np.ndarray:
        if (rows.start, rows.stop) not in self._known:
            self.values(rows)
        return self._known.pop((rows.start, rows.stop))


@contextmanager
def open_raster_scene(request: IngestRequest) -> Iterator[RasterScene]:
    """Open the modalities of ``request`` (its labels, classes and output do not matter) until the block is left.

    Raises UsageError, InputDataError as :func:`fastdiffclip.scene.ingest.ingest` does.
    """
    _check_request(request)
    specs = {f"modality {name}": spec for name, spec in request.modalities}
    specs.update({f"valid {name}": spec for name, spec in request.valid.items()})
    scenes, _ = match_scenes(specs, is_located)
    if len(scenes) != 1:
        raise UsageError(f"{request.modalities[0][1]} stands for {len(scenes)} scenes; give the files of one")
    method = None if request.resample is None else method_of(request.resample)
    with SceneInputs(scenes[0], method) as inputs:
        rasters, files = {}, [file.path for file in scenes[0].files.values()]
        for place, (name, _) in enumerate(request.modalities):
            source = _as_said(request, name, place == 0, inputs.modality(name, lambda share: None))
            files += [source.path, *source.companions]
            aligned = inputs.on_grid(name, source).source
            rasters[name] = _Raster(aligned, stored_dtype(aligned))
        grid = inputs.grid
        yield RasterScene(
            path=scenes[0].files[f"modality {request.modalities[0][0]}"].path,
            name=scenes[0].stem,
            height=grid.height,
            width=grid.width,
            crs_wkt=grid.crs_wkt,
            affine_transform=grid.affine_transform,
            modalities={name: _modality(name, raster) for name, raster in rasters.items()},
            classes=(),
            label_maps=(),
            sources=(),
            sha256=_identity(files, rasters),
            arrays={},
            rasters=rasters,
        )


def _modality(name: str, raster: _Raster) -> Modality:
    source = raster.source
    return Modality(
        name=name,
        bands=source.bands,
        dtype=raster.dtype,
        wavelengths=source.wavelengths,
        fwhm=source.fwhm,
        bad_bands=source.bad_bands,
        nodata=source.nodata,
        scale=source.scale,
        offset=source.offset,
    )


def _identity(files: list[Path], rasters: dict[str, _Raster]) -> str:
    def described(path: Path) -> tuple[str, int, int]:
        found = path.stat()
        return str(path.resolve()), found.st_size, found.st_mtime_ns

    known = [described(path) for path in dict.fromkeys(files)]
    said = [
        (name, raster.dtype, repr(raster.source.nodata), raster.source.scale, raster.source.offset)
        for name, raster in rasters.items()
    ]
    return hashlib.sha256(json.dumps([known, said]).encode()).hexdigest()
