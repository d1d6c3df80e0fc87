"""Whole-scene prediction: row blocks in chunk order, a halo for the windows, a map on the scene's grid."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdiffclip.errors import InputDataError
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.infer.picture import write_class_png
from fastdiffclip.infer.raster import class_areas, write_class_map, write_probabilities
from fastdiffclip.runtime import Progress, silent
from fastdiffclip.scene.blocks import RowBlock, iter_row_blocks
from fastdiffclip.scene.prepare import PreparedModality, PreparedScenes, pack_valid
from fastdiffclip.scene.store import Scene
from fastdiffclip.scene.windows import gather_windows, valid_centres

NODATA = 0
GATHER = 4096
BLOCK_ROWS = 64


@dataclass(frozen=True)
class Prediction:
    """What a prediction made.

    Attributes:
        class_map: ``(H, W)`` uint16 class values, 0 where a modality is invalid.
        areas: one row per class: value, name, pixels, share, hectares.
        files: what was written.
    """

    class_map: np.ndarray
    areas: list[dict[str, Any]]
    files: list[Path]
    seconds: float
    nodata_pixels: int


def prepare_block(classifier: Classifier, block: RowBlock) -> PreparedScenes:
    """The front end's values of a block and its halo, as one small scene."""
    modalities, height = {}, block.halo_rows.stop - block.halo_rows.start
    for name in classifier.front_end.channels:
        values = classifier.front_end.apply(name, block.raw[name], block.valid[name])
        channels = values.shape[2]
        modalities[name] = PreparedModality(
            np.ascontiguousarray(values.reshape(-1, channels)),
            np.ones(channels, np.float32),
            np.zeros(channels, np.float32),
            pack_valid(block.valid[name]),
        )
        width = values.shape[1]
    return PreparedScenes(modalities, np.array([[0, height, width]], dtype=np.int64))


def predict_rows(classifier: Classifier, scene: Scene, progress: Progress = silent) -> Iterator[np.ndarray]:
    """Probabilities ``(K, h, W)`` float32 of consecutive row blocks from the top; NaN where a modality is invalid."""
    classifier.front_end.check(scene)
    radius, done = classifier.config.model.window // 2, 0
    total = scene.height * scene.width
    for block in iter_row_blocks(scene, BLOCK_ROWS, radius, tuple(classifier.front_end.channels)):
        prepared = prepare_block(classifier, block)
        first, rows = block.rows.start - block.halo_rows.start, block.rows.stop - block.rows.start
        centres = valid_centres(prepared)
        centres = centres[(centres[:, 1] >= first) & (centres[:, 1] < first + rows)]
        result = np.full((len(classifier.classes), rows, scene.width), np.nan, np.float32)
        for start in range(0, len(centres), GATHER):
            part = centres[start : start + GATHER]
            windows = [
                gather_windows(modality, prepared.extents, part, classifier.config.model.window)
                for modality in prepared.modalities.values()
            ]
            result[:, part[:, 1] - first, part[:, 2]] = classifier.probabilities(windows).T
            done += len(part)
            progress("predict", min(done, total), total, "")
        done = block.rows.stop * scene.width
        progress("predict", done, total, "")
        yield result


def predict(
    scene: Scene,
    model: Classifier | Path | str,
    out: Path | str,
    *,
    probabilities: Path | str | None = None,
    png: Path | str | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> Prediction:
    """Classify every pixel of a scene and write the map.

    Args:
        scene: an opened scene with the modalities of the model.
        model: a classifier, or the folder of a finished ``train-flc`` run.
        out: GeoTIFF of class values on the scene's grid, 0 = nodata, with colour table and class names.
        probabilities: float32 GeoTIFF with one band per class, NaN = nodata.
        png: picture of the map with a legend.

    Raises:
        InputDataError: the scene's bands differ from those that the model was trained on, or no pixel is valid.
        ResourceError: an output cannot be written; nothing is left half-written.
    """
    began = time.monotonic()
    classifier = model if isinstance(model, Classifier) else Classifier.load(Path(model), device)
    class_map = np.zeros((scene.height, scene.width), np.uint16)
    blocks = _mapped(classifier, scene, class_map, progress)
    grid: dict[str, Any] = {"crs_wkt": scene.crs_wkt, "affine_transform": scene.affine_transform}
    files = [Path(out)]
    if probabilities is None:
        for _ in blocks:
            pass
    else:
        write_probabilities(
            probabilities, blocks, height=scene.height, width=scene.width, classes=classifier.classes, **grid
        )
        files.append(Path(probabilities))
    write_class_map(out, class_map, classes=classifier.classes, **grid)
    areas = class_areas(class_map, classifier.classes, **grid)
    if png is not None:
        write_class_png(png, class_map, classes=classifier.classes, title=scene.name, **grid)
        files.append(Path(png))
    nodata = int((class_map == NODATA).sum())
    return Prediction(class_map, areas, files, time.monotonic() - began, nodata)


def _mapped(classifier: Classifier, scene: Scene, class_map: np.ndarray, progress: Progress) -> Iterator[np.ndarray]:
    """Pass the blocks on and enter their classes into ``class_map``."""
    values = np.array([item.value for item in classifier.classes], dtype=np.uint16)
    row = 0
    for block in predict_rows(classifier, scene, progress):
        known = ~np.isnan(block[0])
        best = np.where(np.isnan(block), -1.0, block).argmax(axis=0)
        class_map[row : row + block.shape[1]] = np.where(known, values[best], NODATA)
        row += block.shape[1]
        if row == scene.height and not class_map.any():  # before the last block, so that no file is finished
            raise InputDataError(
                f"no pixel of {scene.path} is valid in every modality of the model; nothing can be classified"
            )
        yield block
