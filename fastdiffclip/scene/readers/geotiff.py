"""GeoTIFF with any number of bands, read in windows of rows."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers import envi_header
from fastdiffclip.scene.readers.source import RasterSource
from fastdiffclip.scene.readers.spectral import in_nanometres, nanometres_per_unit
from fastdiffclip.scene.readers.xml_files import read_xml

if TYPE_CHECKING:
    import rasterio

_LENGTH = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zµμ]+)", re.IGNORECASE)
_SIDECAR_LIMIT = 4 * 2**20
_LONGEST_NAME = 200  # of a band, as far as a wavelength is looked for in it
_ALWAYS_ALLOWED, _EXPANSION = 2**30, 100_000  # no compression of measured spectra comes near


def open_geotiff(path: Path, variable: str | None) -> RasterSource:
    """Open a GeoTIFF with CRS, transform, nodata, scale, wavelengths, mask, class names and colours where
    it has them.

    Wavelengths come from the bands' ``IMAGERY`` metadata, a ``wavelength`` tag, or a description with a
    unit such as "850.5 nm"; failing these, wavelengths and bad bands from an ENVI header of file type TIFF beside
    it. Class names are those of the ``.aux.xml`` file beside it. Bands whose scale or offset differ are read as
    float32 physical values.
    """
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    if variable is not None:
        raise InputDataError(f"{path} is a GeoTIFF and has no variables: leave out ':{variable}'")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            dataset = rasterio.open(path, driver="GTiff")
    except (RasterioError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    try:
        return _describe(path, dataset)
    except (RasterioError, UnicodeDecodeError) as error:
        dataset.close()
        raise _damaged(path, error) from error
    except BaseException:
        dataset.close()
        raise


def _damaged(path: Path, error: Exception) -> InputDataError:
    return InputDataError(f"{path} cannot be read as GeoTIFF, it may be truncated or damaged ({error})")


def _describe(path: Path, dataset: rasterio.DatasetReader) -> RasterSource:
    from rasterio.enums import MaskFlags

    dtype = np.result_type(*dataset.dtypes)
    if dtype.kind not in "biuf":
        raise InputDataError(f"{path} holds {dtype}, expected real numbers: convert it first")
    uniform = len(set(zip(dataset.scales, dataset.offsets, strict=True))) == 1
    if not uniform and dataset.nodata is not None:
        raise InputDataError(
            f"{path} has a nodata value and bands with different scale or offset: write physical values instead"
        )
    _refuse_empty_giant(path, dataset, dtype)
    masked = MaskFlags.per_dataset in dataset.mask_flag_enums[0]
    placed = not dataset.transform.is_identity
    spectral = _spectral(path, dataset)
    return RasterSource(
        path=path,
        height=dataset.height,
        width=dataset.width,
        bands=dataset.count,
        dtype=dtype if uniform else np.dtype(np.float32),
        read_rows=lambda rows: _read_rows(path, dataset, rows, uniform),
        read_mask=(lambda rows: _read_mask(path, dataset, rows)) if masked else None,
        crs_wkt=dataset.crs.to_wkt(version="WKT2_2019") if dataset.crs else None,
        affine_transform=tuple(dataset.transform)[:6] if placed else None,
        nodata=dataset.nodata,
        scale=float(dataset.scales[0]) if uniform else 1.0,
        offset=float(dataset.offsets[0]) if uniform else 0.0,
        wavelengths=spectral.wavelengths,
        fwhm=spectral.fwhm,
        bad_bands=spectral.bad_bands,
        companions=spectral.companions,
        class_names=_category_names(path) if dataset.count == 1 else {},
        class_colours=_colours(dataset) if dataset.count == 1 else {},
        close=dataset.close,
    )


def _refuse_empty_giant(path: Path, dataset: rasterio.DatasetReader, dtype: np.dtype) -> None:
    """Refuse a file whose blocks are missing, or all the same, to a degree that no scene is."""
    declared = dataset.width * dataset.height * dataset.count * dtype.itemsize
    if declared > max(_ALWAYS_ALLOWED, path.stat().st_size * _EXPANSION):
        raise InputDataError(
            f"{path} declares {dataset.height} x {dataset.width} pixels with {dataset.count} bands and has "
            f"{path.stat().st_size} bytes: it is empty or made up, expected a scene; cut out the part that has data"
        )


def _read_rows(path: Path, dataset: rasterio.DatasetReader, rows: slice, uniform: bool) -> np.ndarray:
    from rasterio.errors import RasterioError
    from rasterio.windows import Window

    window = Window(0, rows.start, dataset.width, rows.stop - rows.start)
    try:
        block = np.moveaxis(dataset.read(window=window), 0, -1)
    except RasterioError as error:
        raise InputDataError(f"{path} is truncated or damaged in rows {rows.start} to {rows.stop} ({error})") from error
    if uniform:
        return block
    return block.astype(np.float32) * np.float32(dataset.scales) + np.float32(dataset.offsets)


def _read_mask(path: Path, dataset: rasterio.DatasetReader, rows: slice) -> np.ndarray:
    from rasterio.errors import RasterioError
    from rasterio.windows import Window

    window = Window(0, rows.start, dataset.width, rows.stop - rows.start)
    try:
        return np.asarray(dataset.dataset_mask(window=window) > 0)
    except RasterioError as error:
        raise InputDataError(f"the mask of {path} is damaged in rows {rows.start} to {rows.stop} ({error})") from error


@dataclass(frozen=True)
class _Spectral:
    """What is known of the bands, and the file beside the GeoTIFF that says so."""

    wavelengths: tuple[float, ...] | None
    fwhm: tuple[float, ...] | None
    bad_bands: tuple[bool, ...] | None = None
    companions: tuple[Path, ...] = ()


def _spectral(path: Path, dataset: rasterio.DatasetReader) -> _Spectral:
    centres = _all_bands([_wavelength(dataset, band) for band in dataset.indexes])
    widths = _all_bands([_fwhm(dataset, band) for band in dataset.indexes])
    beside = path.with_suffix(".hdr")
    if centres is None and dataset.count > 1 and envi_header.is_header(beside):
        header = envi_header.read_header(beside)
        if header.fields.get("file type", "").upper() == "TIFF":
            centres, widths = envi_header.wavelengths(header, dataset.count)
            return _Spectral(centres, widths, envi_header.bad_bands(header, dataset.count), (beside,))
    return _Spectral(centres, widths)


def _wavelength(dataset: rasterio.DatasetReader, band: int) -> float | None:
    imagery = dataset.tags(band, ns="IMAGERY").get("CENTRAL_WAVELENGTH_UM")
    if imagery:
        return _nanometres(imagery, "um")
    tags = {key.lower(): value for key, value in dataset.tags(band).items()}
    if "wavelength" in tags:
        return _nanometres(tags["wavelength"], tags.get("wavelength_units", tags.get("wavelength_unit")))
    described = _LENGTH.search((dataset.descriptions[band - 1] or "")[:_LONGEST_NAME])
    return _nanometres(described[1], described[2]) if described else None


def _fwhm(dataset: rasterio.DatasetReader, band: int) -> float | None:
    imagery = dataset.tags(band, ns="IMAGERY").get("FWHM_UM")
    if imagery:
        return _nanometres(imagery, "um")
    tags = {key.lower(): value for key, value in dataset.tags(band).items()}
    return (
        _nanometres(tags["fwhm"], tags.get("wavelength_units", tags.get("wavelength_unit"))) if "fwhm" in tags else None
    )


def _nanometres(text: str, unit: str | None) -> float | None:
    """Return a length in nm, None where it is no number or its unit is unknown; no unit means nm."""
    try:
        value = float(text)
    except ValueError:
        return None
    factor = nanometres_per_unit(unit or "nm")
    return None if factor is None else in_nanometres([value], factor)[0]


def _all_bands(values: list[float | None]) -> tuple[float, ...] | None:
    known = tuple(value for value in values if value is not None)
    return known if len(known) == len(values) else None


def _colours(dataset: rasterio.DatasetReader) -> dict[int, tuple[int, int, int]]:
    try:
        table = dataset.colormap(1)
    except ValueError:
        return {}
    return {value: (red, green, blue) for value, (red, green, blue, _) in table.items()}


def _category_names(path: Path) -> dict[int, str]:
    """Read the class names that GDAL keeps beside a GeoTIFF, which rasterio does not hand out."""
    sidecar = path.with_name(path.name + ".aux.xml")
    if not sidecar.is_file() or sidecar.stat().st_size > _SIDECAR_LIMIT:
        return {}
    names = read_xml(sidecar).iterfind(".//CategoryNames/Category")
    return {value: node.text.strip() for value, node in enumerate(names) if node.text and node.text.strip()}
