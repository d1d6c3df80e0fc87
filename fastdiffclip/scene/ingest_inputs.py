"""The inputs of one scene, opened and brought to one grid."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.scene import rois, vectors
from fastdiffclip.scene.convert import require_readable_rows
from fastdiffclip.scene.georeference import Grid, difference, georeferenced, require_same_grid
from fastdiffclip.scene.labels import LabelMap, read_label_map
from fastdiffclip.scene.matching import InputFile, SceneFiles
from fastdiffclip.scene.readers import RasterSource, open_raster, points
from fastdiffclip.scene.resample import aligned, describe

ALIGN = "give --resample to align it, or resample it first"


@dataclass(frozen=True)
class Aligned:
    """One modality on the grid of its scene, and how it and its mask were resampled, by role, where they were."""

    source: RasterSource
    resampled: dict[str, dict[str, Any]]


def is_located(path: Path) -> bool:
    """Say whether a file places itself on the map without being a raster, and so may hold a part of several scenes."""
    return path.suffix.lower() in (*vectors.SUFFIXES, *points.SUFFIXES)


class SceneInputs:
    """What one scene is made of; a context manager that keeps its rasters open.

    ``grid`` is that of the first modality that is a raster, with the CRS and transform of the first other raster on it
    where that one has none. ``method`` is how modalities on another grid are resampled, None where they are an error.
    Raises InputDataError naming both grids for a raster that does not lie on ``grid`` and cannot be resampled.
    """

    def __init__(self, files: SceneFiles, method: str | None) -> None:
        self.files, self.method = files, method
        self._stack = ExitStack()

    def __enter__(self) -> SceneInputs:
        with ExitStack() as stack:
            self._rasters = {
                role: self._open(role, stack) for role, file in self.files.files.items() if _is_raster(file)
            }
            self._own = {role: _grid(role, source) for role, source in self._rasters.items()}
            modalities = [role for role in self._own if role.startswith("modality ")]
            if not modalities:
                raise UsageError("a point cloud has no grid of its own: give a raster as well, as --hsi FILE")
            first = self._own[modalities[0]]
            others = [grid for role, grid in self._own.items() if role != modalities[0]]
            if self.method is None:
                crs_wkt, transform = require_same_grid([first, *others], ALIGN)
                self.grid = replace(first, crs_wkt=crs_wkt, affine_transform=transform)
            else:
                self.grid = georeferenced(first, others)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _open(self, role: str, stack: ExitStack) -> RasterSource:
        file = self.files.files[role]
        source = stack.enter_context(open_raster(file.path, file.variable))
        require_readable_rows(source)
        if role.startswith("valid ") and source.bands != 1:
            raise InputDataError(f"validity mask {source.path} has {source.bands} bands, expected one (not 0 = valid)")
        return source

    def modality(self, name: str, on_share: Callable[[float], None]) -> RasterSource:
        """Return a modality as its file has it, a point cloud as a raster on the grid of the scene.

        ``on_share`` hears the share done of a point cloud, which is read whole.
        """
        file = self.files.files[f"modality {name}"]
        if file.path.suffix.lower() in points.SUFFIXES:
            return points.open_points(file.path, file.variable, self.grid, on_share)
        return self._rasters[f"modality {name}"]

    def on_grid(self, name: str, source: RasterSource) -> Aligned:
        """Bring a modality to the grid of the scene, invalid also where its validity mask says so."""
        role, mask_role = f"modality {name}", f"valid {name}"
        own, mask = self._own.get(role, self.grid), self._rasters.get(mask_role)
        resampled = {}
        if mask is not None and difference(self._own[mask_role], own) is None:
            source, mask = _masked(source, mask), None  # before pixels that it leaves out mix with others
        if difference(own, self.grid):
            assert self.method is not None  # or the grids would have been refused
            source = aligned(source, own, self.grid, self.method, source.nodata)
            resampled[role] = describe(own, self.method)
        if mask is not None:
            own = self._own[mask_role]
            if difference(own, self.grid):
                mask = aligned(mask, own, self.grid, "nearest", mask.nodata)
                resampled[mask_role] = describe(own, "nearest")
            source = _masked(source, mask)
        return Aligned(source, resampled)

    def labels(self, name: str, nodata: float | None) -> LabelMap:
        """Read a label map; ``nodata`` is a further value of a raster that means unlabelled."""
        file, role = self.files.files[f"labels {name}"], f"labels {name}"
        if role not in self._rasters:
            return self._drawn_labels(file)
        source, own = self._rasters[role], self._own[role]
        if nodata is not None:
            source = replace(source, nodata=nodata)
        resampled = None
        if source.bands == 1 and difference(own, self.grid):
            source, resampled = aligned(source, own, self.grid, "nearest", source.nodata), describe(own, "nearest")
        return LabelMap(
            path=source.path,
            values=read_label_map(source),
            class_names=source.class_names,
            class_colours=source.class_colours,
            warnings=source.warnings,
            companions=source.companions,
            resampled=resampled,
        )

    def _drawn_labels(self, file: InputFile) -> LabelMap:
        if file.path.stat().st_size == 0:
            raise InputDataError(f"{file.path} is empty (0 bytes): was it copied completely?")
        if file.path.suffix.lower() in vectors.SUFFIXES:
            return vectors.read_polygons(file.path, file.variable, self.grid, file.shared)
        return rois.read_rois(file.path, file.variable, self.grid)


def _is_raster(file: InputFile) -> bool:
    return file.path.suffix.lower() not in (*vectors.SUFFIXES, *rois.SUFFIXES, *points.SUFFIXES)


def _grid(role: str, source: RasterSource) -> Grid:
    kind, name = role.split(" ", 1)
    what = {"modality": name, "labels": f"labels '{name}'", "valid": f"validity of {name}"}[kind]
    return Grid(what, source.path, source.height, source.width, source.crs_wkt, source.affine_transform)


def _masked(source: RasterSource, mask: RasterSource) -> RasterSource:
    """Return a raster whose pixels are invalid also where a mask on its grid is 0 or NaN."""
    own, more = source.read_mask, mask.read_mask

    def read(rows: slice) -> np.ndarray:
        values = mask.read_rows(rows)[..., 0]
        valid = (values != 0) & (values == values)  # NaN is not valid
        for other in (own, more):
            valid &= True if other is None else other(rows)
        return valid

    return replace(source, read_mask=read)
