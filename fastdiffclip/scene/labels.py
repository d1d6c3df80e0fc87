"""Label maps and class tables."""

from __future__ import annotations

import colorsys
import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers.source import RasterSource
from fastdiffclip.scene.store import ClassInfo

LARGEST_VALUE = 65535
_COLUMNS = {
    "value": ("value", "id", "code", "class_id", "label"),
    "name": ("name", "class", "class_name"),
    "description": ("description", "desc", "text"),
    "colour": ("colour", "color", "rgb", "hex"),
}
_UNLABELLED = {
    "",
    "unlabelled",
    "unlabeled",
    "unclassified",
    "undefined",
    "background",
    "none",
    "nodata",
    "no data",
}
_ROWS_AT_ONCE = 256


class Described(Protocol):
    """A label file that may name its classes and colour them."""

    @property
    def path(self) -> Path: ...
    @property
    def class_names(self) -> dict[int, str]: ...
    @property
    def class_colours(self) -> dict[int, tuple[int, int, int]]: ...


@dataclass(frozen=True)
class LabelMap:
    """One label map in memory: ``values`` (H, W) uint16, 0 = unlabelled.

    ``numbering`` says what the values mean: they are class values (``values``), or they number the names of the file
    as it lists them (``listed``) or in alphabetical order (``sorted``), and may be numbered anew. ``resampled`` is as
    in :class:`~fastdiffclip.scene.store.Scene`, None for a map that was not.
    """

    path: Path
    values: np.ndarray
    class_names: dict[int, str]
    class_colours: dict[int, tuple[int, int, int]]
    numbering: Literal["values", "listed", "sorted"] = "values"
    warnings: tuple[str, ...] = ()
    companions: tuple[Path, ...] = ()
    resampled: dict[str, Any] | None = None


def read_class_table(path: Path) -> tuple[list[ClassInfo], list[str]]:
    """Read a CSV class table; return its rows by value and warnings.

    Separated by comma, semicolon or tab. With a header, the columns are found by name: value (or id, code,
    class_id, label), name (or class, class_name), description, colour (``#rrggbb``); where there is no such
    name, ``name`` is the first other column of text and ``description`` the next one. Without a header the
    order is value, name, description, colour. A row of value 0 is left out, since 0 means unlabelled.
    Raises InputDataError naming the line.
    """
    rows = _read_csv(path)
    places, first = _find_columns(path, rows)
    classes: dict[int, ClassInfo] = {}
    warnings: list[str] = []
    for number, row in rows[first:]:
        info = _parse_row(f"{path}, line {number}", row, places)
        if info.value == 0:
            if info.name.lower() not in _UNLABELLED:
                warnings.append(f"{path}: class '{info.name}' with value 0 is left out, since 0 means unlabelled")
            continue
        if info.value in classes:
            raise InputDataError(f"{path}, line {number}: value {info.value} stands in the table twice")
        if info.name in {known.name for known in classes.values()}:
            raise InputDataError(f"{path}, line {number}: two classes are called '{info.name}', names must differ")
        classes[info.value] = info
    if not classes:
        raise InputDataError(f"{path} names no class: expected lines such as '1,oak,broad-leaved tree'")
    return sorted(classes.values(), key=lambda info: info.value), warnings


def _read_csv(path: Path) -> list[tuple[int, list[str]]]:
    """Return (line number, cells) of the lines that are not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputDataError(f"class table {path} cannot be read as UTF-8 text ({error})") from error
    head = text.partition("\n")[0]
    separator = max(",;\t", key=head.count)
    reader = csv.reader(text.splitlines(), delimiter=separator, skipinitialspace=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except csv.Error as error:
        raise InputDataError(f"class table {path} is not CSV ({error})") from error
    if not rows:
        raise InputDataError(f"class table {path} is empty: expected lines such as '1,oak,broad-leaved tree'")
    return rows


def _find_columns(path: Path, rows: list[tuple[int, list[str]]]) -> tuple[dict[str, int], int]:
    """Return the place of each column and the index of the first row of values."""
    header = [cell.lower() for cell in rows[0][1]]
    if re.fullmatch(r"\d+", header[0]):
        return dict(zip(_COLUMNS, range(len(_COLUMNS)), strict=True)), 0
    places: dict[str, int] = {}
    for column, names in _COLUMNS.items():
        found = [header.index(name) for name in names if name in header]
        if found:
            places[column] = found[0]
    if "value" not in places:
        raise InputDataError(
            f"class table {path} has the columns {', '.join(header)}: expected a column 'value' and one of names"
        )
    texts = [i for i in range(len(header)) if i not in places.values() and _holds_text(rows[1:], i)]
    for column in ("name", "description"):
        if column not in places and texts:
            places[column] = texts.pop(0)
    if "name" not in places:
        raise InputDataError(f"class table {path} has no column of names: add one called 'name'")
    return places, 1


def _holds_text(rows: list[tuple[int, list[str]]], place: int) -> bool:
    return any(len(row) > place and re.search(r"[^\W\d_]", row[place]) for _, row in rows)


def _parse_row(where: str, row: list[str], places: Mapping[str, int]) -> ClassInfo:
    cell = {column: row[place] if place < len(row) else "" for column, place in places.items()}
    if not re.fullmatch(r"\d{1,9}", cell["value"]) or int(cell["value"]) > LARGEST_VALUE:
        raise InputDataError(f"{where}: '{cell['value']}' is no class value, expected an integer 0 to {LARGEST_VALUE}")
    if not cell["name"] and int(cell["value"]):
        raise InputDataError(f"{where}: class {cell['value']} has no name")
    return ClassInfo(
        int(cell["value"]), cell["name"], cell.get("description", ""), _colour(where, cell.get("colour", ""))
    )


def _colour(where: str, text: str) -> tuple[int, int, int] | None:
    if not text:
        return None
    if not re.fullmatch(r"#?[0-9a-fA-F]{6}", text):
        raise InputDataError(f"{where}: '{text}' is no colour, expected #rrggbb")
    red, green, blue = bytes.fromhex(text.removeprefix("#"))
    return red, green, blue


def read_label_map(source: RasterSource) -> np.ndarray:
    """Read a label raster as (H, W) uint16; the file's nodata value and NaN become 0, unlabelled.

    So do pixels that the file's own mask leaves out. Raises InputDataError for several bands, fractions, negative
    values and values above 65535.
    """
    if source.bands != 1:
        raise InputDataError(f"labels {source.path} have {source.bands} bands, expected one of class values")
    labels = np.empty((source.height, source.width), np.uint16)
    for start in range(0, source.height, _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, source.height))
        values = source.read_rows(rows)[..., 0]
        unknown = np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
        if source.nodata is not None:
            unknown |= values == np.array(source.nodata).astype(values.dtype if values.dtype.kind == "f" else float)
        if source.read_mask is not None:
            unknown |= ~source.read_mask(rows)
        values = np.where(unknown, np.zeros((), values.dtype), values)
        _check_values(source.path, values)
        labels[rows] = values
    return labels


def _check_values(path: Path, values: np.ndarray) -> None:
    for what, wrong in (
        ("negative", values < 0),
        (f"above {LARGEST_VALUE}", values > LARGEST_VALUE),
        ("not whole numbers", values != np.floor(values) if values.dtype.kind == "f" else np.zeros(1, bool)),
    ):
        if wrong.any():
            raise InputDataError(
                f"labels {path} hold {np.count_nonzero(wrong)} values that are {what} (such as "
                f"{values[wrong][0]}): "
                f"expected integers 0 to {LARGEST_VALUE}, 0 = unlabelled"
            )


def count_values(maps: Iterable[np.ndarray]) -> dict[int, int]:
    """Return the number of pixels of each label value but 0, over all maps."""
    counts = np.zeros(LARGEST_VALUE + 1, np.int64)
    for labels in maps:
        counts += np.bincount(labels.ravel(), minlength=counts.size)
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts) if value}


def class_table(
    counts: Mapping[int, int], given: Sequence[ClassInfo] | None, sources: Iterable[Described] = ()
) -> tuple[list[ClassInfo], list[str]]:
    """Return the class table of labels with these pixel counts, every class with a colour, and warnings.

    ``given`` is the user's table: it must name every value that occurs, or InputDataError lists the others
    with their pixel counts. Without it, the names that the label files carry are used, and ``class 1`` and so on
    for the rest, with a warning. Colours that are not given are those of the label files where they have some.
    """
    sources = list(sources)
    colours: dict[int, tuple[int, int, int]] = {}
    for source in sources:
        # A colour table of 256 entries is black where nobody set it.
        colours = {
            **{value: colour for value, colour in source.class_colours.items() if any(colour)},
            **colours,
        }
    if given is not None:
        missing = {value: count for value, count in counts.items() if value not in {info.value for info in given}}
        if missing:
            listed = ", ".join(f"{value} ({count} pixels)" for value, count in missing.items())
            raise InputDataError(f"the class table has no row for the label values {listed}: add them to it")
        return with_colours([replace(info, colour=info.colour or colours.get(info.value)) for info in given]), []
    names: dict[int, str] = {}
    for source in sources:
        for value, name in source.class_names.items():
            if names.setdefault(value, name) != name:
                raise InputDataError(
                    f"value {value} is '{names[value]}' in one label file and '{name}' in {source.path}: "
                    "give one class table with --classes"
                )
    unnamed = [value for value in counts if value not in names]
    infos = [ClassInfo(value, names.get(value, f"class {value}"), "", colours.get(value)) for value in sorted(counts)]
    listed = ", ".join(map(str, unnamed))
    note = f"label values {listed} have no class name and are called 'class N': give --classes FILE"
    return with_colours(infos), [note] if unnamed else []


def with_colours(classes: Sequence[ClassInfo]) -> list[ClassInfo]:
    """Return the classes with a distinct colour wherever one is missing; given ones are kept."""
    used = {info.colour for info in classes if info.colour}
    coloured = []
    fresh = (colour for colour in map(_spread_colour, range(2 * LARGEST_VALUE)) if colour not in used)
    for info in classes:
        coloured.append(info if info.colour else replace(info, colour=next(fresh)))
    return coloured


def _spread_colour(index: int) -> tuple[int, int, int]:
    """Return the n-th of colours far apart: hues by the golden ratio, three rings of brightness."""
    hue = (0.33 + index * 0.6180339887498949) % 1.0
    ring = index // 8 % 3
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.75, 0.45, 1.0)[ring], (0.85, 1.0, 0.55)[ring])
    return round(255 * red), round(255 * green), round(255 * blue)
