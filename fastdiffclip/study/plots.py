"""Pictures of a study's figures: a dot per row, or a curve along what a sweep moves."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastdiffclip.evaluate.contest import OURS
from fastdiffclip.study.catalogue import FIGURES
from fastdiffclip.study.output import about
from fastdiffclip.study.published import dataset_of, published_rows
from fastdiffclip.study.runner import Cell, StudyResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MEASURED, OTHERS, PUBLISHED = "#333333", "#24587f", "#8a7b66", "#c2410c"
SHOTS_COLOURS = ("#24587f", "#c2410c", "#3f7d4e", "#7a4fa3")
GRID, SPINE = "#e6e6e6", "#9a9a9a"
DPI = 130
TICKS = 5  # at most, of an axis of percents
HIGHEST = 100.0  # percent, beyond which no spread is drawn


class Point(NamedTuple):
    """Of a curve: where it stands, its mean and standard error, and what no band goes beyond."""

    value: float
    mean: float
    error: float = 0.0
    highest: float = math.inf


def plot_figures(result: StudyResult, path: Path) -> None:
    """Write the PNG of a study of scores."""
    if result.study.axes:
        _sweeps(result, path)
    else:
        _dots(result, path)


def dress(axes: Axes) -> None:
    """Light grid, no box."""
    axes.tick_params(labelsize=8, colors=INK, length=2.5)
    axes.grid(color=GRID, linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(SPINE)


def _dots(result: StudyResult, path: Path) -> None:
    """A panel per number of shots, a row per method: every draw faint, the mean, a line of one sd to either side.

    A method without the figure, as one that cannot rank has no AUC, has no row.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shots = list(dict.fromkeys(cell.shots for cell in result.cells))
    judged = result.study.judged_by
    labels = list(dict.fromkeys(cell.row.label for cell in result.cells if len(_values(cell, judged))))
    figure = Figure(figsize=(2.3 + 2.5 * len(shots), 1.5 + 0.27 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(shots), sharex=True, sharey=True, squeeze=False)[0]
    for axes, k in zip(panels, shots, strict=True):
        dress(axes)
        axes.set_title(_shots_words(k), fontsize=9, color=INK, loc="left", pad=4)
        axes.set_xlabel(f"{FIGURES[judged]}, percent", fontsize=8.5, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(TICKS))
        for cell in (cell for cell in result.cells if cell.shots == k and cell.row.label in labels):
            _dot(axes, cell, labels.index(cell.row.label), judged, cell.row.label == result.reference)
        for row in published_rows(result.study.name, dataset_of(result.scenes, result.classes)):
            if row.shots == k and row.minus is None and judged in row.figures:
                axes.axvline(row.figures[judged], color=PUBLISHED, linewidth=1, linestyle="--", zorder=1)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    _title(figure, result, "dots: mean; lines: one standard deviation to either side")
    figure.savefig(path, dpi=DPI)


def _dot(axes: Axes, cell: Cell, place: int, judged: str, is_reference: bool) -> None:
    values = _values(cell, judged)
    if not len(values):
        return
    colour = MEASURED if cell.row.method == OURS else OTHERS
    mean, spread = values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0
    if is_reference:
        axes.axvline(mean, color=colour, linewidth=0.8, alpha=0.5, zorder=1)
    axes.scatter(values, np.full(len(values), place), s=7, color=colour, alpha=0.3, linewidths=0, zorder=2)
    ends = np.clip([mean - spread, mean + spread], None, HIGHEST)
    axes.plot(ends, [place, place], color=colour, linewidth=1.4, zorder=3)
    axes.scatter([mean], [place], s=30, color=colour, zorder=4)


def _sweeps(result: StudyResult, path: Path) -> None:
    """Two panels per axis, a curve per number of shots in each: means, and below them the table's differences to the
    reference on the same draws, whose bands leave out what one draw has over another.
    """
    from matplotlib.figure import Figure

    axes_of, judged = result.study.axes, result.study.judged_by
    figure = Figure(figsize=(0.6 + 4.2 * len(axes_of), 5.4), layout="constrained")
    grid = figure.subplots(2, len(axes_of), sharex="col", sharey="row", squeeze=False, height_ratios=(5, 4))
    shots = list(dict.fromkeys(cell.shots for cell in result.cells))
    for (above, below), (panel, words) in zip(grid.T, axes_of, strict=True):
        dress(above)
        dress(below)
        below.set_xlabel(words, fontsize=8.5, color=INK)
        below.axhline(0.0, color=INK, linewidth=0.8, zorder=1)
        for k, colour in zip(shots, SHOTS_COLOURS * len(shots), strict=False):
            own = [cell for cell in result.cells if cell.shots == k and cell.row.panel == panel]
            _curve(above, _means(own, judged), colour, _shots_words(k))
            _curve(below, _differences(own, judged, result.reference), colour)
        _value_axis(below, sorted({cell.row.value or 0.0 for cell in result.cells if cell.row.panel == panel} - {0.0}))
    if grid[0, 0].get_legend_handles_labels()[0]:
        above_the_panel = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 2, "borderaxespad": 0.2}
        grid[0, 0].legend(frameon=False, fontsize=8, labelcolor=INK, **above_the_panel)
    against = f"difference to\n{textwrap.fill(result.reference, 26)},\npoints of {FIGURES[judged]}"
    for axes, words in zip(grid[:, 0], (f"{FIGURES[judged]}, percent", against), strict=True):
        axes.set_ylabel(words, fontsize=8.5, color=INK)
    figure.align_ylabels(grid[:, 0])
    _title(figure, result, "bands: one standard error to either side; below, of the paired differences")
    figure.savefig(path, dpi=DPI)


def _means(cells: Sequence[Cell], judged: str) -> list[Point]:
    found = ((cell.row.value or 0.0, _values(cell, judged)) for cell in cells)
    return [
        Point(value, draws.mean(), draws.std(ddof=1) / np.sqrt(len(draws)) if len(draws) > 1 else 0.0, HIGHEST)
        for value, draws in found
        if len(draws)
    ]


def _differences(cells: Sequence[Cell], judged: str, reference: str) -> list[Point]:
    """As the table has them; the reference stands at 0 where it has a place on the axis."""
    points = [Point(cell.row.value, 0.0) for cell in cells if cell.row.label == reference and cell.row.value]
    for cell in cells:
        if judged in cell.differences:
            found = cell.differences[judged]
            points.append(Point(cell.row.value or 0.0, found["mean"], found["se"] or 0.0))
    return points


def _curve(axes: Axes, points: Sequence[Point], colour: str, label: str = "") -> None:
    """A line with a band; a value of 0 is nothing of what is swept, a level that the line is to rise above."""
    curve = sorted(point for point in points if point.value > 0.0)
    for level in (point for point in points if point.value == 0.0):
        words = f"{label}, random weights" if label else ""
        axes.axhline(level.mean, color=colour, linewidth=1.2, linestyle=":", label=words)
    if not curve:
        return
    x, mean, error, highest = np.array(curve).T
    ends = mean - error, np.minimum(mean + error, highest)
    axes.fill_between(x, *ends, color=colour, alpha=0.15, linewidth=0, zorder=1)
    axes.plot(x, mean, color=colour, linewidth=1.6, marker="o", markersize=4.5, label=label, zorder=3)


def _value_axis(axes: Axes, values: Sequence[float]) -> None:
    """A tick at every value; logarithmic where they span more than a decade."""
    if len(values) > 1 and values[-1] / values[0] > 12:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(list(values), [f"{value:g}" for value in values])


def _values(cell: Cell, judged: str) -> np.ndarray:
    found = [scores.to_dict().get(judged) for scores in cell.scores]
    return np.array([value for value in found if value is not None], np.float64)


def _shots_words(shots: int | None) -> str:
    return "all labels" if shots is None else f"{shots} shot" + "s" * (shots != 1)


def _title(figure: Figure, result: StudyResult, spread: str) -> None:
    several = len(result.cells[0].seeds) > 1
    text = f"{about(result)}; {spread}" if several else about(result)
    lines = textwrap.fill(text, int(figure.get_figwidth() * 14))
    figure.suptitle(lines, fontsize=10, color=INK, x=0.01, ha="left")
