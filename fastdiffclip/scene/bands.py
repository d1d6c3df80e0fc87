"""What a user says about bands in a small file: wavelengths, and which bands are bad."""

from __future__ import annotations

import math
import re
from pathlib import Path

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers import READERS, expand, open_raster
from fastdiffclip.scene.readers.envi_header import bad_bands, is_header, read_header, wavelengths
from fastdiffclip.scene.readers.spectral import guessed_factor, in_nanometres


def read_wavelengths(spec: str, bands: int) -> tuple[float, ...]:
    """Read one wavelength per band, in nm; returns ``bands`` numbers.

    A text or CSV file has one number per line, or several columns and a header that calls one of them
    'wavelength'; what follows a # is skipped. An ENVI header has them with their unit. A file that a raster
    reader knows (``FILE.mat:VARIABLE``) may hold them as a vector. Where all are below 100 they are
    micrometres. Raises InputDataError when the count differs from ``bands`` or a value is not positive.
    """
    files, variable = expand(spec)
    path = files[0]
    if is_header(path):
        found, _ = wavelengths(read_header(path), bands)
        if found is None:
            raise InputDataError(f"ENVI header {path} has no wavelengths: leave it out or give another file")
        return found
    if path.suffix.lower() in READERS:
        with open_raster(path, variable) as source:
            values = [float(v) for v in source.read_rows(slice(0, source.height)).ravel()]
    else:
        values = _numbers_of_lines(path)
    if len(values) != bands:
        raise InputDataError(f"{spec} has {len(values)} wavelengths, the raster has {bands} bands: give one per band")
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise InputDataError(f"{spec} has a wavelength that is not a positive number: give nm or micrometres")
    return in_nanometres(values, guessed_factor(values))


def _numbers_of_lines(path: Path) -> list[float]:
    lines = [(n, re.split(r"[,;\t ]+", line)) for n, line in enumerate(_lines(path), 1) if line]
    header: list[str] = []
    if lines and not any(map(_is_number, lines[0][1])):
        header = [cell.lower() for cell in lines.pop(0)[1]]
    named = [i for i, cell in enumerate(header) if cell.startswith("wavelength")]
    place = named[0] if named else 0
    values = []
    for number, cells in lines:
        if place >= len(cells) or not _is_number(cells[place]) or (len(cells) > 1 and not named):
            raise InputDataError(
                f"{path}, line {number}: found '{' '.join(cells)}', expected one wavelength, or a "
                "header line that "
                "calls a column 'wavelength'"
            )
        values.append(float(cells[place]))
    return values


def read_bad_bands(path: Path, bands: int) -> tuple[bool, ...]:
    """Read which bands are bad; returns ``bands`` flags, True = bad.

    The file holds either one 0 or 1 per band, 1 = bad, or the numbers of the bad bands, counted from 1,
    with ranges such as 104-113; separated by spaces, commas or lines. It is flags when it has as many
    entries as bands and all are 0 or 1. An ENVI header has its own list, in which 0 is bad. Raises
    InputDataError for anything else, and when every band would be bad.
    """
    if is_header(path):
        flags = bad_bands(read_header(path), bands)
        if flags is None:
            raise InputDataError(f"ENVI header {path} has no list of bad bands ('bbl'): leave it out")
        return flags
    words = [word for line in _lines(path) for word in re.split(r"[,;\s]+", line) if word]
    if len(words) == bands and set(words) <= {"0", "1"}:
        bad = [word == "1" for word in words]
    else:
        bad = [False] * bands
        for word in words:
            match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", word)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
            if not 1 <= first <= last <= bands:
                raise InputDataError(
                    f"{path}: '{word}' is no band of 1 to {bands}; expected band numbers, or {bands} flags 0 or 1"
                )
            bad[first - 1 : last] = [True] * (last - first + 1)
    if all(bad):
        raise InputDataError(f"{path} marks all {bands} bands as bad (1 = bad): at least one must be good")
    return tuple(bad)


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputDataError(f"{path} cannot be read as a text file ({error})") from error
    return [line.partition("#")[0].strip() for line in lines]


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", text) is not None
