"""From a raw file to a GeoTIFF in one sequential pass: tiled, compressed, with overviews, cloud-optimised."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from fastdiffclip.errors import InputDataError
from fastdiffclip.infer.rawfile import RawFile
from fastdiffclip.infer.tiles import Rect

CACHE_BYTES = 16 << 20  # of GDAL, whose own default is a share of the machine's memory
_GDAL_TYPES = {"uint8": "Byte", "uint16": "UInt16", "float32": "Float32"}


@dataclass(frozen=True)
class Grid:
    """Where a raster lies: WKT, and the six numbers (a, b, c, d, e, f); None for a plain raster."""

    crs_wkt: str | None = None
    affine_transform: Sequence[float] | None = None


@dataclass(frozen=True)
class Band:
    """Name and tags of one band."""

    description: str
    tags: Mapping[str, str] = field(default_factory=dict)


def write_geotiff(
    path: Path,
    raw: RawFile,
    grid: Grid,
    bands: Sequence[Band],
    *,
    nodata: float,
    colours: Mapping[int, tuple[int, int, int, int]] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write a raw file as a GeoTIFF at ``path``, beside which GDAL may leave temporary files if it fails.

    Overviews take the commonest class where there are ``colours`` and the nearest value elsewhere; they are made here
    because GDAL's own take memory that grows with the raster. Where GDAL has no COG driver, its GeoTIFF driver does it.

    Raises:
        InputDataError: the CRS cannot be read.
        OSError: the file cannot be written, or reads back differently: GDAL only logs that the disk is full.
    """
    import rasterio.shutil
    from rasterio._err import CPLE_BaseError  # what copying raises, which rasterio has under no public name
    from rasterio.errors import RasterioError

    # All bands of a tile are in memory together.
    side = 512 if raw.layer.bands == 1 else 256
    options = {"COMPRESS": "DEFLATE", "BIGTIFF": "IF_SAFER"}
    predicted = raw.dtype.kind == "f"
    try:
        with quiet(), bounded_cache() as env, ExitStack() as stack:
            smaller = _overviews(raw, side, colours is not None, stack)
            source = _described(raw, _virtual(raw, grid, bands, nodata, colours, tags or {}, smaller), stack)
            for level in smaller:
                _described(level, _virtual(level, Grid(), bands, nodata, None, {}, []), stack)
            if "COG" in env.drivers():
                options |= {"BLOCKSIZE": str(side), "OVERVIEWS": "FORCE_USE_EXISTING"}
                options |= {"PREDICTOR": "FLOATING_POINT"} if predicted else {}
                rasterio.shutil.copy(source, path, driver="COG", **options)
            else:
                options |= {"TILED": "YES", "BLOCKXSIZE": str(side), "BLOCKYSIZE": str(side)}
                options |= {"COPY_SRC_OVERVIEWS": "YES"} | ({"PREDICTOR": "3"} if predicted else {})
                rasterio.shutil.copy(source, path, driver="GTiff", **options)
            _check(path, raw)
    except (RasterioError, CPLE_BaseError) as error:
        raise OSError(str(error)) from error


def _described(raw: RawFile, text: str, stack: ExitStack) -> Path:
    """Write the description of a raw file beside it, until the stack is left."""
    path = raw.path.with_suffix(".vrt")
    stack.callback(path.unlink, missing_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _overviews(raw: RawFile, side: int, classes: bool, stack: ExitStack) -> list[RawFile]:
    """Raw files of half the size each, beside the first one, until one tile holds all; removed with the stack."""
    found: list[RawFile] = []
    last = raw
    while max(last.height, last.width) > side:
        layer = replace(raw.layer, name=f"{raw.layer.name}.{len(found) + 1}")
        size = -(-last.height // 2), -(-last.width // 2)
        stack.callback((raw.path.parent / f"{layer.name}.raw").unlink, missing_ok=True)
        half = stack.enter_context(RawFile(raw.path.parent, layer, *size))
        for rect in last.rects(bytes_at_once=2 << 20):
            part = (commonest_of_four if classes else nearest_of_four)(last.read(rect))
            top, left = rect.top // 2, rect.left // 2
            half.write(Rect(top, top + part.shape[1], left, left + part.shape[2]), part)
        found.append(half)
        last = half
    return found


def nearest_of_four(values: np.ndarray) -> np.ndarray:
    """Every second row and column of (bands, h, w)."""
    return values[:, ::2, ::2]


def commonest_of_four(values: np.ndarray) -> np.ndarray:
    """The commonest class of each 2 x 2 pixels of (bands, h, w), unsigned, 0 = nodata, which never counts.

    Ties go to the smaller value; beyond the edge is nodata.
    """
    bands, height, width = values.shape
    # With 1 taken off, nodata wraps around to the largest value and is sorted last.
    nothing = values.dtype.type(np.iinfo(values.dtype).max)
    shifted = np.pad(values - values.dtype.type(1), ((0, 0), (0, height % 2), (0, width % 2)), constant_values=nothing)
    four = np.stack([shifted[:, y::2, x::2] for y in (0, 1) for x in (0, 1)])
    four.sort(axis=0)
    first, second, third, fourth = four
    best = first
    for one, other in ((third, fourth), (second, third), (first, second)):
        best = np.where((one == other) & (one != nothing), one, best)
    return best + values.dtype.type(1)


def _check(path: Path, raw: RawFile) -> None:
    import rasterio
    from rasterio.windows import Window

    with rasterio.open(path) as raster:
        for rect in raw.rects(512 if raw.layer.bands == 1 else 256):
            found = raster.read(window=Window(rect.left, rect.top, rect.width, rect.height))
            if not np.array_equal(found.view(np.uint8), raw.read(rect).view(np.uint8)):
                raise OSError("what was written reads back differently, the disk may be full")


def _virtual(
    raw: RawFile,
    grid: Grid,
    bands: Sequence[Band],
    nodata: float,
    colours: Mapping[int, tuple[int, int, int, int]] | None,
    tags: Mapping[str, str],
    overviews: Sequence[RawFile],
) -> str:
    """The raw file as GDAL's virtual format describes it, with all that the GeoTIFF shall say."""
    size, plane = raw.dtype.itemsize, raw.height * raw.width
    parts = [f'<VRTDataset rasterXSize="{raw.width}" rasterYSize="{raw.height}">']
    if grid.crs_wkt is not None:
        parts.append(f"<SRS>{escape(parse_crs(grid.crs_wkt).to_wkt())}</SRS>")
    if grid.affine_transform is not None:
        a, b, c, d, e, f = map(float, grid.affine_transform[:6])
        parts.append(f"<GeoTransform>{c!r}, {a!r}, {b!r}, {f!r}, {d!r}, {e!r}</GeoTransform>")
    parts.append(_metadata(tags))
    kind = f'dataType="{_GDAL_TYPES[raw.layer.dtype]}" subClass="VRTRawRasterBand"'
    for number, band in enumerate(bands):
        parts += [
            f'<VRTRasterBand {kind} band="{number + 1}">',
            f"<Description>{escape(band.description)}</Description>",
            _metadata(band.tags),
            f"<NoDataValue>{nodata!r}</NoDataValue>",
            "" if colours is None else _palette(colours),
            f'<SourceFilename relativeToVRT="1">{escape(raw.path.name)}</SourceFilename>',
            f"<ImageOffset>{number * plane * size}</ImageOffset><PixelOffset>{size}</PixelOffset>",
            f"<LineOffset>{raw.width * size}</LineOffset><ByteOrder>LSB</ByteOrder>",
            *(f"<Overview>{_file(level)}<SourceBand>{number + 1}</SourceBand></Overview>" for level in overviews),
            "</VRTRasterBand>",
        ]
    return "\n".join([*parts, "</VRTDataset>"])


def _file(raw: RawFile) -> str:
    name = escape(raw.path.with_suffix(".vrt").name)
    return f'<SourceFilename relativeToVRT="1">{name}</SourceFilename>'


def _metadata(tags: Mapping[str, str]) -> str:
    items = (f"<MDI key={quoteattr(key)}>{escape(value)}</MDI>" for key, value in tags.items())
    return f"<Metadata>{''.join(items)}</Metadata>"


def _palette(colours: Mapping[int, tuple[int, int, int, int]]) -> str:
    entries = (colours.get(value, (0, 0, 0, 255)) for value in range(max(colours) + 1))
    listed = (f'<Entry c1="{r}" c2="{g}" c3="{b}" c4="{a}"/>' for r, g, b, a in entries)
    return f"<ColorInterp>Palette</ColorInterp><ColorTable>{''.join(listed)}</ColorTable>"


def parse_crs(wkt: str) -> Any:
    """rasterio's CRS of a WKT. Raises InputDataError."""
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    try:
        return CRS.from_wkt(wkt)
    except CRSError as error:
        raise InputDataError(f"the scene's CRS cannot be read ({error}); give it as WKT") from error


@contextmanager
def bounded_cache() -> Iterator[Any]:
    """rasterio's environment with GDAL's cache of 16 MiB, for as long as the process lives if it is the first one."""
    import rasterio

    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES) as env:
        yield env


@contextmanager
def quiet() -> Iterator[None]:
    """A scene without georeference is legitimate: no warning for each file."""
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield
