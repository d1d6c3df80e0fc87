"""EMIT L2A: small swaths in the published layout, laid out on their grid by the lookup table they bring."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from rasterio.crs import CRS

from fastdiffclip.errors import InputDataError, ResourceError
from fastdiffclip.scene.ingest import IngestRequest, ingest
from fastdiffclip.scene.readers import emit, open_raster
from fastdiffclip.scene.store import open_scene

from .netcdf4_files import Variables, write_netcdf4

LINES, SAMPLES, BANDS, HEIGHT, WIDTH = 9, 7, 5, 11, 12
CUBE = np.random.default_rng(12).random((LINES, SAMPLES, BANDS)).astype(np.float32)
CUBE[2, 3] = -9999.0
TRANSFORM = (0.0005, 0.0, -81.5, 0.0, -0.0005, 29.75)


def tables() -> tuple[np.ndarray, np.ndarray]:
    """A swath turned by 30 degrees, nearest pixel, 0 where the grid lies outside of it."""
    row, col = np.mgrid[:HEIGHT, :WIDTH]
    turn = np.deg2rad(30)
    line = np.rint((row - 5) * np.cos(turn) + (col - 6) * np.sin(turn) + 4).astype(np.int32) + 1
    sample = np.rint((col - 6) * np.cos(turn) - (row - 5) * np.sin(turn) + 3).astype(np.int32) + 1
    inside = (line >= 1) & (line <= LINES) & (sample >= 1) & (sample <= SAMPLES)
    return np.where(inside, sample, 0).astype(np.int32), np.where(inside, line, 0).astype(np.int32)


def write_emit(path: Path, changes: Variables | None = None, attributes: dict[str, Any] | None = None) -> Path:
    glt_x, glt_y = tables()
    spectral, ortho = ("bands",), ("ortho_y", "ortho_x")
    variables: Variables = {
        "reflectance": (("downtrack", "crosstrack", "bands"), CUBE, {"_FillValue": np.float32(-9999)}),
        "sensor_band_parameters/wavelengths": (spectral, np.linspace(381, 2493, BANDS, dtype="f4"), {"units": "nm"}),
        "sensor_band_parameters/fwhm": (spectral, np.full(BANDS, 8.5, np.float32), {"units": "nm"}),
        "sensor_band_parameters/good_wavelengths": (spectral, np.array([1, 1, 0, 1, 1], np.uint8), {}),
        "location/lon": (("downtrack", "crosstrack"), np.ones((LINES, SAMPLES)), {"units": "degrees east"}),
        "location/lat": (("downtrack", "crosstrack"), np.ones((LINES, SAMPLES)), {"units": "degrees north"}),
        "location/elev": (("downtrack", "crosstrack"), np.arange(63.0).reshape(LINES, SAMPLES), {"units": "m"}),
        "location/glt_x": (ortho, glt_x, {"_FillValue": np.int32(0)}),
        "location/glt_y": (ortho, glt_y, {"_FillValue": np.int32(0)}),
    }
    a, b, c, d, e, f = TRANSFORM
    about = {
        "title": np.bytes_("EMIT L2A Estimated Surface Reflectance 60 m V001"),
        "spatial_ref": np.bytes_(CRS.from_epsg(4326).to_wkt()), "geotransform": np.array([c, a, b, f, d, e]),
    }  # fmt: skip
    about.update(attributes or {})
    return write_netcdf4(path, {**variables, **(changes or {})}, about, chunks=True, compression="gzip")


def expected(swath: np.ndarray, fill: float) -> np.ndarray:
    """The swath laid out pixel by pixel."""
    glt_x, glt_y = tables()
    out = np.full((HEIGHT, WIDTH, swath.shape[2]), fill, swath.dtype)
    for row in range(HEIGHT):
        for col in range(WIDTH):
            if glt_x[row, col]:
                out[row, col] = swath[glt_y[row, col] - 1, glt_x[row, col] - 1]
    return out


@pytest.mark.parametrize("block", [64 * 2**20, 300])
def test_the_swath_is_laid_out(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emit, "_BLOCK_BYTES", block)
    with open_raster(write_emit(tmp_path / "e.nc")) as source:
        assert (source.height, source.width, source.bands, source.dtype) == (HEIGHT, WIDTH, BANDS, np.float32)
        rows = [slice(8, 11), slice(0, 4), slice(4, 8)]
        assert source.read_mask is not None
        for part in rows:
            np.testing.assert_array_equal(source.read_rows(part), expected(CUBE, -9999)[part])
            np.testing.assert_array_equal(source.read_mask(part), tables()[0][part] > 0)
        assert source.wavelengths == (381.0, 909.0, 1437.0, 1965.0, 2493.0) and source.fwhm == (8.5,) * BANDS
        assert source.bad_bands == (False, False, True, False, False) and source.nodata == -9999.0
        assert source.affine_transform == TRANSFORM
        assert source.crs_wkt is not None and CRS.from_wkt(source.crs_wkt).to_epsg() == 4326


def test_other_arrays_of_the_swath_lie_on_the_same_grid(tmp_path: Path) -> None:
    mask = (("downtrack", "crosstrack", "bands"), CUBE[:, :, :5] * 2, {"_FillValue": np.float32(-9999)})
    path = write_emit(tmp_path / "e.nc", {"mask": mask})
    elevation = np.arange(63.0).reshape(LINES, SAMPLES, 1)
    for name, swath in {"mask": CUBE * 2, "location/elev": elevation, "elev": elevation}.items():
        with open_raster(path, name) as source:
            np.testing.assert_array_equal(source.read_rows(slice(0, HEIGHT)), expected(swath, -9999))
            assert source.affine_transform == TRANSFORM
    with open_raster(path, "/location/glt_x") as source:  # a table is read as it stands
        np.testing.assert_array_equal(source.read_rows(slice(0, HEIGHT))[..., 0], tables()[0])
    with pytest.raises(InputDataError, match=r"has no array 'radiance'.* it holds /reflectance"):
        open_raster(path, "radiance")


def test_it_is_known_by_content(tmp_path: Path) -> None:
    with open_raster(write_emit(tmp_path / "renamed.h5")) as source:
        assert source.height == HEIGHT


def test_neighbours_that_fill_gaps_are_negative(tmp_path: Path) -> None:
    glt_x, glt_y = tables()
    changes: Variables = {
        "location/glt_x": (("ortho_y", "ortho_x"), -glt_x, {}), "location/glt_y": (("ortho_y", "ortho_x"), -glt_y, {}),
    }  # fmt: skip
    with open_raster(write_emit(tmp_path / "e.nc", changes)) as source:
        np.testing.assert_array_equal(source.read_rows(slice(0, HEIGHT)), expected(CUBE, -9999))


def test_a_table_that_points_out_of_the_swath(tmp_path: Path) -> None:
    for name, beyond in (("glt_x", SAMPLES + 1), ("glt_y", 2**31 - 1)):
        table = tables()[name == "glt_y"].copy()
        table[4, 5] = beyond
        path = write_emit(tmp_path / f"{name}.nc", {f"location/{name}": (("ortho_y", "ortho_x"), table, {})})
        with (
            open_raster(path) as source,
            pytest.raises(InputDataError, match=rf"/location/{name} points at {beyond} of \d, expected places within"),
        ):
            source.read_rows(slice(0, HEIGHT))


def test_tables_and_attributes_that_do_not_fit(tmp_path: Path) -> None:
    short: Variables = {"location/glt_y": (("ortho_y", "other"), np.zeros((HEIGHT, 3), np.int32), {})}
    with pytest.raises(InputDataError, match=r"glt_x has shape \(11, 12\) and glt_y \(11, 3\), expected two tables"):
        open_raster(write_emit(tmp_path / "a.nc", short))
    with pytest.raises(InputDataError, match="its geotransform is not six numbers"):
        open_raster(write_emit(tmp_path / "b.nc", attributes={"geotransform": np.ones(5)}))
    with pytest.raises(InputDataError, match="names a CRS that cannot be understood"):
        open_raster(write_emit(tmp_path / "c.nc", attributes={"spatial_ref": np.bytes_("EPSG:nonsense")}))


def test_the_copy_of_the_swath_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    with open_raster(write_emit(tmp_path / "e.nc")) as source:
        source.read_rows(slice(0, 2))
        assert list((tmp_path / "t").iterdir()) == []  # it has no name, so not even a kill leaves it


def test_no_room_for_the_copy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10

    with open_raster(write_emit(tmp_path / "e.nc")) as source:
        monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
        with pytest.raises(ResourceError, match=r"reading .*e\.nc takes .* GiB in .*set TMPDIR to a folder"):
            source.read_rows(slice(0, 2))


def test_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    data = write_emit(tmp_path / "e.nc").read_bytes()
    for size in range(1, len(data), 3001):
        (tmp_path / "cut.nc").write_bytes(data[:size])
        with pytest.raises(InputDataError, match=r"cut\.nc cannot be read .*truncated"):
            open_raster(tmp_path / "cut.nc")


def test_ingest_brings_everything_into_the_scene(tmp_path: Path) -> None:
    ingest(IngestRequest([("hsi", str(write_emit(tmp_path / "e.nc")))], tmp_path / "out.zarr"))
    scene = open_scene(tmp_path / "out.zarr")
    hsi = scene.modalities["hsi"]
    values = expected(CUBE, -9999)
    np.testing.assert_array_equal(scene.read("hsi"), values)
    np.testing.assert_array_equal(scene.read_valid("hsi"), values[..., 0] != -9999)
    assert hsi.wavelengths == (381.0, 909.0, 1437.0, 1965.0, 2493.0) and hsi.nodata == -9999.0
    assert hsi.bad_bands == (False, False, True, False, False)
    assert scene.affine_transform == TRANSFORM and scene.crs_wkt is not None


def test_h5py_reads_the_test_files_as_they_were_meant(tmp_path: Path) -> None:
    with h5py.File(write_emit(tmp_path / "e.nc")) as file:
        assert [dim[0].name for dim in file["reflectance"].dims] == ["/downtrack", "/crosstrack", "/bands"]
