"""NetCDF, classic and 4: CF attributes become nodata, scale, wavelengths, class names, CRS and transform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from rasterio.crs import CRS
from scipy.io import netcdf_file

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.ingest import IngestRequest, ingest
from fastdiffclip.scene.readers import open_raster
from fastdiffclip.scene.store import open_scene

from .damage import assert_flips_are_survived, whole
from .netcdf4_files import Variables, write_netcdf4

CUBE = np.random.default_rng(4).integers(1, 9999, (7, 6, 5)).astype(np.int16)
UTM = CRS.from_epsg(32617)
X, Y = 404000.5 + np.arange(6.0), 3284999.5 - np.arange(7.0)
PLACE = (1.0, 0.0, 404000.0, 0.0, -1.0, 3285000.0)


def write_netcdf3(path: Path, variables: Variables, attributes: dict[str, Any] | None = None) -> Path:
    with netcdf_file(path, "w") as file:
        for name, value in (attributes or {}).items():
            setattr(file, name, value)
        for name, (dims, values, own) in variables.items():
            values = np.asarray(values)
            for dim, size in zip(dims, values.shape, strict=True):
                if dim not in file.dimensions:
                    file.createDimension(dim, size)
            variable = file.createVariable(name, values.dtype.newbyteorder(">"), dims)
            if values.ndim:
                variable[:] = values
            for key, value in own.items():
                setattr(variable, key, value)
    return path


BOTH = pytest.mark.parametrize("write", [write_netcdf3, write_netcdf4], ids=["classic", "netcdf4"])


def scene(**changes: tuple[tuple[str, ...], Any, dict[str, Any]]) -> Variables:
    mapping = {"grid_mapping_name": "transverse_mercator", "crs_wkt": UTM.to_wkt()}
    scaling = {"scale_factor": np.float64(1e-4), "add_offset": 0.5}
    attributes = {"grid_mapping": "utm", "_FillValue": np.int16(-9999), **scaling}
    variables: Variables = {
        "x": (("x",), X, {"standard_name": "projection_x_coordinate", "units": "m"}),
        "y": (("y",), Y, {"standard_name": "projection_y_coordinate", "units": "m"}),
        "wavelength": (("wavelength",), np.linspace(0.4, 0.8, 5), {"units": "um"}),
        "fwhm": (("wavelength",), np.full(5, 9.0), {"units": "nm"}),
        "utm": ((), np.int32(0), mapping),
        "cube": (("wavelength", "y", "x"), np.moveaxis(CUBE, 2, 0), attributes),
    }
    return {**variables, **changes}


@BOTH
def test_everything_that_cf_says(tmp_path: Path, write: Any) -> None:
    with open_raster(write(tmp_path / "x.nc", scene())) as source:
        np.testing.assert_array_equal(whole(source), CUBE)
        assert source.dtype == np.int16 and source.dtype.isnative
        assert (source.nodata, source.scale, source.offset) == (-9999.0, 1e-4, 0.5)
        assert source.wavelengths == (400.0, 500.0, 600.0, 700.0, 800.0) and source.fwhm == (9.0,) * 5
        assert source.affine_transform == PLACE
        assert source.crs_wkt is not None and CRS.from_wkt(source.crs_wkt) == UTM
        assert source.crs_wkt.startswith("PROJCRS") and source.warnings == ()


@BOTH
def test_rows_from_south_to_north_are_turned(tmp_path: Path, write: Any) -> None:
    variables = scene(y=(("y",), Y[::-1], {}), cube=(("y", "x", "wavelength"), CUBE[::-1], {}))
    with open_raster(write(tmp_path / "x.nc", variables)) as source:
        np.testing.assert_array_equal(whole(source), CUBE)
        assert source.affine_transform == PLACE


@BOTH
def test_unevenly_spaced_coordinates_give_a_warning(tmp_path: Path, write: Any) -> None:
    with open_raster(write(tmp_path / "x.nc", scene(x=(("x",), X + [0, 0, 0, 0.01, 0, 0], {})))) as source:
        assert source.affine_transform is None
        assert "coordinates of /cube are unevenly spaced, so its place on the map is left out" in source.warnings[0]


@pytest.mark.parametrize(("x", "y"), [
    (X.astype(np.float32), Y.astype(np.float32)),  # steps that float32 holds
    ((-81.2 + 2.7e-4 * np.arange(6)).astype(np.float32), (29.7 - 2.7e-4 * np.arange(7)).astype(np.float32)),
    (404000 + np.arange(6, dtype=np.int32), 3284999 - np.arange(7, dtype=np.int32)),
])  # fmt: skip
def test_rounded_coordinates_are_regular(tmp_path: Path, x: np.ndarray, y: np.ndarray) -> None:
    path = write_netcdf4(tmp_path / "x.nc", scene(x=(("x",), x, {}), y=(("y",), y, {})))
    with open_raster(path) as source:
        assert source.affine_transform is not None and source.warnings == ()
        a, _, c, _, e, f = source.affine_transform
        np.testing.assert_allclose([a, e], [np.diff(x.astype(float)).mean(), np.diff(y.astype(float)).mean()])
        np.testing.assert_allclose([c + a / 2, f + e / 2], [x[0], y[0]])


def test_geotransform_where_there_are_no_coordinates(tmp_path: Path) -> None:
    mapping = {"spatial_ref": UTM.to_wkt(), "GeoTransform": "404000 1 0 3285000 0 -1 "}
    cube = (("band", "line", "sample"), np.moveaxis(CUBE, 2, 0), {})
    variables = scene(spatial_ref=((), np.int32(0), mapping), cube=cube)
    del variables["utm"]
    with open_raster(write_netcdf4(tmp_path / "x.nc", variables)) as source:
        assert source.affine_transform == PLACE and source.crs_wkt is not None
        np.testing.assert_array_equal(whole(source), CUBE)


def test_a_crs_that_makes_no_sense(tmp_path: Path) -> None:
    path = write_netcdf4(tmp_path / "x.nc", scene(utm=((), np.int32(0), {"crs_wkt": "PROJCRS[nonsense"})))
    with pytest.raises(InputDataError, match=r"x\.nc names a CRS that cannot be understood .*: mend or convert it"):
        open_raster(path)


def test_groups_look_upwards_for_coordinates(tmp_path: Path) -> None:
    variables = {f"data/{name}" if name == "cube" else name: value for name, value in scene().items()}
    with open_raster(write_netcdf4(tmp_path / "x.nc", variables), "/data/cube") as source:
        np.testing.assert_array_equal(whole(source), CUBE)
        assert source.affine_transform == PLACE and source.wavelengths is not None and source.crs_wkt is not None


def test_unsigned_integers_in_signed_types(tmp_path: Path) -> None:
    values = np.array([[0, 200, 255], [1, 127, 128]], np.uint8)
    own = {"_Unsigned": "true", "_FillValue": np.int8(-1)}
    with open_raster(write_netcdf3(tmp_path / "x.nc", {"a": (("y", "x"), values.view(np.int8), own)})) as source:
        assert source.dtype == np.uint8 and source.nodata == 255.0
        np.testing.assert_array_equal(whole(source)[..., 0], values)


def test_class_names_from_flags(tmp_path: Path) -> None:
    own = {"flag_values": np.array([1, 2], np.uint8), "flag_meanings": "oak pine"}
    labels = np.array([[0, 1], [2, 2]], np.uint8)
    with open_raster(write_netcdf4(tmp_path / "x.nc", {"gt": (("y", "x"), labels, own)})) as source:
        assert source.class_names == {1: "oak", 2: "pine"}


@BOTH
def test_helpers_are_no_rasters(tmp_path: Path, write: Any) -> None:
    latitude = (("y", "x"), np.ones((7, 6)), {})
    cube = (("y", "x", "wavelength"), CUBE, {"coordinates": "lat lon"})
    with open_raster(write(tmp_path / "x.nc", scene(lat=latitude, lon=latitude, cube=cube))) as source:
        np.testing.assert_array_equal(whole(source), CUBE)


@BOTH
def test_a_time_of_one_is_left_out(tmp_path: Path, write: Any) -> None:
    cube = (("time", "y", "wavelength", "x"), np.moveaxis(CUBE, 2, 1)[np.newaxis], {})
    with open_raster(write(tmp_path / "x.nc", scene(cube=cube))) as source:
        np.testing.assert_array_equal(whole(source), CUBE)


def test_record_variables_of_a_classic_file(tmp_path: Path) -> None:
    with netcdf_file(tmp_path / "x.nc", "w", version=2) as file:
        for name, size in (("y", None), ("x", 6), ("band", 5)):
            file.createDimension(name, size)
        for name, factor in (("a", 1), ("b", 2)):
            file.createVariable(name, ">i2", ("y", "x", "band"))[:] = CUBE * factor // 2
    with open_raster(tmp_path / "x.nc", "b") as source:
        np.testing.assert_array_equal(whole(source), CUBE * 2 // 2)


@pytest.mark.parametrize("kind", ["NC", "NC2", "NC4", "NC4C"])
def test_files_that_gdal_wrote(tmp_path: Path, kind: str) -> None:
    profile = {"crs": UTM, "transform": rasterio.Affine(*PLACE), "nodata": -9999}
    with rasterio.open(
        tmp_path / "x.tif", "w", driver="GTiff", height=7, width=6, count=1, dtype="int16", **profile
    ) as dataset:
        dataset.write(CUBE[:, :, 0], 1)
    rasterio.shutil.copy(str(tmp_path / "x.tif"), str(tmp_path / "x.nc"), driver="netCDF", FORMAT=kind)
    with open_raster(tmp_path / "x.nc") as source:
        np.testing.assert_array_equal(whole(source)[..., 0], CUBE[:, :, 0])
        assert source.affine_transform == PLACE and source.nodata == -9999.0
        assert source.crs_wkt is not None and CRS.from_wkt(source.crs_wkt) == UTM


@BOTH
def test_ingest_brings_everything_into_the_scene(tmp_path: Path, write: Any) -> None:
    cube = CUBE.copy()
    cube[0, 0] = -9999
    variables = scene()
    dims, _, attributes = variables["cube"]
    variables["cube"] = (dims, np.moveaxis(cube, 2, 0), attributes)
    variables["good_wavelengths"] = (("wavelength",), np.array([1, 1, 0, 1, 1], np.int8), {})
    path = write(tmp_path / "x.nc", variables)
    ingest(IngestRequest([("hsi", str(path))], tmp_path / "out.zarr"))
    written = open_scene(tmp_path / "out.zarr")
    hsi = written.modalities["hsi"]
    np.testing.assert_array_equal(written.read("hsi")[0, 1:], cube[0, 1:])
    assert hsi.wavelengths == (400.0, 500.0, 600.0, 700.0, 800.0) and hsi.fwhm == (9.0,) * 5
    assert hsi.bad_bands == (False, False, True, False, False) and hsi.valid_pixels == 41
    assert (hsi.nodata, hsi.scale, hsi.offset) == (-9999.0, 1e-4, 0.5)
    assert written.affine_transform == PLACE and written.crs_wkt is not None and CRS.from_wkt(written.crs_wkt) == UTM


def test_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    data = write_netcdf3(tmp_path / "x.nc", {"cube": scene()["cube"]}).read_bytes()
    for size in [*range(1, len(data) - 4, 37), len(data) - 4]:
        (tmp_path / "cut.nc").write_bytes(data[:size])
        with (
            pytest.raises(InputDataError, match=r"cut\.nc.*damaged"),
            open_raster(tmp_path / "cut.nc", "cube") as source,
        ):
            whole(source)


def test_flipped_bytes_are_survived(tmp_path: Path) -> None:
    file = write_netcdf3(tmp_path / "x.nc", scene())
    assert_flips_are_survived(file, "cube", 150, places=4, seed=9, last=420)


def test_shapes_of_exabytes_are_refused_before_allocation(tmp_path: Path) -> None:
    data = bytearray(write_netcdf3(tmp_path / "x.nc", {"cube": (("b", "y", "x"), CUBE, {})}).read_bytes())
    for dim, size in ((b"b", 7), (b"y", 6), (b"x", 5)):
        old = b"\0\0\0\x01" + dim + b"\0\0\0" + size.to_bytes(4, "big")
        assert data.count(old) == 1
        data = data.replace(old, old[:-4] + (2**30).to_bytes(4, "big"))
    (tmp_path / "x.nc").write_bytes(data)
    with pytest.raises(InputDataError, match=r"x\.nc cannot be read as classic NetCDF"):
        open_raster(tmp_path / "x.nc", "cube")
