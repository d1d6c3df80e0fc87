"""A class map as a file: GeoTIFF with colours and names, GeoTIFF of probabilities.

A map is (H, W) of class values, 0 where nothing is predicted (nodata). Every file is written under a
temporary name beside its place, synced and renamed: it is there whole or not at all, and replaces an older
one in one step.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np

from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.files import replacing
from fastdiffclip.infer.cog import Band, Grid, parse_crs, quiet, write_geotiff
from fastdiffclip.infer.rawfile import Layer, RawFile
from fastdiffclip.infer.tiles import Rect

if TYPE_CHECKING:
    from fastdiffclip.scene.store import ClassInfo

NODATA = 0
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
    return areas_of(np.bincount(class_map.ravel()), classes, Grid(crs_wkt, affine_transform))


def areas_of(counts: np.ndarray, classes: Sequence[ClassInfo], grid: Grid) -> list[dict[str, Any]]:
    """The rows of `class_areas` from the number of pixels of each value, 0 first."""
    counts = np.pad(counts, (0, max(0, max((c.value for c in classes), default=0) + 1 - len(counts))))
    classified = max(1, int(counts[1:].sum()))
    metres, square_metres = metres_per_unit(grid.crs_wkt), None
    if metres is not None and grid.affine_transform is not None:
        a, b, _, d, e, _ = grid.affine_transform[:6]
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


def count_values(raw: RawFile) -> np.ndarray:
    """Number of pixels of each value of a class map in a raw file, 0 first."""
    counts = np.zeros(np.iinfo(raw.dtype).max + 1, np.int64)
    for rect in raw.rects():
        counts += np.bincount(raw.read(rect).ravel(), minlength=len(counts))
    return counts


def map_dtype(classes: Sequence[ClassInfo]) -> str:
    """uint8 where every class value fits, else uint16."""
    return "uint8" if max((item.value for item in classes), default=0) < 256 else "uint16"


def write_class_map(
    path: str | Path,
    class_map: np.ndarray | RawFile,
    *,
    classes: Sequence[ClassInfo],
    crs_wkt: str | None = None,
    affine_transform: Sequence[float] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Path:
    """Write a class map as a tiled, compressed GeoTIFF with overviews on the scene's grid.

    Parameters
    ----------
    class_map : (H, W) uint8 or uint16, 0 = nodata, or a raw file of one band of `map_dtype`; stored in that type.
    classes : colours and names. Names go to the band's tags (``class_1=...``) and, as GDAL's category names,
        to ``<path>.aux.xml``, where QGIS and GDAL look for them.
    crs_wkt, affine_transform : WKT and the six numbers (a, b, c, d, e, f); None for a plain raster.
    tags : further tags of the file, for example the model and the split.

    Raises UsageError for a map of another kind, InputDataError for map values without a class or a CRS that
    cannot be read, ResourceError where the file cannot be written.
    """
    path = Path(path)
    if isinstance(class_map, np.ndarray):
        check_map(class_map, classes)
    highest = max((item.value for item in classes), default=0)
    colours = {NODATA: (0, 0, 0, 0), **{value: (*rgb, 255) for value, rgb in class_colours(classes).items()}}
    band = Band("class", {f"class_{item.value}": item.name for item in classes})
    with replacing(path) as temporary, ExitStack() as stack:
        if isinstance(class_map, np.ndarray):
            layer = Layer(temporary.name, 1, map_dtype(classes))
            class_map = stack.enter_context(_spooled(temporary.parent, layer, class_map.shape, [class_map[None]]))
        write_geotiff(
            temporary, class_map, Grid(crs_wkt, affine_transform), [band], nodata=NODATA, colours=colours, tags=tags
        )
    with replacing(_sidecar(path)) as temporary:
        temporary.write_text(_category_xml(classes, highest), encoding="utf-8")
    return path


def write_probabilities(
    path: str | Path,
    blocks: np.ndarray | Iterable[np.ndarray] | RawFile,
    *,
    height: int,
    width: int,
    classes: Sequence[ClassInfo],
    crs_wkt: str | None = None,
    affine_transform: Sequence[float] | None = None,
) -> Path:
    """Write class probabilities as a float32 GeoTIFF with one band per class, named after it; nodata is NaN.

    ``blocks`` is (K, H, W), a raw file of that shape, or blocks (K, h, W) of consecutive rows from the top, so that a
    scene never has to be held at once; K is the number of classes. Raises UsageError where the blocks do not make up
    K x H x W, otherwise as `write_class_map`.
    """
    bands = [Band(item.name, {"class_value": str(item.value)}) for item in classes]
    return _write_floats(Path(path), blocks, (height, width), bands, Grid(crs_wkt, affine_transform))


def write_confidence(path: str | Path, raw: RawFile, grid: Grid) -> Path:
    """Write the largest class probability of each pixel as a float32 GeoTIFF of one band; nodata is NaN."""
    return _write_floats(Path(path), raw, (raw.height, raw.width), [Band("confidence")], grid)


def _write_floats(
    path: Path,
    blocks: np.ndarray | Iterable[np.ndarray] | RawFile,
    shape: tuple[int, int],
    bands: Sequence[Band],
    grid: Grid,
) -> Path:
    with replacing(path) as temporary, ExitStack() as stack:
        if not isinstance(blocks, RawFile):
            rows = [blocks] if isinstance(blocks, np.ndarray) else blocks
            layer = Layer(temporary.name, len(bands), "float32")
            blocks = stack.enter_context(_spooled(temporary.parent, layer, shape, rows))
        write_geotiff(temporary, blocks, grid, bands, nodata=float("nan"))
    _sidecar(path).unlink(missing_ok=True)  # an older file's statistics
    return path


@contextmanager
def _spooled(folder: Path, layer: Layer, shape: Sequence[int], blocks: Iterable[np.ndarray]) -> Iterator[RawFile]:
    """A raw file of blocks (bands, h, width) of consecutive rows."""
    (height, width), done = shape, 0
    with RawFile(folder, layer, height, width) as raw:
        for block in blocks:
            if block.ndim != 3 or block.shape[::2] != (layer.bands, width) or done + block.shape[1] > height:
                whole = layer.bands, height, width
                raise UsageError(f"a block of probabilities is {block.shape} at row {done} of a raster of {whole}")
            raw.write(Rect(done, done + block.shape[1], 0, width), block)
            done += block.shape[1]
        if done != height:
            raise UsageError(f"the blocks of probabilities hold {done} rows, the raster has {height}")
        yield raw


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
        with quiet(), rasterio.open(path) as raster:
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


def metres_per_unit(crs_wkt: str | None) -> float | None:
    """Length of one map unit; None without a CRS, or for one of degrees."""
    if crs_wkt is None:
        return None
    crs = parse_crs(crs_wkt)
    return float(crs.linear_units_factor[1]) if crs.is_projected else None


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
