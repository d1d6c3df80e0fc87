"""Curves as a Markdown table and as pictures: one for time, one for memory, a small panel per curve, both axes log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
Found = Mapping[str, Any]

NAMES = {
    "umd_step": "UMD step", "flc_step": "FLC step", "predict": "prediction", "scene_read": "reading a scene",
    "fit_front_end": "fitting the front end", "prepare": "preparing a scene",
    "draw_from_memory": "windows, scene in memory", "draw_from_disk": "windows, scene on disk",
}  # fmt: skip
UNITS = {
    "batch": "windows in a batch", "bands": "bands", "window": "side of the window, pixels",
    "depth": "blocks of encoder and decoders", "width": "width of the model", "pixels": "pixels of the scene",
}  # fmt: skip
# What is drawn: its column in the rows, the counts that bound its growth, how the axis is called.
MEASURES = {
    "time": ("median_ms", ("gflop", "moved_mb"), "ms"),
    "memory": ("peak_mb", ("least_mb", "most_mb"), "MiB"),
}
TITLES = {"time": "time of a call", "memory": "peak memory of a call, beyond what lies there before it"}
LEGEND = {
    "time": "as FLOPs to as bytes moved, through the last point",
    "memory": "as what must be held at once, through the last point",
}
INK, MEASURED, ALLOWED, BEYOND = "#333333", "#24587f", "#b9d3e6", "#c2410c"
COLUMNS = 5


def curve_table(result: Mapping[str, Any]) -> str:
    """One line per curve: its ends, how it grows, how the counts say that it should."""
    from fastdiffclip.bench.report import markdown_table, number

    lines = []
    for case, axis in dict.fromkeys((found["case"], found["axis"]) for found in result["curves"]):
        rows = own_rows(result["rows"], case, axis)
        if not rows:
            continue
        cells = [case, f"{axis} {rows[0]['value']} to {rows[-1]['value']}"]
        for measure, (column, _, unit) in MEASURES.items():
            ends = " to ".join(number(row[column]) for row in (rows[0], rows[-1]))
            found = summary_of(result, case, axis, measure)
            cells += [f"{ends} {unit}", *_growth(found)]
        lines.append(cells)
    head = ("case", "against", "time", "grows as x^", "counts say", "peak", "grows as x^", "counts say")
    margin = result["margin"]
    return markdown_table(head, lines) + (
        f"\n\nExponents over the upper half of each axis. **Bold**: more than {margin} beyond what the counts say."
    )


def _growth(found: Found) -> tuple[str, str]:
    if found["exponent"] is None:
        return "", ""
    measured = f"{found['exponent']:.2f}"
    return f"**{measured}**" if found["differs"] else measured, _allowed(found)


def _allowed(found: Found) -> str:
    if found["expected"] is None:
        return ""
    low, high = (f"{slope:.2f}".replace("-0.00", "0.00") for slope in found["expected"])
    return low if low == high else f"{low} to {high}"


def own_rows(rows: Rows, case: str, axis: str) -> list[Mapping[str, Any]]:
    """The rows of one curve, ascending."""
    own = [row for row in rows if (row["case"], row["axis"]) == (case, axis)]
    return sorted(own, key=lambda row: float(row["value"]))


def summary_of(result: Mapping[str, Any], case: str, axis: str, measure: str) -> Found:
    """How one measure of one curve grows."""
    key = (case, axis, measure)
    found: Found = next(f for f in result["curves"] if (f["case"], f["axis"], f["measure"]) == key)
    return found


def plot_curves(result: Mapping[str, Any], target: Path) -> list[Path]:
    """Write ``<target>-time.png`` and ``<target>-memory.png``; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return []
    files = []
    grid = panels(result)
    for measure in MEASURES:
        figure = Figure(figsize=(2.75 * COLUMNS, 2.55 * len(grid) + 0.9), layout="constrained")
        _draw(figure, result, grid, measure)
        path = target.with_name(f"{target.stem}-{measure}.png")
        figure.savefig(path, dpi=130)
        files.append(path)
    return files


def panels(result: Mapping[str, Any]) -> list[list[tuple[str, str]]]:
    """(case, axis) of each panel, row by row: a row per case, and the cases of a single axis side by side."""
    axes: dict[str, list[str]] = {}
    for found in result["curves"]:
        if own_rows(result["rows"], found["case"], found["axis"]) and found["measure"] == "time":
            axes.setdefault(found["case"], []).append(found["axis"])
    grid = [[(case, axis) for axis in found] for case, found in axes.items() if len(found) > 1]
    alone = [(case, found[0]) for case, found in axes.items() if len(found) == 1]
    return grid + [alone[first : first + COLUMNS] for first in range(0, len(alone), COLUMNS)]


def _draw(figure: Figure, result: Mapping[str, Any], grid: list[list[tuple[str, str]]], measure: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    every = figure.subplots(max(1, len(grid)), COLUMNS, squeeze=False)
    for place, line in zip(every, grid or [[]], strict=True):
        for axes in place[len(line) :]:
            axes.set_axis_off()
        for axes, (case, axis) in zip(place, line, strict=False):
            found = summary_of(result, case, axis, measure)
            _panel(axes, own_rows(result["rows"], case, axis), found, measure)
        if line:
            place[0].set_ylabel(MEASURES[measure][2], color=INK, fontsize=9)
    figure.suptitle(_title(result, measure), fontsize=10.5, color=INK, x=0.01, ha="left")
    figure.legend(
        handles=[
            Line2D([], [], color=MEASURED, marker="o", markersize=4, label="measured"),
            Line2D([], [], color=BEYOND, marker="o", markersize=4, label="measured, grows otherwise than counted"),
            Line2D([], [], color=INK, marker="o", markersize=4, markerfacecolor="white", linestyle="none",
                   label="not in the exponent"),
            Patch(color=ALLOWED, label=LEGEND[measure]),
        ],
        loc="outside lower left", ncols=4, frameon=False, fontsize=8.5, labelcolor=INK,
    )  # fmt: skip


def _title(result: Mapping[str, Any], measure: str) -> str:
    machine = result["machine"]
    device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] != 1)
    return f"Growth of {TITLES[measure]}. {device}, {threads}; one size at a time around {result['base']}"


def _panel(axes: Axes, rows: Rows, found: Found, measure: str) -> None:
    column, counts, _ = MEASURES[measure]
    known = [row for row in rows if row[column]]
    axes.set_title(NAMES[found["case"]], fontsize=9, color=INK, loc="left", pad=4)
    axes.set_xlabel(UNITS[found["axis"]], fontsize=8, color=INK)
    if not known:
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center", fontsize=8, color=INK)
        return
    colour = BEYOND if found["differs"] else MEASURED
    x, y = [row["value"] for row in known], [row[column] for row in known]
    _band(axes, x, y[-1], [[row[name] for row in known] for name in counts])
    axes.plot(x, y, color=colour, linewidth=1.6, zorder=3)
    if measure == "time":
        axes.vlines(
            x, [row["p20_ms"] for row in known], [row["p80_ms"] for row in known], colour, linewidth=1, zorder=3
        )
    upper = [value in found["upper"] for value in x]
    axes.scatter(x, y, s=18, facecolors=[colour if u else "white" for u in upper], edgecolors=colour, zorder=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    if max(y) / min(y) < 8:  # a flat curve shall look flat
        middle = (max(y) * min(y)) ** 0.5
        axes.set_ylim(middle / 4, middle * 4)
    _ticks(axes, x)
    if found["exponent"] is not None:
        allowed = _allowed(found)
        text = rf"$x^{{{found['exponent']:.2f}}}$" + (f"\ncounted {allowed}" if allowed else "")
        axes.text(0.05, 0.94, text, transform=axes.transAxes, va="top", fontsize=8.5, color=colour, linespacing=1.35)


def _band(axes: Axes, x: Sequence[float], last: float, counts: Sequence[Sequence[float | None]]) -> None:
    """What the counts allow, drawn through the last point."""
    shapes = [[last * (c or 0.0) / (series[-1] or 1.0) for c in series] for series in counts if all(series)]
    if not shapes:
        return
    low, high = (list(map(pick, *shapes, shapes[0])) for pick in (min, max))
    axes.fill_between(x, low, high, color=ALLOWED, linewidth=2.2, zorder=1)


def _ticks(axes: Axes, x: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    shown = x if len(x) <= 7 else x[::2] if x[-1] < 5000 else x
    axes.xaxis.set_major_locator(FixedLocator(list(shown)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 30 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=7.5, colors=INK, length=2.5)
    axes.tick_params(which="minor", length=1.5)
    axes.grid(which="major", color="#e6e6e6", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9a9a9a")


def _short(value: float) -> str:
    """``512``, ``32k``, ``3.2M``."""
    if value < 9_900:
        return f"{value:g}"
    scaled, letter = (value / 1e3, "k") if value < 990_000 else (value / 1e6, "M")
    return f"{scaled:.0f}{letter}" if scaled > 9.9 else f"{scaled:.1f}{letter}".replace(".0", "")
