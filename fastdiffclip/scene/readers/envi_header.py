"""ENVI headers: the text, and what it says about bands and place.

The header is a text file that begins with ENVI and goes on with ``key = value`` or ``key = {a, b, ...}`` over
several lines; keys as in "ENVI Header Files" of the ENVI documentation. No path in it is ever followed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers.spectral import guessed_factor, in_nanometres, nanometres_per_unit

_SIZE_LIMIT = 16 * 2**20
_NO_UNIT = {"", "unknown"}
_UTM_BASE = {  # datum -> EPSG codes of zone 0, north and south
    "WGS-84": (32600, 32700), "WGS-72": (32200, 32300), "North America 1983": (26900, None),
    "North America 1927": (26700, None), "European 1950": (23000, None), "ETRS89": (25800, None),
}  # fmt: skip
_GEOGRAPHIC = {
    "WGS-84": 4326, "WGS-72": 4322, "North America 1983": 4269, "North America 1927": 4267,
    "European 1950": 4230, "ETRS89": 4258,
}  # fmt: skip


@dataclass(frozen=True)
class EnviHeader:
    """The fields of a header by their lower-case key; lists keep their text without the braces."""

    path: Path
    fields: dict[str, str]

    def integer(self, key: str, default: int | None = None, least: int = 0) -> int:
        """Return a whole number of at least ``least``; raises InputDataError for anything else."""
        text = self.fields.get(key)
        if text is None and default is not None:
            return default
        if text is None or not re.fullmatch(r"[+-]?\d{1,25}", text) or int(text) < least:
            found = "has no" if text is None else "has"
            raise InputDataError(
                f"ENVI header {self.path} {found} '{key}{'' if text is None else f' = {text[:40]}'}': "
                f"expected a whole number of at least {least}"
            )
        return int(text)

    def words(self, key: str) -> list[str] | None:
        """Return the entries of a list, or None where the header has no such key."""
        text = self.fields.get(key)
        return None if text is None else [word.strip() for word in text.split(",")]

    def numbers(self, key: str, count: int) -> tuple[float, ...] | None:
        """Return a list of ``count`` finite numbers, or None where the header has no such key."""
        words = self.words(key)
        if words is None or words == [""]:
            return None
        if len(words) > 1 and not words[-1]:  # a comma before the closing brace
            words.pop()
        try:
            values = tuple(float(word) for word in words)
        except ValueError:
            values = ()
        if len(values) != count or not all(map(math.isfinite, values)):
            raise InputDataError(
                f"ENVI header {self.path}: '{key}' has {len(words)} entries, expected {count} numbers: correct it"
            )
        return values


def is_header(path: Path) -> bool:
    """Say whether a file begins as an ENVI header does."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"ENVI"
    except OSError:
        return False


def read_header(path: Path) -> EnviHeader:
    """Read an ENVI header; raises InputDataError when it is none, or a list has no end."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_SIZE_LIMIT + 1)
    except OSError as error:
        raise InputDataError(f"ENVI header {path} cannot be read ({error.strerror})") from error
    if len(data) > _SIZE_LIMIT or data[:4] != b"ENVI":
        raise InputDataError(f"{path} is not an ENVI header: expected a text file whose first line is ENVI")
    fields: dict[str, str] = {}
    lines = iter(data.decode("utf-8", "replace").splitlines())
    for line in lines:
        key, equals, value = line.partition("=")
        if not equals or line.lstrip().startswith(";"):
            continue
        value = value.strip()
        if value.startswith("{"):
            parts = [value[1:]]
            while "}" not in parts[-1]:
                following = next(lines, None)
                if following is None:
                    raise InputDataError(
                        f"ENVI header {path}: the list '{key.strip()}' has no closing brace, is the file truncated?"
                    )
                parts.append(following)
            value = "\n".join(parts).partition("}")[0].strip()
        fields[" ".join(key.lower().split())] = value
    return EnviHeader(path, fields)


def wavelengths(header: EnviHeader, bands: int) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return wavelengths and widths (FWHM) in nm, None where there are none.

    Without a unit they are micrometres when all wavelengths are below 100. Raises InputDataError for a unit
    that is no length, such as wavenumbers.
    """
    centres, widths = header.numbers("wavelength", bands), header.numbers("fwhm", bands)
    if centres is None:
        return None, None
    unit = header.fields.get("wavelength units", "")
    factor = guessed_factor(centres) if unit.lower() in _NO_UNIT else nanometres_per_unit(unit)
    if factor is None:
        raise InputDataError(
            f"ENVI header {header.path} gives wavelengths in '{unit}', expected nanometers or micrometers: convert "
            "them, or remove 'wavelength' from the header and give --wavelengths FILE"
        )
    return in_nanometres(centres, factor), None if widths is None else in_nanometres(widths, factor)


def bad_bands(header: EnviHeader, bands: int) -> tuple[bool, ...] | None:
    """Return which bands are bad; the header's ``bbl`` has 1 for good and 0 for bad."""
    flags = header.numbers("bbl", bands)
    if flags is None:
        return None
    if not any(flags):
        raise InputDataError(f"ENVI header {header.path}: 'bbl' marks all {bands} bands as bad (0), correct the header")
    return tuple(flag == 0 for flag in flags)


def placement(header: EnviHeader) -> tuple[str | None, tuple[float, ...] | None, list[str]]:
    """Return CRS as WKT2, affine transform, and warnings.

    ``map info`` is {projection, x and y of a pixel counted from 1 (1.5 = its centre), that place's easting and
    northing, pixel width and height, ..., rotation=degrees counter-clockwise}; its CRS is ``coordinate system
    string`` or, without that, UTM and geographic coordinates on a known datum.
    """
    info = header.words("map info")
    if info is None:
        return None, None, []
    try:
        column, row, easting, northing, width, height = (float(word) for word in info[1:7])
        rotation = next((float(w.split("=")[1]) for w in info if w.lower().startswith("rotation=")), 0.0)
    except ValueError:
        column = row = easting = northing = width = height = rotation = math.nan
    if not all(map(math.isfinite, (column, row, easting, northing, rotation))) or not (width > 0 and height > 0):
        raise InputDataError(
            f"ENVI header {header.path}: 'map info' must give a projection, six numbers (reference pixel, its "
            "coordinates, pixel size) and what follows: correct it or remove it"
        )
    warnings = []
    if abs(rotation) == 180:
        warnings.append(f"{header.path}: rotation=180 is taken as an image turned by 180 degrees, not a mirrored one")
    crs_wkt, note = _crs(header, info)
    if note:
        warnings.append(f"{header.path}: {note}")
    cos, sin = _cos_sin(rotation)
    a, b, d, e = cos * width, sin * width, sin * height, -cos * height
    x, y = column - 1, row - 1
    transform = (a, b, easting - a * x - b * y, d, e, northing - d * x - e * y)
    if info[0].lower() == "arbitrary" and transform in ((1, 0, 0, 0, -1, 0), (1, 0, 1, 0, -1, 1)):
        return None, None, warnings  # plain pixel numbers are no place
    return crs_wkt, transform, warnings


def _cos_sin(degrees: float) -> tuple[float, float]:
    """Cosine and sine, exact for quarter turns."""
    exact = {0.0: (1.0, 0.0), 90.0: (0.0, 1.0), 180.0: (-1.0, 0.0), 270.0: (0.0, -1.0)}.get(degrees % 360)
    return exact or (math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))


def _crs(header: EnviHeader, info: list[str]) -> tuple[str | None, str | None]:
    """Return the CRS as WKT2 and, where it stays unknown, why."""
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    wkt = header.fields.get("coordinate system string")
    if wkt:
        try:
            crs = CRS.from_wkt(wkt, morph_from_esri_dialect=True)
        except CRSError as error:
            raise InputDataError(
                f"ENVI header {header.path}: 'coordinate system string' is no WKT ({error}): correct or remove it"
            ) from error
        known = crs.to_epsg(confidence_threshold=90)
        return (CRS.from_epsg(known) if known else crs).to_wkt(version="WKT2_2019"), None
    if info[0].lower() == "arbitrary":
        return None, None
    try:
        return CRS.from_epsg(_epsg(info)).to_wkt(version="WKT2_2019"), None
    except CRSError:
        return None, (
            f"the CRS of 'map info = {{{', '.join(info)}}}' is not known and left out: add a 'coordinate system string'"
        )


def _epsg(info: list[str]) -> int:
    """EPSG code of UTM on a datum in metres, or of geographic coordinates in degrees; 0 for all else."""
    units = next((word.split("=")[1].strip().lower() for word in info if word.lower().startswith("units=")), "")
    plain = [word for word in info if "=" not in word]
    if info[0].upper() == "UTM" and len(plain) >= 10 and units in ("", "meters", "metres"):
        zone, (north, south) = plain[7], _UTM_BASE.get(plain[9], (None, None))
        base = south if plain[8].lower() == "south" else north
        return base + int(zone) if base and re.fullmatch(r"[1-9]|[1-5]\d|60", zone) else 0
    if info[0].lower().startswith("geographic") and len(plain) >= 8 and units in ("", "degrees"):
        return _GEOGRAPHIC.get(plain[7], 0)
    return 0
