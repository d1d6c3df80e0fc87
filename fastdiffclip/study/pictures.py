"""Pictures of pixels: class maps side by side, and features in two dimensions."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastdiffclip.infer.picture import colour_map, reduce_map
from fastdiffclip.infer.raster import class_colours
from fastdiffclip.scene.labelled import labelled_pixels
from fastdiffclip.study.plots import DPI, INK, SPINE
from fastdiffclip.study.runner import Cell, StudyResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastdiffclip.scene.store import ClassInfo

MAP_PIXELS = 400_000  # of one map in the picture
SPARSE = 0.2  # a scene with a smaller share of valid pixels is drawn with larger dots
WIDEST = 12.0  # inches
UNLABELLED = (0.93, 0.93, 0.93)


def draw_maps(result: StudyResult, path: Path) -> None:
    """Write the truth and the map of every method of the first draw, with one legend."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    cells = [cell for cell in result.cells if cell.shots == result.cells[0].shots]
    maps = [("ground truth", _truth(result))]
    maps += [(_map_title(cell), result.arrays(cell)["map"]) for cell in cells]
    shown = _window_of(np.stack([values for _, values in maps]))
    dot = _dot_size(maps[1][1])
    height, width = (part.stop - part.start for part in shown)
    columns = _columns(len(maps), height / width)
    across, rows = WIDEST / columns, math.ceil(len(maps) / columns)
    legend = _legend_rows(result, WIDEST)
    figure = Figure(
        figsize=(WIDEST, rows * (across * height / width + 0.2) + 0.45 + 0.2 * legend),
        layout=ConstrainedLayoutEngine(hspace=0.01, wspace=0.01),
    )
    for axes, (title, values) in zip(_panels(figure, len(maps), columns), maps, strict=True):
        part = _enlarged(values[shown], dot)
        axes.imshow(
            colour_map(reduce_map(part, MAP_PIXELS), result.classes), interpolation="nearest",
            extent=(0, width, height, 0),
        )  # fmt: skip
        axes.set_title(title, fontsize=9, color=INK, loc="left", pad=3)
        axes.set_facecolor(UNLABELLED)
    _legend(figure, result)
    shots = "all labels" if cells[0].shots is None else f"{cells[0].shots} shots per class"
    larger = f"; each pixel drawn {dot} pixels wide" if dot > 1 else ""
    _headline(
        figure, f"{result.study.name}: class maps. {result.scenes[0].name}, {shots}, split {result.split}{larger}"
    )
    figure.savefig(path, dpi=DPI)


def draw_features(result: StudyResult, path: Path) -> None:
    """Write a panel per kind of features, test pixels coloured by class."""
    from matplotlib.figure import Figure

    cells = [cell for cell in result.cells if cell.shots == result.cells[0].shots]
    columns = min(3, len(cells))
    rows = math.ceil(len(cells) / columns)
    figure = Figure(
        figsize=(3.4 * columns, 3.4 * rows + 0.5 + 0.22 * _legend_rows(result, 3.4 * columns)), layout="constrained"
    )
    colours = {value: np.array(rgb) / 255 for value, rgb in class_colours(result.classes).items()}
    for axes, cell in zip(_panels(figure, len(cells), columns), cells, strict=True):
        arrays = result.arrays(cell)
        plane, labels, shots = arrays["plane"], arrays["labels"], arrays["shots"]
        # In an order of their own, or the last class would hide the others.
        order = np.random.Generator(np.random.PCG64(0)).permutation(np.flatnonzero(~shots))
        x, y = plane.T
        axes.scatter(
            x[order], y[order], s=9, c=_shades(labels[order], colours), linewidths=0.3, edgecolors=(0, 0, 0, 0.25)
        )
        axes.scatter(
            x[shots], y[shots], s=34, c=_shades(labels[shots], colours), marker="D", linewidths=1, edgecolors=INK
        )
        entry = cell.entries[0]
        axes.set_title(
            f"{cell.row.label}\nnearest shot {entry['nearest']:.1f} %, {entry['dimensions']} dimensions",
            fontsize=9, color=INK, loc="left", pad=4,
        )  # fmt: skip
        axes.margins(0.05)
    _legend(figure, result)
    count = "all labels" if cells[0].shots is None else f"{cells[0].shots} shots per class"
    what = "test pixels (dots) and shots (diamonds), t-SNE"
    _headline(figure, f"{result.study.name}: {what}. {result.scene}, {count}")
    figure.savefig(path, dpi=DPI)


def _shades(labels: np.ndarray, colours: Mapping[int, np.ndarray]) -> np.ndarray:
    """(n, 3) of the labels (n,)."""
    return np.array([colours[int(value)] for value in labels]).reshape(-1, 3)


def _truth(result: StudyResult) -> np.ndarray:
    values = [item.value for item in result.classes]
    return labelled_pixels(result.scenes, values).labels[0]


def _map_title(cell: Cell) -> str:
    scores = cell.scores[0]
    return f"{cell.row.label}   OA {scores.oa:.1f}, AA {scores.aa:.1f}"


def _window_of(maps: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns that hold anything in any map (N, H, W), with a margin."""
    filled = np.asarray((maps > 0).any(axis=0))
    found = []
    for axis in (1, 0):
        places = np.flatnonzero(filled.any(axis=axis))
        length = filled.shape[1 - axis]
        margin = max(2, length // 50)
        found.append(slice(max(0, places[0] - margin), min(length, places[-1] + 1 + margin)))
    return found[0], found[1]


def _dot_size(values: np.ndarray) -> int:
    """Side in pixels that a pixel of a sparse map is drawn with, so that it can be seen; odd."""
    share = (values > 0).mean()
    if share >= SPARSE:
        return 1
    return 2 * max(1, round(values.shape[1] / 450)) + 1


def _enlarged(values: np.ndarray, dot: int) -> np.ndarray:
    """The map (H, W) with every pixel spread over the empty ones around it."""
    if dot == 1:
        return values
    from scipy.ndimage import distance_transform_cdt

    distance, nearest = distance_transform_cdt(values == 0, metric="chessboard", return_indices=True)
    spread = values[tuple(nearest)]
    return np.where(distance <= dot // 2, spread, 0).astype(values.dtype)


def _columns(count: int, height_to_width: float) -> int:
    """Columns that make the picture about as tall as wide and leave few places empty."""

    def cost(columns: int) -> float:
        rows = math.ceil(count / columns)
        return abs(math.log(rows * height_to_width / columns / 0.7)) + (rows * columns - count) / count

    return min(range(1, count + 1), key=cost)


def _legend_rows(result: StudyResult, width: float) -> int:
    return math.ceil(len(result.classes) / _legend_columns(result, width))


def _legend_columns(result: StudyResult, width: float) -> int:
    """As many columns as fit in ``width`` inches."""
    longest = max(len(_name(item)) for item in result.classes)
    return max(1, min(len(result.classes), int(width / (0.62 + 0.072 * longest))))


def _name(item: ClassInfo) -> str:
    return textwrap.shorten(item.name, 28, placeholder=" ...")


def _legend(figure: Figure, result: StudyResult) -> None:
    from matplotlib.patches import Patch

    colours = class_colours(result.classes)
    handles = [Patch(color="#" + bytes(colours[item.value]).hex(), label=_name(item)) for item in result.classes]
    figure.legend(
        handles=handles, loc="outside lower left", ncols=_legend_columns(result, figure.get_figwidth()), frameon=False,
        fontsize=8.5, labelcolor=INK,
    )  # fmt: skip


def _headline(figure: Figure, text: str) -> None:
    figure.suptitle(text, fontsize=10, color=INK, x=0.01, ha="left")


def _panels(figure: Figure, count: int, columns: int) -> list[Axes]:
    """``count`` panels without ticks, row by row; the places that are left of the last row stay empty."""
    panels = list(figure.subplots(math.ceil(count / columns), columns, squeeze=False).ravel())
    for axes in panels:
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(SPINE)
            spine.set_linewidth(0.6)
    for axes in panels[count:]:
        axes.set_axis_off()
    return panels[:count]
