"""PRISMA L2D: small files in the published layout, joined, scaled, masked and placed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from rasterio.crs import CRS

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.ingest import IngestRequest, ingest
from fastdiffclip.scene.readers import open_raster
from fastdiffclip.scene.store import open_scene

FIELDS = "HDFEOS/SWATHS/PRS_L2D_HCO/Data Fields"
HEIGHT, WIDTH = 6, 5
# As they are stored: descending, 0 where a band was not acquired; the two spectrometers overlap at 940 to 980 nm.
VNIR = np.array([979.0, 951.0, 650.0, 500.0, 0.0], np.float32)
SWIR = np.array([2490.0, 1600.0, 0.0, 965.0, 942.0], np.float32)
LIMITS = {"Vnir": (0.0, 1.2), "Swir": (-0.1, 0.8)}
ORDER = [("v", 3), ("v", 2), ("s", 4), ("v", 1), ("s", 3), ("v", 0), ("s", 1), ("s", 0)]  # by wavelength


def cubes() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(11)
    vnir, swir = (rng.integers(1, 65535, (HEIGHT, 5, WIDTH)).astype(np.uint16) for _ in range(2))
    for cube in (vnir, swir):
        cube[0, :, :2] = 0  # outside of the image
    vnir[1, :, 1] = 0  # dark in one spectrometer only
    vnir[:, 4], swir[:, 2] = 7, 7  # what stands in a band that was not acquired
    return vnir, swir


def write_prisma(path: Path, attributes: dict[str, Any] | None = None, rows_first: bool = True) -> Path:
    vnir, swir = cubes()
    about: dict[str, Any] = {
        "Product_ID": np.bytes_("PRS_L2D_STD"), "Epsg_Code": np.int64(32632), "Projection_Id": np.bytes_("32"),
        "Product_ULcorner_easting": 500015.0, "Product_ULcorner_northing": 5200985.0,
        "Product_LRcorner_easting": 500015.0 + 30 * (WIDTH - 1),
        "Product_LRcorner_northing": 5200985.0 - 30 * (HEIGHT - 1),
        "List_Cw_Vnir": VNIR, "List_Fwhm_Vnir": np.where(VNIR > 0, 11.5, 0).astype(np.float32),
        "List_Cw_Swir": SWIR, "List_Fwhm_Swir": np.where(SWIR > 0, 9.5, 0).astype(np.float32),
        "List_Cw_Vnir_Flags": (VNIR > 0).astype(np.int64), "List_Cw_Swir_Flags": (SWIR > 0).astype(np.int64),
    }  # fmt: skip
    for name, (low, high) in LIMITS.items():
        about[f"L2Scale{name}Min"], about[f"L2Scale{name}Max"] = np.float32(low), np.float32(high)
    about.update(attributes or {})
    with h5py.File(path, "w") as file:
        for name, cube in (("VNIR", vnir), ("SWIR", swir)):
            stored = cube if rows_first else cube.transpose(2, 1, 0)
            file.create_dataset(f"{FIELDS}/{name}_Cube", data=stored, chunks=True, compression="gzip")
            file.create_dataset(f"{FIELDS}/{name}_PIXEL_L2_ERR_MATRIX", data=np.zeros(stored.shape, np.uint8))
        file.create_dataset("HDFEOS/SWATHS/PRS_L2D_PCO/Data Fields/Cube", data=np.ones((30, 25), np.uint16))
        file["HDFEOS INFORMATION/StructMetadata.0"] = np.bytes_("GROUP=SwathStructure")
        for key, value in about.items():
            if value is not None:
                file.attrs[key] = value
    return path


def expected() -> np.ndarray:
    """Reflectance (HEIGHT, WIDTH, 8) by the formula of the product specification, in float64."""
    parts = dict(zip("vs", cubes(), strict=True))
    limits = {"v": LIMITS["Vnir"], "s": LIMITS["Swir"]}
    bands = [
        limits[part][0] + parts[part][:, band].astype(float) * (limits[part][1] - limits[part][0]) / 65535
        for part, band in ORDER
    ]
    return np.stack(bands, axis=-1)


@pytest.mark.parametrize("rows_first", [True, False])
def test_cubes_are_joined_by_wavelength(tmp_path: Path, rows_first: bool) -> None:
    with open_raster(write_prisma(tmp_path / "p.he5", rows_first=rows_first)) as source:
        assert (source.height, source.width, source.bands, source.dtype) == (HEIGHT, WIDTH, 8, np.float32)
        blocks = [source.read_rows(slice(row, min(row + 4, HEIGHT))) for row in range(0, HEIGHT, 4)]
        # Two float32 operations on values of at most 1.2: within 3 units in the last place of 1.2.
        np.testing.assert_allclose(np.concatenate(blocks), expected(), rtol=0, atol=3 * 2**-23)
        assert source.wavelengths == (500.0, 650.0, 942.0, 951.0, 965.0, 979.0, 1600.0, 2490.0)
        assert source.fwhm == (11.5, 11.5, 9.5, 11.5, 9.5, 11.5, 9.5, 9.5)
        assert source.bad_bands == (False, False, False, True, False, True, False, False)
        assert source.read_mask is not None
        mask = source.read_mask(slice(0, HEIGHT))
        assert not mask[0, :2].any() and mask.sum() == HEIGHT * WIDTH - 2
        assert source.affine_transform == (30.0, 0.0, 500000.0, 0.0, -30.0, 5201000.0)
        assert source.crs_wkt is not None and CRS.from_wkt(source.crs_wkt).to_epsg() == 32632


def test_corners_that_are_edges(tmp_path: Path) -> None:
    corners = {
        "Product_ULcorner_easting": 500000.0, "Product_ULcorner_northing": 5201000.0,
        "Product_LRcorner_easting": 500000.0 + 30 * WIDTH, "Product_LRcorner_northing": 5201000.0 - 30 * HEIGHT,
    }  # fmt: skip
    with open_raster(write_prisma(tmp_path / "p.he5", corners)) as source:
        assert source.affine_transform == (30.0, 0.0, 500000.0, 0.0, -30.0, 5201000.0)


def test_it_is_known_by_content_and_read_by_path_too(tmp_path: Path) -> None:
    path = write_prisma(tmp_path / "renamed.h5")
    with open_raster(path) as source:
        assert source.bands == 8
    with open_raster(path, f"{FIELDS}/VNIR_Cube@ybx") as source:
        np.testing.assert_array_equal(source.read_rows(slice(0, HEIGHT)), cubes()[0].transpose(0, 2, 1))
    with open_raster(path, "PRS_L2D_PCO/Data Fields/Cube") as source:
        assert (source.height, source.width) == (30, 25)


@pytest.mark.parametrize(("attributes", "message"), [
    ({"Product_ULcorner_easting": None}, "is a PRISMA product without Product_ULcorner_easting"),
    ({"Product_LRcorner_northing": np.nan}, "is a PRISMA product without"),
    ({"Product_LRcorner_northing": 0.0}, r"the corners of the product span .* VNIR_Cube has shape \(6, 5, 5\)"),
    ({"List_Cw_Vnir": VNIR[:3]}, "List_Cw_Vnir has not 5 numbers"),
    ({"List_Fwhm_Swir": None}, "List_Fwhm_Swir has not 5 numbers"),
    ({"L2ScaleSwirMax": None}, "no usable L2ScaleSwirMin and L2ScaleSwirMax"),
    ({"L2ScaleVnirMax": np.float32(-5)}, "no usable L2ScaleVnirMin"),
    ({"List_Cw_Vnir_Flags": np.zeros(5, int)}, "no band of VNIR with a wavelength"),
    ({"Epsg_Code": np.int64(99999999)}, "names a CRS that cannot be understood"),
])  # fmt: skip
def test_attributes_that_do_not_fit(tmp_path: Path, attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputDataError, match=rf"p\.he5.*{message}"):
        open_raster(write_prisma(tmp_path / "p.he5", attributes))


def test_cubes_that_do_not_fit(tmp_path: Path) -> None:
    path = write_prisma(tmp_path / "p.he5")
    with h5py.File(path, "r+") as file:
        del file[f"{FIELDS}/SWIR_Cube"]
        file[f"{FIELDS}/SWIR_Cube"] = np.ones((4, 5, 4), np.uint16)
    with pytest.raises(InputDataError, match=r"SWIR_Cube is uint16 of shape \(4, 5, 4\), expected uint16 on the grid"):
        open_raster(path)


def test_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    data = write_prisma(tmp_path / "p.he5").read_bytes()
    for size in range(1, len(data), 2503):
        (tmp_path / "cut.he5").write_bytes(data[:size])
        with pytest.raises(InputDataError, match=r"cut\.he5 cannot be read .*truncated"):
            open_raster(tmp_path / "cut.he5")


def test_ingest_brings_everything_into_the_scene(tmp_path: Path) -> None:
    ingest(IngestRequest([("hsi", str(write_prisma(tmp_path / "p.he5")))], tmp_path / "out.zarr"))
    scene = open_scene(tmp_path / "out.zarr")
    hsi = scene.modalities["hsi"]
    np.testing.assert_allclose(scene.read("hsi"), expected(), rtol=0, atol=3 * 2**-23)
    assert hsi.wavelengths is not None and hsi.wavelengths[:2] == (500.0, 650.0)
    assert hsi.bad_bands is not None and sum(hsi.bad_bands) == 2
    assert hsi.valid_pixels == HEIGHT * WIDTH - 2 and scene.affine_transform is not None
    assert scene.crs_wkt is not None and CRS.from_wkt(scene.crs_wkt).to_epsg() == 32632
