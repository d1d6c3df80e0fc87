"""A class map as a file: GeoTIFF with colours and names, GeoTIFF of probabilities.

A map is (H, W) of class values, 0 where nothing is predicted (nodata). Every file is written under a
temporary name beside its place, synced and renamed: it is there whole or not at all, and replaces an older
one in one step.
"""

from __future__ import annotations

import colorsys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape
from zlib import crc32

import numpy as np

from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.files import replacing

if TYPE_CHECKING:
    from fastdiffclip.scene.store import ClassInfo

NODATA = 0
TILE = 256
# For classes whose table gives no colour; told apart side by side and in small patches.
PALETTE = (
    0x2F7D4F, 0xD9A441, 0x4C7FB8, 0xC8553D, 0x8F6FB3, 0x7CBF5F, 0x8A5A3C, 0x3FB1B5, 0xE58FB1, 0x6B7280,
    0xE6D35C, 0x1F4E79, 0xB03A78, 0xA3B18A, 0xF08A3C, 0x4A3F6B, 0x9FD3EA, 0x5F6B1E, 0xD7C3A5, 0x2B2F36,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ClassMap:
    """A class map read from a file; ``values`` is (H, W) uint16 with 0 = nodata."""

    values: np.ndarray
    nodata: float | None  # as the file declares it; already turned into 0 in `values`
    names: dict[int, str]  # class value -> name, from the tags that `write_class_map` leaves; may be empty
    crs_wkt: str | None
    affine_transform: tuple[float, ...] | None


def class_colours(classes: Sequence[ClassInfo]) -> dict[int, tuple[int, int, int]]:
    """Return the 8-bit RGB colour of every class value, chosen here where the table has none."""
    colours = {}
    for place, item in enumerate(classes):
        if item.colour is not None:
            red, green, blue = (int(part) for part in item.colour)
        elif place < len(PALETTE):
            red, green, blue = PALETTE[place].to_bytes(3, "big")
        else:
            hue = 0.618034 * place % 1.0
            shade = colorsys.hls_to_rgb(hue, (0.40, 0.62)[place % 2], 0.5)
            red, green, blue = (round(255 * part) for part in shade)
        colours[item.value] = (red, green, blue)
    return colours


def class_areas(
    class_map: np.ndarray,
    classes: Sequence[ClassInfo],
    *,
    crs_wkt: str | None = None,
    affine_transform: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """Count what a map holds: one row per class, in the order of ``classes``.

    Rows are ``{"value", "name", "pixels", "share", "hectares"}``; ``share`` is percent of the classified
    pixels; ``hectares`` is None unless the map has a transform and a projected CRS (degrees have no fixed
    area).
    """
    counts = np.bincount(class_map.ravel(), minlength=max((c.value for c in classes), default=0) + 1)
    classified = max(1, int(counts[1:].sum()))
    metres, square_metres = metres_per_unit(crs_wkt), None
    if metres is not None and affine_transform is not None:
        a, b, _, d, e, _ = affine_transform[:6]
        square_metres = abs(a * e - b * d) * metres**2
    return [
        {
            "value": item.value,
            "name": item.name,
            "pixels": int(counts[item.value]),
            "share": 100.0 * int(counts[item.value]) / classified,
            "hectares": None if square_metres is None else int(counts[item.value]) * square_metres / 1e4,
        }
        for item in classes
    ]


def write_class_map(
    path: str | Path,
    class_map: np.ndarray,
    *,
    classes: Sequence[ClassInfo],
    crs_wkt: str | None = None,
    affine_transform: Sequence[float] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Path:
    """Write a class map as a tiled, compressed GeoTIFF on the scene's grid.

    Parameters
    ----------
    class_map : (H, W) uint8 or uint16, 0 = nodata; stored as uint8 where every class value fits.
    classes : colours and names. Names go to the band's tags (``class_1=...``) and, as GDAL's category names,
        to ``<path>.aux.xml``, where QGIS and GDAL look for them.
    crs_wkt, affine_transform : WKT and the six numbers (a, b, c, d, e, f); None for a plain raster.
    tags : further tags of the file, for example the model and the split.

    Raises UsageError for a map of another kind, InputDataError for map values without a class or a CRS that
    cannot be read, ResourceError where the file cannot be written.
    """
    path = Path(path)
    check_map(class_map, classes)
    highest = max((item.value for item in classes), default=0)
    stored = class_map.astype(np.uint8 if highest < 256 else np.uint16, copy=False)
    colours = {NODATA: (0, 0, 0, 0), **{value: (*rgb, 255) for value, rgb in class_colours(classes).items()}}
    profile = _profile((1, *stored.shape), stored.dtype.name, crs_wkt, affine_transform, NODATA)
    with replacing(path) as temporary:
        with _create(temporary, profile) as raster:
            written = _write_rows(raster, iter([stored[None]]), (1, *stored.shape))
            raster.write_colormap(1, colours)
            raster.set_band_description(1, "class")
            raster.update_tags(**(tags or {}))
            raster.update_tags(1, **{f"class_{item.value}": item.name for item in classes})
        _check_rows(temporary, written)
    with replacing(_sidecar(path)) as temporary:
        temporary.write_text(_category_xml(classes, highest), encoding="utf-8")
    return path


def write_probabilities(
    path: str | Path,
    blocks: np.ndarray | Iterable[np.ndarray],
    *,
    height: int,
    width: int,
    classes: Sequence[ClassInfo],
    crs_wkt: str | None = None,
    affine_transform: Sequence[float] | None = None,
) -> Path:
    """Write class probabilities as a float32 GeoTIFF with one band per class, named after it; nodata is NaN.

    ``blocks`` is (K, H, W), or blocks (K, h, W) of consecutive rows from the top, so that a scene never has
    to be held at once; K is the number of classes. Raises UsageError where the blocks do not make up K x H x
    W, otherwise as `write_class_map`.
    """
    path = Path(path)
    rows = iter([blocks] if isinstance(blocks, np.ndarray) else blocks)
    profile = _profile((len(classes), height, width), "float32", crs_wkt, affine_transform, np.nan)
    with replacing(path) as temporary:
        with _create(temporary, {**profile, "predictor": 3}) as raster:
            for band, item in enumerate(classes, start=1):
                raster.set_band_description(band, item.name)
                raster.update_tags(band, class_value=str(item.value))
            written = _write_rows(raster, rows, (len(classes), height, width))
        _check_rows(temporary, written)
    _sidecar(path).unlink(missing_ok=True)  # an older file's statistics
    return path


def read_class_map(path: str | Path) -> ClassMap:
    """Read a one-band raster of class values, of this project or another.

    The file's nodata value, and 0, become 0. Raises InputDataError for a file that is missing, unreadable,
    has several bands, or holds other values than whole numbers from 0 to 65535.
    """
    import rasterio

    path = Path(path)
    if not path.is_file():
        raise InputDataError(f"there is no class map {path}; give a one-band raster of class values")
    try:
        with _quiet(), rasterio.open(path) as raster:
            if raster.count != 1:
                raise InputDataError(f"{path} has {raster.count} bands; a class map has one band of class values")
            stored, nodata, tags = raster.read(1), raster.nodata, raster.tags(1)
            crs = None if raster.crs is None else raster.crs.to_wkt()
            transform = None if raster.transform.is_identity else tuple(raster.transform)[:6]
    except rasterio.errors.RasterioError as error:
        raise InputDataError(f"{path} cannot be read as a raster ({error}); give a GeoTIFF class map") from error
    empty = np.isnan(stored) if stored.dtype.kind == "f" else np.zeros(stored.shape, bool)
    if nodata is not None and not np.isnan(nodata):
        empty |= stored == nodata
    stored = np.where(empty, NODATA, stored)
    if stored.min() < 0 or stored.max() > 65535 or (stored.dtype.kind == "f" and (stored % 1).any()):
        raise InputDataError(
            f"{path} holds values from {stored.min()} to {stored.max()}; class values are whole numbers, 0 to 65535"
        )
    names = {int(key[6:]): name for key, name in tags.items() if key.startswith("class_") and key[6:].isdigit()}
    return ClassMap(stored.astype(np.uint16), nodata, names, crs, transform)


def check_map(class_map: np.ndarray, classes: Sequence[ClassInfo]) -> None:
    if class_map.ndim != 2 or class_map.dtype not in (np.uint8, np.uint16) or class_map.size == 0:
        raise UsageError(
            f"a class map is (height, width) of uint8 or uint16, got {class_map.shape} of {class_map.dtype}"
        )
    counts = np.bincount(class_map.ravel())
    strangers = set(np.flatnonzero(counts).tolist()) - {item.value for item in classes} - {NODATA}
    if strangers:
        raise InputDataError(
            f"the map holds the values {sorted(strangers)[:10]}, which no class has; "
            f"the classes are {[item.value for item in classes]}"
        )


def _write_rows(raster: Any, blocks: Iterator[np.ndarray], shape: tuple[int, int, int]) -> list[tuple[Any, int]]:
    """Write (bands, h, width) blocks from the top; return the window and the CRC-32 of each."""
    from rasterio.windows import Window

    bands, height, width = shape
    done, written = 0, []
    for block in blocks:
        if block.ndim != 3 or block.shape[::2] != (bands, width) or done + block.shape[1] > height:
            raise UsageError(f"a block of probabilities is {block.shape} at row {done} of a raster of {shape}")
        block = np.ascontiguousarray(block, dtype=raster.dtypes[0])
        window = Window(0, done, width, block.shape[1])
        raster.write(block, window=window)
        written.append((window, crc32(block.data)))
        done += block.shape[1]
    if done != height:
        raise UsageError(f"the blocks of probabilities hold {done} rows, the raster has {height}")
    return written


def _check_rows(path: Path, written: list[tuple[Any, int]]) -> None:
    """Raise OSError unless every block reads back: GDAL only logs a failure to flush the last rows."""
    import rasterio

    with _quiet(), rasterio.open(path) as raster:
        if any(crc32(raster.read(window=window).data) != crc for window, crc in written):
            raise OSError("what was written reads back differently, the disk may be full")


def _profile(
    shape: tuple[int, ...],
    dtype: str,
    crs_wkt: str | None,
    affine_transform: Sequence[float] | None,
    nodata: float,
) -> dict[str, Any]:
    from affine import Affine

    bands, height, width = shape
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "height": height,
        "width": width,
        "count": bands,
        "dtype": dtype,
    }
    profile |= {"nodata": nodata, "compress": "deflate", "bigtiff": "if_safer"}
    if min(height, width) >= TILE:
        profile |= {"tiled": True, "blockxsize": TILE, "blockysize": TILE}
    if crs_wkt is not None:
        profile["crs"] = _parse_crs(crs_wkt)
    if affine_transform is not None:
        profile["transform"] = Affine(*affine_transform[:6])
    return profile


def _parse_crs(wkt: str) -> Any:
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    try:
        return CRS.from_wkt(wkt)
    except CRSError as error:
        raise InputDataError(f"the scene's CRS cannot be read ({error}); give it as WKT") from error


def metres_per_unit(crs_wkt: str | None) -> float | None:
    """Length of one map unit; None without a CRS, or for one of degrees."""
    if crs_wkt is None:
        return None
    crs = _parse_crs(crs_wkt)
    return float(crs.linear_units_factor[1]) if crs.is_projected else None


def _create(path: Path, profile: Mapping[str, Any]) -> Any:
    import rasterio

    with _quiet():
        return rasterio.open(path, "w", **profile)


@contextmanager
def _quiet() -> Iterator[None]:
    """A scene without georeference is legitimate: no warning for each file."""
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".aux.xml")


def _category_xml(classes: Sequence[ClassInfo], highest: int) -> str:
    names = {item.value: item.name for item in classes} | {NODATA: "no data"}
    lines = [f"      <Category>{escape(names.get(value, ''))}</Category>" for value in range(highest + 1)]
    body = "\n".join(lines)
    return (
        '<PAMDataset>\n  <PAMRasterBand band="1">\n    <CategoryNames>\n'
        f"{body}\n    </CategoryNames>\n  </PAMRasterBand>\n</PAMDataset>\n"
    )
