"""The pictures of a report: PNG bytes for pixels, inline SVG for curves.

The SVG takes its colours from the page's style sheet, so that it follows the light and dark scheme.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiffclip.errors import UsageError
from fastdiffclip.infer.picture import colour_map, reduce_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fastdiffclip.scene.store import ClassInfo

MAX_PIXELS = 1_500_000
TRUE_COLOUR = (645.0, 555.0, 465.0)  # nanometres of red, green and blue
TOLERANCE = 30.0  # farther from any band, a colour is not true any more
# Colours that matplotlib writes and the style sheet's variables that take their place.
SERIES = ["#0101f1", "#0101f2", "#0101f3", "#0101f4", "#0101f5", "#0101f6", "#0101f7", "#0101f8"]
INK, GRID = "#0101e1", "#0101e2"
VARIABLES = {colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)}
VARIABLES |= {INK: "var(--muted)", GRID: "var(--line)"}
DASHES = ("-", "--", ":")


def composite_bands(wavelengths: Sequence[float] | None, bands: int) -> tuple[tuple[int, int, int], str]:
    """Choose the bands of a colour composite, given wavelengths in nm: (red, green, blue), and a caption.

    True colour where the bands reach it, else three bands spread over the range, the longest as red.
    """
    if wavelengths is not None:
        distance = np.abs(np.asarray(wavelengths, dtype=float)[:, None] - TRUE_COLOUR)
        if (distance.min(axis=0) <= TOLERANCE).all():
            red, green, blue = (int(band) for band in distance.argmin(axis=0))
            nanometres = ", ".join(f"{wavelengths[band]:.0f}" for band in (red, green, blue))
            return (red, green, blue), f"True colour ({nanometres} nm)"
    red, green, blue = (min(bands - 1, int(bands * share)) for share in (5 / 6, 1 / 2, 1 / 6))
    if wavelengths is not None:
        nanometres = ", ".join(f"{wavelengths[band]:.0f}" for band in (red, green, blue))
        return (red, green, blue), f"False colour ({nanometres} nm)"
    return (red, green, blue), f"False colour (bands {red + 1}, {green + 1}, {blue + 1})"


def figure_composite(block: np.ndarray, valid: np.ndarray | None = None) -> bytes:
    """Return a PNG of an (H, W, 3) or (H, W) block of any unit, each channel stretched from 2 % to 98 %.

    Pixels that are not finite, or not in ``valid`` (H, W) bool, are transparent. A large block is thinned.
    """
    step = max(1, int(np.ceil(np.sqrt(block.shape[0] * block.shape[1] / MAX_PIXELS))))
    shown = block[::step, ::step].astype(np.float32)
    known = _known(shown)
    if valid is not None:
        known &= valid[::step, ::step]
    low, high = _stretch(shown[known])
    return _png(_shade(shown, low, high, known))


def figure_class_map(class_map: np.ndarray, classes: Sequence[ClassInfo]) -> bytes:
    """Return a PNG of an (H, W) class map, one pixel for one, nodata transparent; a large map is reduced."""
    return _png(colour_map(reduce_map(class_map, MAX_PIXELS), classes))


def figure_windows(windows: Sequence[np.ndarray]) -> list[bytes]:
    """Return one PNG per (P, P, 3) or (P, P) window, all with the stretch of the last one.

    Tokens that are not finite (masked) are transparent. The last window is the clean one.
    """
    low, high = _stretch(windows[-1].reshape(-1, *windows[-1].shape[2:]), tails=0.0)
    pictures = []
    for window in windows:
        pictures.append(_png(_shade(window, low, high, _known(window))))
    return pictures


def figure_curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
    markers: bool = False,
) -> str:
    """Return curves, name -> (x, y), as inline SVG whose colours follow the page.

    With ``markers`` every point is marked and x is logarithmic with a tick at each value; curves are listed
    in the order in which they end. Raises UsageError without any curve.
    """
    import matplotlib
    from matplotlib.figure import Figure

    if not series:
        raise UsageError("there is no curve to draw")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "|".join(series), "font.size": 9}):
        figure = Figure(figsize=(7.6, 3.2) if markers else (5.6, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for place, (name, (x, y)) in enumerate(series.items()):
            axes.plot(
                x,
                y,
                label=name,
                color=SERIES[place % len(SERIES)],
                linestyle=DASHES[place // len(SERIES) % len(DASHES)],
                linewidth=2.4 if place == 0 else 1.5,
                marker="o" if markers else None,
                markersize=4,
                zorder=3 - 0.01 * place,
            )
        _dress(axes, x_label, y_label)
        if logarithmic:
            _logarithmic(axes)
        if markers:
            _tick_every_value(axes, series)
        if len(series) > 1:
            names = sorted(series, key=lambda name: -series[name][1][-1]) if markers else list(series)
            lines = dict(zip(series, axes.lines, strict=True))
            where: Any = "outside right upper" if markers else "upper right"
            figure.legend(
                [lines[name] for name in names], names, frameon=False, labelcolor=INK, fontsize=8.5, loc=where
            )
        buffer = StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _follow_the_page(buffer.getvalue())


def _dress(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.tick_params(which="both", colors=INK, length=0, pad=6)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.spines[:].set_visible(False)
    axes.margins(x=0.02)


def _logarithmic(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _tick_every_value(axes: Axes, series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    values = sorted({float(value) for x, _ in series.values() for value in x})
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()


def _follow_the_page(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', svg, count=1)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg


def _known(block: np.ndarray) -> np.ndarray:
    """(H, W) bool: finite in every channel."""
    return np.isfinite(block).reshape(*block.shape[:2], -1).all(axis=2)


def _stretch(values: np.ndarray, tails: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper limit of each channel of (N,) or (N, 3) values."""
    if len(values) == 0:
        return np.zeros(values.shape[1:]), np.ones(values.shape[1:])
    low, high = np.nanpercentile(values, [tails, 100 - tails], axis=0)
    return low, np.where(high > low, high, low + 1)


def _shade(block: np.ndarray, low: np.ndarray, high: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return (H, W, 4) uint8; a block without colours becomes grey."""
    scaled = np.clip((np.nan_to_num(block) - low) / (high - low), 0, 1)
    colours = scaled if block.ndim == 3 else np.repeat(scaled[..., None], 3, axis=2)
    return (255 * np.dstack([colours, known]) + 0.5).astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    from matplotlib.image import imsave

    buffer = BytesIO()
    imsave(buffer, pixels, format="png")
    return buffer.getvalue()
