"""What is refused of any raster before a row is read, and arithmetic that goes beyond float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers import open_raster
from fastdiffclip.scene.readers.sound import sound
from fastdiffclip.scene.readers.source import RasterSource


def source(**said: Any) -> tuple[RasterSource, list[str]]:
    closed: list[str] = []
    values = np.ones((2, 3, 2), np.float32)
    return RasterSource(
        Path("a.tif"), 2, 3, 2, values.dtype, values.__getitem__, close=lambda: closed.append("closed"), **said
    ), closed


@pytest.mark.parametrize(
    "transform",
    [
        (1, 0, 5e5, 0, -1, np.nan),
        (1, 0, np.inf, 0, -1, 4e6),
        (np.nan, 0, 5e5, 0, -1, 4e6),
        (0, 0, 5e5, 0, 0, 4e6),
        (1, 2, 5e5, 2, 4, 4e6),
        (1e200, 0, 5e5, 0, -1e200, 4e6),
    ],
)
def test_a_transform_that_places_no_pixel(transform: tuple[float, ...]) -> None:
    made, closed = source(affine_transform=transform)
    with pytest.raises(InputDataError, match=r"a\.tif has a transform that places no pixel .* georeference it again"):
        sound(made)
    assert closed == ["closed"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"scale": np.nan}, "times nan plus 0"),
        ({"scale": 0.0}, "times 0 plus 0"),
        ({"offset": 1e39}, "plus 1e\\+39"),
        ({"wavelengths": (400.0, np.inf)}, "gives wavelengths that are no finite numbers"),
        ({"fwhm": (np.nan, 5.0)}, "gives widths of bands"),
    ],
)
def test_numbers_of_no_use(said: dict[str, Any], message: str) -> None:
    made, closed = source(**said)
    with pytest.raises(InputDataError, match=message):
        sound(made)
    assert closed == ["closed"]


def test_a_sound_source_is_as_it_was() -> None:
    made, closed = source(affine_transform=(2.0, 0, 1, 0, -2.0, 5), scale=-1e-4, offset=3.0, wavelengths=(1.0, 2.0))
    again = sound(made)
    np.testing.assert_array_equal(again.read_rows(slice(0, 2)), made.read_rows(slice(0, 2)))
    assert (again.scale, again.wavelengths, closed) == (-1e-4, (1.0, 2.0), [])


def test_damaged_geotiffs(tmp_path: Path) -> None:
    shape = {"height": 2, "width": 3, "count": 2, "dtype": "float32", "crs": "EPSG:32617"}
    with rasterio.open(tmp_path / "a.tif", "w", transform=Affine(1, 0, 0, 0, -1, np.nan), **shape) as dataset:
        dataset.write(np.ones((2, 2, 3), np.float32))
    with pytest.raises(InputDataError, match="places no pixel"):
        open_raster(tmp_path / "a.tif")
    with rasterio.open(tmp_path / "b.tif", "w", transform=Affine(1, 0, 9, 0, -1, 9), **shape) as dataset:
        dataset.write(np.full((2, 2, 3), 1e30, np.float32))
        dataset.scales = (1e30, 1.0)
        dataset.set_band_description(1, "9" * 40_000)  # no time is spent on looking for a wavelength in it
    with open_raster(tmp_path / "b.tif") as opened:
        values = opened.read_rows(slice(0, 2))
    assert np.isinf(values[..., 0]).all() and (values[..., 1] == np.float32(1e30)).all()


def test_a_geotiff_whose_names_are_no_text(tmp_path: Path) -> None:
    shape = {"height": 2, "width": 3, "count": 1, "dtype": "uint8"}
    crs = 'LOCAL_CS["a made up plane",UNIT["metre",1]]'
    with rasterio.open(tmp_path / "a.tif", "w", crs=crs, transform=Affine(1, 0, 9, 0, -1, 9), **shape) as dataset:
        dataset.write(np.ones((1, 2, 3), np.uint8))
    data = (tmp_path / "a.tif").read_bytes()
    assert b"made up" in data
    (tmp_path / "a.tif").write_bytes(data.replace(b"made up", b"made\xa0up"))
    with pytest.raises(InputDataError, match=r"a\.tif cannot be read as GeoTIFF, it may be truncated or damaged"):
        open_raster(tmp_path / "a.tif")


def test_a_scale_in_a_store(tmp_path: Path) -> None:
    import zarr

    array = zarr.create_group(tmp_path / "a.zarr").create_array(
        "cube", shape=(2, 3, 2), chunks=(2, 3, 2), dtype="uint16", dimension_names=["y", "x", "band"]
    )
    array[:] = np.ones((2, 3, 2), np.uint16)
    metadata = tmp_path / "a.zarr" / "cube" / "zarr.json"
    content = json.loads(metadata.read_text())
    content["attributes"] = {"scale_factor": 1e300}
    metadata.write_text(json.dumps(content))
    with pytest.raises(InputDataError, match=r"times 1e\+300"):
        open_raster(tmp_path / "a.zarr")
