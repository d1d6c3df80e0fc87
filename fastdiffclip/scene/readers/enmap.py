"""EnMAP products of level L2A (and L1C, which has the same layout): ``*-METADATA.XML`` and ``*-SPECTRAL_IMAGE.TIF``.

The layout is that of the product specification EN-PCV-ICD-2009-2: centre, width, gain and offset of each band under
``specific/bandCharacterisation``, the value of empty pixels in ``specific/backgroundValue``, the channels in use in
``expectedChannelsList``, and quality rasters beside the image. Files are found by their names, never by the names
that the metadata hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from fastdiffclip.errors import InputDataError, nearest
from fastdiffclip.scene.readers.geotiff import open_geotiff
from fastdiffclip.scene.readers.source import RasterSource
from fastdiffclip.scene.readers.xml_files import read_xml

ReadMask = Callable[[slice], np.ndarray]
QUALITY = ("cloud", "cloudshadow", "cirrus", "haze", "snow")
_CLASSES, _BACKGROUND = "QL_QUALITY_CLASSES", 3
_NAME = re.compile(r"(.+)-(METADATA|SPECTRAL_IMAGE|QL_QUALITY_[A-Z]+)(_COG)?\.(XML|TIFF?)", re.IGNORECASE)
_LEVELS = ("L2A", "L1C")
_SAMPLED_ROWS = 32


def is_enmap(path: Path) -> bool:
    """Say whether a file is an EnMAP metadata file, or an EnMAP image with one beside it, by its name."""
    parts = _parts(path)
    return path in (parts.get("METADATA"), parts.get("SPECTRAL_IMAGE")) and "METADATA" in parts


def open_enmap(path: Path, variable: str | None) -> RasterSource:
    """Open an EnMAP product by its metadata file or its image.

    ``variable`` names quality masks, separated by commas, whose flagged pixels become invalid: cloud, cloudshadow,
    cirrus, haze, snow. Pixels outside the swath are always invalid. A band is bad where the metadata do not expect it
    or 32 rows across the image hold no data in it. Raises InputDataError for another product, and where metadata and
    image do not fit.
    """
    parts = _parts(path)
    missing = [part for part in ("METADATA", "SPECTRAL_IMAGE") if part not in parts]
    if missing:
        raise InputDataError(
            f"{path} is no EnMAP product: expected files called ...-METADATA.XML and ...-SPECTRAL_IMAGE.TIF side by "
            f"side, and there is no {' and no '.join(missing)}"
        )
    root = read_xml(parts["METADATA"])
    level = (root.findtext("base/level") or "").strip()
    if level not in _LEVELS:
        raise InputDataError(f"{parts['METADATA']} is of level '{level[:20]}', expected an EnMAP product of level L2A")
    with ExitStack() as stack:
        source = stack.enter_context(open_geotiff(parts["SPECTRAL_IMAGE"], None))
        source.nodata = _background(parts["METADATA"], root, source.nodata)
        described = _describe(parts["METADATA"], root, source)
        masks = _quality(parts, _chosen(path, variable), source, stack)
        companions = (parts["METADATA"], *(mask.path for mask in masks))
        return replace(
            described,
            read_mask=_valid(source.read_mask, masks),
            companions=companions,
            close=stack.pop_all().close,
        )


def _parts(path: Path) -> dict[str, Path]:
    """Return the files of the product that ``path`` belongs to, by part; empty where its name is none of EnMAP's."""
    match = _NAME.fullmatch(path.name)
    found: dict[str, Path] = {}
    for entry in sorted(path.parent.iterdir()) if match else ():
        other = _NAME.fullmatch(entry.name)
        if match and other and other[1] == match[1] and entry.is_file():
            part = other[2].upper()
            if (part == "METADATA") == (other[4].upper() == "XML"):
                found.setdefault(part, path if entry.name == path.name else entry)
    return found


def _chosen(path: Path, variable: str | None) -> list[str]:
    names = variable.lower().split(",") if variable else []
    for name in names:
        if name not in QUALITY:
            raise InputDataError(
                f"{path} has no quality mask '{name}'{nearest(name, QUALITY)}: leave it out or name some of "
                f"{', '.join(QUALITY)}"
            )
    return names


def _background(metadata: Path, root: Element, of_image: float | None) -> float | None:
    text = root.findtext("specific/backgroundValue")
    return of_image if text is None else _number(metadata, "specific/backgroundValue", text)


def _describe(metadata: Path, root: Element, source: RasterSource) -> RasterSource:
    """Return the image with what the metadata say of its bands."""
    bands = root.findall("specific/bandCharacterisation/bandID")
    if len(bands) != source.bands:
        raise InputDataError(
            f"{source.path} has {source.bands} bands and {metadata.name} describes {len(bands)}: they do not belong "
            "together, download the product again"
        )
    columns = [
        np.array([_number(metadata, tag, band.findtext(tag)) for band in bands])
        for tag in ("wavelengthCenterOfBand", "FWHMOfBand", "GainOfBand", "OffsetOfBand")
    ]
    gains, offsets = columns[2:]
    if max(np.abs(columns[2:]).max(), 0.0) > np.finfo(np.float32).max:
        raise InputDataError(f"{metadata} has gains or offsets beyond any reflectance: download it again")
    described = replace(
        source,
        wavelengths=tuple(columns[0].tolist()),
        fwhm=tuple(columns[1].tolist()),
        bad_bands=_bad_bands(metadata, root, source),
    )
    if len(set(zip(gains, offsets, strict=True))) == 1:
        return replace(described, scale=float(gains[0]), offset=float(offsets[0]))
    physical = _physical(source, gains.astype(np.float32), offsets.astype(np.float32))
    return replace(described, dtype=np.dtype(np.float32), nodata=None, scale=1.0, offset=0.0, read_rows=physical)


def _number(metadata: Path, tag: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputDataError(f"{metadata} has '{(text or '')[:40]}' as {tag}, expected a number: download it again")
    return value


def _physical(source: RasterSource, gains: np.ndarray, offsets: np.ndarray) -> Callable[[slice], np.ndarray]:
    """Return a reader of float32 physical values, NaN where all bands are empty."""

    def read(rows: slice) -> np.ndarray:
        stored = source.read_rows(rows)
        values = stored * gains + offsets
        if source.nodata is not None:
            values[(stored == source.nodata).all(-1)] = np.nan
        return np.asarray(values, np.float32)

    return read


def _bad_bands(metadata: Path, root: Element, source: RasterSource) -> tuple[bool, ...]:
    expected: set[int] = set()
    for detector in ("vnir", "swir"):
        listed = root.findtext(f"specific/{detector}ProductQuality/expectedChannelsList") or ""
        if not re.fullmatch(r"[\d,\s]*", listed):
            raise InputDataError(f"{metadata} has channels '{listed[:40]}', expected numbers: download it again")
        expected.update(int(word) for word in re.findall(r"\d{1,9}", listed))
    bad = np.array([bool(expected) and band not in expected for band in range(1, source.bands + 1)])
    if source.nodata is not None:
        bad |= ~_bands_with_data(source, source.nodata)
    if bad.all():
        raise InputDataError(f"{source.path} has no band with data (every pixel is {source.nodata}): nothing to read")
    return tuple(bad.tolist())


def _bands_with_data(source: RasterSource, nodata: float) -> np.ndarray:
    held = np.zeros(source.bands, bool)
    for row in np.unique(np.linspace(0, source.height - 1, _SAMPLED_ROWS).astype(int)).tolist():
        held |= (source.read_rows(slice(row, row + 1)) != nodata).any((0, 1))
    return held if held.any() else ~held  # an image that is empty throughout is refused later, as any other


def _quality(parts: dict[str, Path], names: list[str], source: RasterSource, stack: ExitStack) -> list[RasterSource]:
    """Open the rasters that make pixels invalid: the background wherever it is delivered, and the chosen masks."""
    wanted = [_CLASSES] if _CLASSES in parts else []
    wanted += [f"QL_QUALITY_{name.upper()}" for name in names]
    opened = []
    for part in wanted:
        if part not in parts:
            raise InputDataError(f"{source.path} has no {part}.TIF beside it: leave out that mask or download it")
        mask = stack.enter_context(open_geotiff(parts[part], None))
        if (mask.height, mask.width, mask.bands) != (source.height, source.width, 1):
            raise InputDataError(
                f"{mask.path} is {mask.height} x {mask.width} pixels with {mask.bands} bands, expected "
                f"{source.height} x {source.width} with one, as the image"
            )
        opened.append(mask)
    return opened


def _valid(
    own: Callable[[slice], np.ndarray] | None, masks: list[RasterSource]
) -> Callable[[slice], np.ndarray] | None:
    if own is None and not masks:
        return None

    def read(rows: slice) -> np.ndarray:
        valid = [] if own is None else [own(rows)]
        for mask in masks:
            flags = mask.read_rows(rows)[..., 0]
            valid.append(flags != _BACKGROUND if _CLASSES in mask.path.name.upper() else flags == 0)
        return np.logical_and.reduce(valid)

    return read
