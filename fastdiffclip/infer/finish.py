"""The end of a prediction: what to write, and one sequential pass from the raw files to it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiffclip import heap
from fastdiffclip.infer.cog import Grid
from fastdiffclip.infer.picture import write_class_png
from fastdiffclip.infer.raster import (
    NODATA,
    areas_of,
    count_values,
    map_dtype,
    write_class_map,
    write_confidence,
    write_probabilities,
)
from fastdiffclip.infer.rawfile import Layer, RawFile
from fastdiffclip.runtime import Progress

if TYPE_CHECKING:
    from fastdiffclip.scene.store import ClassInfo

CLASSES, PROBABILITIES, CONFIDENCE = "classes", "probabilities", "confidence"
NONE_OF_THESE, GREY, LARGEST = "none of these", (160, 160, 160), 65535


@dataclass(frozen=True)
class Outputs:
    """The files of a prediction; what is None is not written.

    Attributes:
        map: class values. probabilities: one band per class. confidence: the largest of them. png: a picture.
        reject: probability below which a pixel belongs to no class but to ``none of these``, a value of its own in the
            map; None lets every pixel belong to one.
    """

    map: Path
    probabilities: Path | None = None
    confidence: Path | None = None
    png: Path | None = None
    reject: float | None = None

    @property
    def files(self) -> list[Path]:
        """Those that are written."""
        return [path for path in (self.map, self.probabilities, self.confidence, self.png) if path is not None]

    def legend(self, classes: Sequence[ClassInfo]) -> tuple[ClassInfo, ...]:
        """What the map shows: the classes, and ``none of these`` behind them where pixels are rejected."""
        return tuple(classes) if self.reject is None else (*classes, none_of(classes))

    def layers(self, classes: Sequence[ClassInfo]) -> list[Layer]:
        """The raw files that they are made from."""
        layers = [Layer(CLASSES, 1, map_dtype(self.legend(classes)))]
        if self.probabilities is not None:
            layers.append(Layer(PROBABILITIES, len(classes), "float32"))
        if self.confidence is not None:
            layers.append(Layer(CONFIDENCE, 1, "float32"))
        return layers


def none_of(classes: Sequence[ClassInfo]) -> ClassInfo:
    """The class of rejected pixels: the value above all others, or the first free one where that is no uint16."""
    from fastdiffclip.scene.store import ClassInfo

    used = {item.value for item in classes}
    value = max(used) + 1 if max(used) < LARGEST else min(set(range(1, LARGEST)) - used)
    return ClassInfo(value, NONE_OF_THESE, "", GREY)


def layers_of(
    probabilities: np.ndarray, layers: Sequence[Layer], classes: Sequence[ClassInfo], reject: float | None = None
) -> dict[str, np.ndarray]:
    """What the raw files hold of a tile, ``(bands, h, w)`` each, from probabilities ``(K, h, w)``, NaN = nodata."""
    known = ~np.isnan(probabilities[0])
    table = np.array([item.value for item in classes])
    best = np.nan_to_num(probabilities).argmax(axis=0)
    surest = probabilities.max(axis=0)  # NaN where one is
    values = table[best] if reject is None else np.where(surest < reject, none_of(classes).value, table[best])
    found = {
        CLASSES: np.where(known, values, NODATA)[None], PROBABILITIES: probabilities, CONFIDENCE: surest[None],
    }  # fmt: skip
    return {layer.name: found[layer.name].astype(layer.dtype, copy=False) for layer in layers}


def write_outputs(
    outputs: Outputs,
    raw: dict[str, RawFile],
    counts: np.ndarray,
    *,
    classes: Sequence[ClassInfo],
    grid: Grid,
    title: str,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Write every file, each whole or not at all; returns the area of each class of the map. Raises ResourceError."""
    remove_stale(outputs)
    heap.give_back()
    place: dict[str, Any] = {"crs_wkt": grid.crs_wkt, "affine_transform": grid.affine_transform}
    total, done, legend = len(outputs.files), 0, outputs.legend(classes)

    def told() -> None:
        nonlocal done
        done += 1
        progress("write", done, total, "")

    progress("write", 0, total, "")
    if outputs.probabilities is not None:
        layer = raw[PROBABILITIES]
        write_probabilities(
            outputs.probabilities, layer, height=layer.height, width=layer.width, classes=classes, **place
        )
        told()
    if outputs.confidence is not None:
        write_confidence(outputs.confidence, raw[CONFIDENCE], grid)
        told()
    if outputs.png is not None:
        write_class_png(outputs.png, raw[CLASSES], classes=legend, title=title, **place)
        told()
    write_class_map(outputs.map, raw[CLASSES], classes=legend, **place)
    told()
    return areas_of(counts, legend, grid)


def count_classes(raw: dict[str, RawFile]) -> np.ndarray:
    """Number of pixels of each class value, 0 = nodata first."""
    return count_values(raw[CLASSES])


def remove_stale(outputs: Outputs) -> None:
    """Remove temporary files and folders of these outputs whose process is no more."""
    for path in outputs.files:
        pattern = re.compile(rf"\.{re.escape(path.name)}(?:(?:\.aux\.xml)?\.(\d+)\.tmp.*|\.partial\.(\d+))")
        for entry in os.scandir(path.parent) if path.parent.is_dir() else ():
            found = pattern.fullmatch(entry.name)
            if found is None or _is_alive(int(found[1] or found[2])):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with suppress(FileNotFoundError):
                    os.unlink(entry.path)


def _is_alive(process: int) -> bool:
    import psutil

    return psutil.pid_exists(process)
