"""Regions of interest that ENVI exports as text, as in the 2013 data fusion contest of the IEEE GRSS.

Comment lines give name, colour and number of points of each region; the points are rows ``ID X Y ...`` whose X and Y
are sample and line, counted from 1. Each region's comments stand before its points, or all of them before all points.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.georeference import Grid
from fastdiffclip.scene.labels import LARGEST_VALUE, LabelMap

SUFFIXES = (".txt", ".roi")
_LONGEST_LINE = 2**20
_HEADER = re.compile(r";\s*(number of rois|file dimensions?|roi name|roi rgb value|roi npts)\s*:\s*(.*)", re.IGNORECASE)
_DIMENSION = re.compile(r"(\d{1,9})\s*x\s*(\d{1,9})", re.IGNORECASE)
_COLOUR = re.compile(r"\{?\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\}?")


@dataclass
class _Region:
    name: str
    line: int
    colour: tuple[int, int, int] | None = None
    points: int | None = None
    columns: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def read_rois(path: Path, variable: str | None, grid: Grid) -> LabelMap:
    """Read regions as a label map on ``grid`` whose values number the regions' names, in the order of the file.

    A pixel of several regions belongs to the last one; a warning counts these. Raises InputDataError, with the line,
    for a file of another kind, a point outside of the grid, and numbers of points that do not fit.
    """
    if variable is not None:
        raise InputDataError(f"{path} holds regions of interest and has no variables: leave out ':{variable}'")
    regions = _read_regions(path, grid)
    names: list[str] = []
    colours: dict[int, tuple[int, int, int]] = {}
    values = np.zeros((grid.height, grid.width), np.uint16)
    taken = 0
    for region in regions:
        if region.name not in names:
            names.append(region.name)
        value = names.index(region.name) + 1
        if value > LARGEST_VALUE:
            raise InputDataError(f"{path} has more than {LARGEST_VALUE} regions: expected one per class")
        if region.colour is not None:
            colours.setdefault(value, region.colour)
        place = np.array(region.rows, np.intp) - 1, np.array(region.columns, np.intp) - 1
        before = values[place]
        taken += int(np.count_nonzero((before != 0) & (before != value)))
        values[place] = value
    warnings = [f"{path}: {taken} points lie in several regions, the last one counts"] if taken else []
    return LabelMap(path, values, dict(enumerate(names, 1)), colours, numbering="listed", warnings=tuple(warnings))


def _read_regions(path: Path, grid: Grid) -> list[_Region]:
    regions: list[_Region] = []
    filling, columns = 0, (1, 2)
    for number, line in _lines(path):
        if line.startswith(";"):
            if header := _HEADER.match(line):
                _take_header(path, number, header[1].lower(), header[2].strip(), regions, grid)
            elif (words := line.lstrip("; \t").lower().split()) and {"x", "y"} <= set(words):
                columns = words.index("x"), words.index("y")
            continue
        while filling < len(regions) and len(regions[filling].columns) == _points(path, regions[filling]):
            filling += 1
        if filling == len(regions):
            raise InputDataError(
                f"{path}, line {number}: found '{line[:40]}' where no region has points left: expected '; ROI name:', "
                "'; ROI npts:' and as many rows of points, as ENVI exports regions of interest to text"
            )
        x, y = _point(path, number, line, columns, grid)
        regions[filling].columns.append(x)
        regions[filling].rows.append(y)
    if not regions:
        raise InputDataError(f"{path} has no '; ROI name:' line: expected regions exported from ENVI as text")
    for region in regions:
        if len(region.columns) != _points(path, region):
            raise InputDataError(
                f"{path}, line {region.line}: region '{region.name}' declares {region.points} points and has "
                f"{len(region.columns)}: is the file truncated?"
            )
    return regions


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of the lines that are not empty."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as stream:
            number = 0
            while line := stream.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE or "\0" in line:
                    raise InputDataError(
                        f"{path}, line {number} is no text: expected regions of interest exported from ENVI as text"
                    )
                if line := line.strip():
                    yield number, line
    except OSError as error:
        raise InputDataError(f"{path} cannot be read ({error.strerror})") from error


def _take_header(path: Path, number: int, key: str, text: str, regions: list[_Region], grid: Grid) -> None:
    if key.startswith("file dim"):
        size = _DIMENSION.search(text)
        if size and (int(size[2]), int(size[1])) != (grid.height, grid.width):
            raise InputDataError(
                f"{path} is for an image of {size[2]} x {size[1]} pixels, expected {grid}: give regions of this image"
            )
    elif key == "roi name":
        regions.append(_Region(text, number))
        if not text:
            raise InputDataError(f"{path}, line {number}: a region has no name, expected '; ROI name: NAME'")
    elif regions and key == "roi rgb value":
        if colour := _COLOUR.fullmatch(text):
            red, green, blue = (min(255, int(part)) for part in colour.groups())
            regions[-1].colour = (red, green, blue)
    elif regions and key == "roi npts":
        if not re.fullmatch(r"\d{1,9}", text):
            raise InputDataError(f"{path}, line {number}: '{text[:40]}' is no number of points")
        regions[-1].points = int(text)


def _points(path: Path, region: _Region) -> int:
    if region.points is None:
        raise InputDataError(f"{path}, line {region.line}: region '{region.name}' has no '; ROI npts:' line")
    return region.points


def _point(path: Path, number: int, line: str, columns: tuple[int, int], grid: Grid) -> tuple[int, int]:
    words = line.split(maxsplit=max(columns) + 1)
    try:
        x, y = (float(words[place]) for place in columns)
    except (ValueError, IndexError):
        x = y = 0.0
    if not (x.is_integer() and y.is_integer() and 1 <= x <= grid.width and 1 <= y <= grid.height):
        raise InputDataError(
            f"{path}, line {number}: found '{line[:40]}', expected a row ID X Y with X from 1 to {grid.width} and Y "
            f"from 1 to {grid.height}"
        )
    return int(x), int(y)
