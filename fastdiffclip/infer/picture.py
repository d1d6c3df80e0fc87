"""A class map as a picture: crisp pixels, a title, a legend with the share of every class."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdiffclip.files import replacing
from fastdiffclip.infer.cog import Grid
from fastdiffclip.infer.raster import (
    NODATA,
    areas_of,
    check_map,
    class_colours,
    count_values,
    metres_per_unit,
)
from fastdiffclip.infer.rawfile import RawFile
from fastdiffclip.infer.tiles import Rect

if TYPE_CHECKING:
    from fastdiffclip.scene.store import ClassInfo

DPI = 200
MAX_SIDE = 8000  # pixels; a longer map is shrunk
ROWS_BYTES = 1 << 20
LONG_SIDE = 1400  # pixels; a small map is enlarged by a whole number to about this
MARGIN = 64
ROW = 52  # height of a legend row
SWATCH = 30
INK, MUTED, EMPTY, FRAME = "#1c2126", "#69727c", (236, 238, 240), "#c9ced4"
TITLE, SUBTITLE, ENTRY, SHARE = (
    {"fontsize": 13, "fontweight": "bold", "color": INK},
    {"fontsize": 8.5, "color": MUTED},
    {"fontsize": 9, "color": INK},
    {"fontsize": 8.5, "color": MUTED},
)


@dataclass(frozen=True)
class _Entry:
    name: str
    share: str
    colour: tuple[int, int, int]


def reduce_map(class_map: np.ndarray | RawFile, max_pixels: int) -> np.ndarray:
    """Shrink (H, W) by whole factors to at most ``max_pixels``: each block becomes its commonest value.

    Both sides shrink by the same factor, unless the map is so long and narrow, or would stay longer than
    ``MAX_SIDE``, that only its longer side can. Rows and columns left over at the lower and right edge are
    dropped. Ties go to the smaller value.
    """
    height, width = (class_map.height, class_map.width) if isinstance(class_map, RawFile) else class_map.shape
    down, across = _factors(height, width, max_pixels)
    if isinstance(class_map, np.ndarray):
        return _commonest(class_map[: height // down * down, : width // across * across], down, across)
    small = np.zeros((height // down, width // across), class_map.dtype.newbyteorder("="))
    step = max(1, ROWS_BYTES // (down * width)) * down
    for top in range(0, len(small) * down, step):
        rows = Rect(top, min(top + step, len(small) * down), 0, small.shape[1] * across)
        small[top // down : rows.bottom // down] = _commonest(class_map.read(rows)[0], down, across)
    return small


def _factors(height: int, width: int, max_pixels: int) -> tuple[int, int]:
    """Whole factors for rows and columns."""
    factor = 1
    while (height // factor) * (width // factor) > max_pixels:
        factor += 1
    factor = min(factor, height, width)
    down = across = factor
    while (height // down) * (width // across) > max_pixels or max(height // down, width // across) > MAX_SIDE:
        down, across = (down + 1, across) if height // down > width // across else (down, across + 1)
    return down, across


def _commonest(values: np.ndarray, down: int, across: int) -> np.ndarray:
    if down == across == 1:
        return values
    height, width = values.shape[0] // down, values.shape[1] // across
    blocks = values.reshape(height, down, width, across)
    best = np.zeros((height, width), np.int64)
    winner = np.zeros((height, width), values.dtype)
    for value in np.flatnonzero(np.bincount(values.ravel())):
        count = (blocks == value).sum(axis=(1, 3))
        winner[count > best] = value
        best = np.maximum(best, count)
    return winner


def colour_map(class_map: np.ndarray, classes: Sequence[ClassInfo]) -> np.ndarray:
    """Return (H, W, 4) uint8 red, green, blue, alpha of a class map; nodata is transparent."""
    return _palette(class_map, classes)[class_map]


def _opaque(class_map: np.ndarray, classes: Sequence[ClassInfo]) -> np.ndarray:
    """``colour_map`` without alpha, nodata in a colour of its own."""
    table = _palette(class_map, classes)
    table[table[:, 3] == 0, :3] = EMPTY
    opaque = np.empty((*class_map.shape, 3), np.uint8)
    for row, values in enumerate(class_map):  # an index of many pixels is widened to eight bytes each
        opaque[row] = table[values, :3]
    return opaque


def _palette(class_map: np.ndarray, classes: Sequence[ClassInfo]) -> np.ndarray:
    table = np.zeros((int(class_map.max(initial=0)) + 1, 4), np.uint8)
    for value, rgb in class_colours(classes).items():
        if value < len(table):
            table[value] = (*rgb, 255)
    return table


def write_class_png(
    path: str | Path,
    class_map: np.ndarray | RawFile,
    *,
    classes: Sequence[ClassInfo],
    title: str,
    subtitle: str | None = None,
    crs_wkt: str | None = None,
    affine_transform: Sequence[float] | None = None,
    max_pixels: int = 4_000_000,
) -> Path:
    """Write a class map as a picture with title, legend and share of every class in the classified pixels.

    Parameters
    ----------
    class_map : (H, W) uint8 or uint16, 0 = nodata, or a raw file of one such band, read a few rows at a time. A
        map of more than ``max_pixels`` is shrunk (see `reduce_map`), a small one enlarged by a whole number, so
        that its pixels stay crisp squares.
    classes : names and colours, in the order of the legend. A class without pixels is listed with a dash.
    subtitle : a line of small print; None says the size of the map.
    crs_wkt, affine_transform : where the CRS has a unit of length, a scale bar is drawn.

    Raises what `write_class_map` raises. The same map gives the same bytes.
    """
    path = Path(path)
    if isinstance(class_map, np.ndarray):
        check_map(class_map, classes)
        height, width = class_map.shape
        counts = np.bincount(class_map.ravel())
    else:
        height, width, counts = class_map.height, class_map.width, count_values(class_map)
    if subtitle is None:
        subtitle = f"{height:,} × {width:,} pixels"
    small = reduce_map(class_map, max_pixels)
    image, times = _opaque(small, classes), max(1, LONG_SIDE // max(small.shape))
    if times > 1:
        image = image.repeat(times, axis=0).repeat(times, axis=1)
    metres = metres_per_unit(crs_wkt)
    if metres is not None and affine_transform is not None:
        metres *= math.hypot(affine_transform[0], affine_transform[3]) * width / image.shape[1]
    else:
        metres = None
    picture = _compose(image, _legend(counts, classes), title, subtitle, metres)
    with replacing(path) as temporary:
        temporary.write_bytes(picture)
    return path


def _legend(counts: np.ndarray, classes: Sequence[ClassInfo]) -> list[_Entry]:
    colours = class_colours(classes)
    rows = [
        _Entry(row["name"], _share(row["share"]) if row["pixels"] else "–", colours[row["value"]])
        for row in areas_of(counts, classes, Grid())
    ]
    if counts[NODATA]:
        rows.append(_Entry("no data", "", EMPTY))
    return rows


def _share(percent: float) -> str:
    return "< 0.1 %" if percent < 0.05 else f"{percent:.1f} %"


def _compose(
    image: np.ndarray, entries: list[_Entry], title: str, subtitle: str, metres_per_pixel: float | None
) -> bytes:
    """Lay out in whole device pixels, origin top left, so that the map is never resampled."""
    height, width = image.shape[:2]
    name_width = max((_width(entry.name, ENTRY) for entry in entries), default=0)
    column = SWATCH + 18 + name_width + 36 + _width("00.0 %", SHARE)
    beside = width <= 1.25 * height and len(entries) * ROW <= height
    columns = 1 if beside else max(1, (max(width, 900) + MARGIN) // (column + MARGIN))
    depth = -(-len(entries) // columns)

    content = width + MARGIN + column if beside else max(width, columns * (column + MARGIN) - MARGIN)
    heading = _wrap(title, content)
    map_top = MARGIN + 50 * heading.count("\n") + 50 + 58
    scale_height = 0 if metres_per_pixel is None else 70
    map_bottom = map_top + height + scale_height
    legend_x, legend_y = (MARGIN + width + MARGIN, map_top) if beside else (MARGIN, map_bottom + 44)
    bottom = map_bottom if beside else legend_y + depth * ROW - (ROW - SWATCH)

    page = _Page(content + 2 * MARGIN, bottom + MARGIN)
    page.text(MARGIN, MARGIN - 8, heading, va="top", linespacing=1.35, **TITLE)
    page.text(MARGIN, map_top - 24, subtitle, va="bottom", **SUBTITLE)
    page.image(MARGIN, map_top, image)
    if metres_per_pixel is not None:
        page.scale_bar(MARGIN, map_top + height + 26, width, metres_per_pixel)
    for place, entry in enumerate(entries):
        x = legend_x + (place // depth) * (column + MARGIN)
        y = legend_y + (place % depth) * ROW
        page.swatch(x, y, entry.colour)
        page.text(x + SWATCH + 18, y + SWATCH / 2, entry.name, va="center_baseline", **ENTRY)
        page.text(x + column, y + SWATCH / 2, entry.share, va="center_baseline", ha="right", **SHARE)
    return page.png()


class _Page:
    """A matplotlib figure addressed in device pixels from the top left corner."""

    def __init__(self, width: int, height: int) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = int(width), int(height)
        self._laid: list[tuple[int, int, np.ndarray]] = []
        self.figure = Figure(figsize=(self.width / DPI, self.height / DPI), dpi=DPI, facecolor="white")

    def text(self, x: float, y: float, words: str, **style: Any) -> None:
        self.figure.text(x / self.width, 1 - y / self.height, words, parse_math=False, **style)

    def image(self, x: int, y: int, pixels: np.ndarray) -> None:
        """Put (h, w, 3) uint8 at a place, over the finished page: matplotlib would resample them, in much memory."""
        height, width = pixels.shape[:2]
        self._box(x - 2, y - 2, width + 4, height + 4, facecolor=FRAME, edgecolor="none")
        self._laid.append((x, y, pixels))

    def swatch(self, x: float, y: float, colour: tuple[int, int, int]) -> None:
        self._box(
            x,
            y,
            SWATCH,
            SWATCH,
            facecolor=[part / 255 for part in colour],
            edgecolor="#00000030",
            linewidth=0.4,
        )

    def scale_bar(self, x: float, y: float, width: int, metres_per_pixel: float) -> None:
        metres = _round_length(0.25 * width * metres_per_pixel)
        length = metres / metres_per_pixel
        self._box(x, y, length, 6, facecolor=INK, edgecolor="none")
        label = f"{metres / 1000:g} km" if metres >= 1000 else f"{metres:g} m"
        self.text(x + length + 16, y + 3, label, va="center_baseline", **SUBTITLE)

    def _box(self, x: float, y: float, width: float, height: float, **style: Any) -> None:
        from matplotlib.patches import Rectangle

        corner = (x / self.width, 1 - (y + height) / self.height)
        box = Rectangle(corner, width / self.width, height / self.height, transform=self.figure.transFigure, **style)
        self.figure.add_artist(box)

    def png(self) -> bytes:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL import Image

        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        page = np.asarray(canvas.buffer_rgba())
        for x, y, pixels in self._laid:
            page[y : y + len(pixels), x : x + pixels.shape[1], :3] = pixels
        buffer = BytesIO()
        picture = Image.frombuffer("RGBA", page.shape[1::-1], page, "raw", "RGBA", 0, 1)  # shares the memory
        picture.save(buffer, "png", dpi=(DPI, DPI))
        return buffer.getvalue()


def _width(words: str, style: dict[str, Any]) -> int:
    """Width of a line of text in device pixels."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    font = FontProperties(size=style["fontsize"], weight=style.get("fontweight", "normal"))
    return int(RendererAgg(1, 1, DPI).get_text_width_height_descent(words, font, False)[0]) + 1


def _wrap(title: str, width: int) -> str:
    share = width / max(1, _width(title, TITLE))
    return title if share >= 1 else "\n".join(textwrap.wrap(title, max(8, int(0.95 * share * len(title)))))


def _round_length(metres: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not longer."""
    power = 10.0 ** np.floor(np.log10(metres))
    return float(max(step for step in (1, 2, 5) if step * power <= metres) * power)
