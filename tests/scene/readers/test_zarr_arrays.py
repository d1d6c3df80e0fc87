"""zarr of both formats as input: values, and what conventions say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import rasterio
import rasterio.shutil
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.ingest import IngestRequest, ingest
from fastdiffclip.scene.readers import expand, open_raster
from fastdiffclip.scene.store import Scene, open_scene

from .damage import whole
from .zarr_files import CUBE, FORMATS, write, zipped

UTM = CRS.from_epsg(32617)
PLACE = (2.0, 0.0, 404000.0, 0.0, -2.0, 3285000.0)


@settings(max_examples=25, deadline=None)
@given(
    version=st.sampled_from([2, 3]),
    dtype=st.sampled_from(["u1", "i1", ">u2", "i2", "u4", "i8", "f2", "f4", ">f8", "bool"]),
    chunks=st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(1, 5)),
    compressor=st.sampled_from(["auto", None, "gzip", "shards"]),
    archive=st.booleans(),
    step=st.integers(1, 9),
)
def test_any_dtype_chunking_and_codec(
    tmp_path_factory: pytest.TempPathFactory,
    version: int,
    dtype: str,
    chunks: tuple[int, int, int],
    compressor: str | None,
    archive: bool,
    step: int,
) -> None:
    cube = (CUBE % 100).astype(np.dtype(dtype).newbyteorder("=") if version == 3 else dtype)
    options: dict[str, Any] = {"chunks": chunks}
    if compressor is None:
        options["compressors"] = None
    elif compressor == "gzip":
        options["compressors"] = zarr.codecs.GzipCodec() if version == 3 else numcodecs.GZip()
    elif compressor == "shards" and version == 3:
        options["shards"] = tuple(2 * size for size in chunks)
    path = write(tmp_path_factory.mktemp("z") / "x.zarr", cube, version, **options)
    with open_raster(zipped(path) if archive else path) as source:
        assert source.dtype == cube.dtype.newbyteorder("=")
        np.testing.assert_array_equal(whole(source, step), cube)


@FORMATS
@pytest.mark.parametrize("order", ["yxb", "byx"])
def test_what_xarray_writes(tmp_path: Path, version: int, order: str) -> None:
    dims = {"y": "y", "x": "x", "b": "wavelength"}
    data = CUBE.astype(np.float32)
    data[0, 0] = np.nan
    cube = xarray.DataArray(
        data.transpose(["yxb".index(axis) for axis in order]),
        dims=[dims[axis] for axis in order],
        coords={
            "x": 404001.0 + 2 * np.arange(8),
            "y": 3284999.0 - 2 * np.arange(9),
            "wavelength": np.linspace(400, 800, 5),
        },
        name="cube",
        attrs={"grid_mapping": "spatial_ref"},
    )
    cube["wavelength"].attrs["units"] = "nm"
    dataset = cube.to_dataset().assign_coords(spatial_ref=((), 0, {"crs_wkt": UTM.to_wkt()}))
    encoding = {"cube": {"dtype": "int16", "scale_factor": 0.5, "_FillValue": np.int16(-9999)}}
    dataset.to_zarr(tmp_path / "x.zarr", zarr_format=version, encoding=encoding, consolidated=False)
    with open_raster(tmp_path / "x.zarr") as source:
        assert source.dtype == np.int16 and (source.nodata, source.scale) == (-9999.0, 0.5)
        expected = CUBE * 2
        expected[0, 0] = -9999
        np.testing.assert_array_equal(whole(source), expected)
        assert source.wavelengths == (400.0, 500.0, 600.0, 700.0, 800.0)
        assert source.affine_transform == PLACE
        assert source.crs_wkt is not None and CRS.from_wkt(source.crs_wkt) == UTM


@FORMATS
def test_fill_values_of_floats_as_xarray_spells_them(tmp_path: Path, version: int) -> None:
    cube = xarray.DataArray(CUBE.astype(np.float32), dims=["y", "x", "band"], name="cube")
    encoding = {"cube": {"_FillValue": np.float32(-9999)}}
    cube.to_dataset().to_zarr(tmp_path / "x.zarr", zarr_format=version, encoding=encoding, consolidated=False)
    with open_raster(tmp_path / "x.zarr") as source:
        assert source.nodata == -9999.0


@FORMATS
@pytest.mark.parametrize("of_group", [False, True])
def test_geozarr_attributes(tmp_path: Path, version: int, of_group: bool) -> None:
    attributes = {"spatial:transform": list(PLACE), "spatial:dimensions": ["y", "x"], "proj:code": "EPSG:32617"}
    path = write(tmp_path / "x.zarr", version=version, attributes={} if of_group else attributes)
    if of_group:
        zarr.open_group(path).attrs.update(attributes)
    with open_raster(path) as source:
        assert source.affine_transform == PLACE
        assert source.crs_wkt is not None and CRS.from_wkt(source.crs_wkt) == UTM


def test_what_gdal_writes(tmp_path: Path) -> None:
    profile = {"height": 9, "width": 8, "count": 5, "dtype": "int16", "transform": rasterio.Affine(*PLACE), "crs": UTM}
    with rasterio.open(tmp_path / "x.tif", "w", driver="GTiff", **profile) as dataset:
        dataset.write(np.moveaxis(CUBE, 2, 0))
    rasterio.shutil.copy(str(tmp_path / "x.tif"), str(tmp_path / "x.zarr"), driver="Zarr", FORMAT="ZARR_V2")
    with open_raster(tmp_path / "x.zarr") as source:
        np.testing.assert_array_equal(whole(source), CUBE)
        assert source.affine_transform == PLACE


@FORMATS
def test_names_of_arrays(tmp_path: Path, version: int) -> None:
    path = write(tmp_path / "x.zarr", version=version, name="a/cube")
    write(path, CUBE[:, :, 0], version, name="a/dsm")
    for name, expected in {"a/cube": CUBE, "/a/dsm": CUBE[:, :, :1], "dsm": CUBE[:, :, :1]}.items():
        files, variable = expand(f"{path}:{name}")
        with open_raster(files[0], variable) as source:
            np.testing.assert_array_equal(whole(source), expected)
    with pytest.raises(InputDataError, match=r"x\.zarr has no array 'b'.*holds /a/cube \(9 x 8 x 5 int16\), /a/dsm"):
        open_raster(path, "b")
    with open_raster(path / "a" / "cube") as source:  # an array that is a store of its own
        np.testing.assert_array_equal(whole(source), CUBE)
    for name in ("../x.zarr/a/cube", "a/../a/cube", str(path / "a/cube")):
        with pytest.raises(InputDataError, match="has no array"):
            open_raster(path, name)


def test_the_index_of_a_shard_may_stand_first(tmp_path: Path) -> None:
    shards = zarr.codecs.ShardingCodec(chunk_shape=(4, 3, 5), index_location="start")
    group = zarr.open_group(tmp_path / "x.zarr", mode="a")
    group.create_array("cube", data=CUBE, chunks=(8, 6, 5), serializer=shards, compressors=None, filters=None)
    with open_raster(tmp_path / "x.zarr") as source:
        np.testing.assert_array_equal(whole(source), CUBE)


def test_a_scene_of_ours_is_read_by_its_names(tmp_path: Path, small_scene: Scene) -> None:
    with pytest.raises(InputDataError, match=r"holds hsi \(24 x 30 x 12 uint16\), lidar .*labels .*small\.zarr:hsi"):
        open_raster(small_scene.path)
    with open_raster(small_scene.path, "hsi") as source:
        np.testing.assert_array_equal(whole(source), small_scene.read("hsi"))
        assert source.wavelengths == small_scene.modalities["hsi"].wavelengths and source.scale == 1e-4
        assert (source.crs_wkt, source.affine_transform) == (small_scene.crs_wkt, small_scene.affine_transform)
    with open_raster(small_scene.path, "lidar") as source:
        assert source.read_mask is not None
        np.testing.assert_array_equal(source.read_mask(slice(3, 9)), small_scene.read_valid("lidar", slice(3, 9)))
    with open_raster(small_scene.path, "labels") as source:
        np.testing.assert_array_equal(whole(source)[..., 0], small_scene.read_labels())
        assert source.class_names[2] == "roof" and source.class_colours[2] == (200, 60, 40)
    spec = str(small_scene.path)
    ingest(IngestRequest([("hsi", f"{spec}:hsi")], tmp_path / "out.zarr", [("labels", f"{spec}:labels")]))
    again = open_scene(tmp_path / "out.zarr")
    np.testing.assert_array_equal(again.read("hsi"), small_scene.read("hsi"))
    assert [info.name for info in again.classes] == ["grass", "roof", "water"]
    with open_raster(tmp_path / "out.zarr") as source:  # its only modality needs no name
        assert source.bands == 12


@FORMATS
@pytest.mark.parametrize("archive", [False, True])
def test_ingest_brings_everything_into_the_scene(tmp_path: Path, version: int, archive: bool) -> None:
    cube = CUBE.copy()
    cube[0, 0] = -1
    attributes = {
        "spatial:transform": list(PLACE), "proj:wkt2": UTM.to_wkt(), "_FillValue": -1, "scale_factor": 1e-4,
        "wavelengths": [0.4, 0.5, 0.6, 0.7, 0.8], "fwhm": [0.01] * 5, "good_bands": [1, 1, 0, 1, 1],
    }  # fmt: skip
    path = write(tmp_path / "x.zarr", cube, version, attributes=attributes)
    write(path, (CUBE[:, :, 0] % 3).astype(np.uint8), version, name="gt")
    spec = zipped(path) if archive else path
    ingest(IngestRequest([("hsi", f"{spec}:cube")], tmp_path / "out.zarr", [("labels", f"{spec}:gt")]))
    scene = open_scene(tmp_path / "out.zarr")
    hsi = scene.modalities["hsi"]
    np.testing.assert_array_equal(scene.read("hsi"), cube)
    assert hsi.wavelengths == (400.0, 500.0, 600.0, 700.0, 800.0) and hsi.fwhm == (10.0,) * 5
    assert hsi.bad_bands == (False, False, True, False, False)
    assert (hsi.nodata, hsi.scale, hsi.valid_pixels) == (-1.0, 1e-4, 71)
    assert scene.affine_transform == PLACE and scene.crs_wkt is not None and CRS.from_wkt(scene.crs_wkt) == UTM
    np.testing.assert_array_equal(scene.read_labels(), CUBE[:, :, 0] % 3)
    assert len({digest for _, _, digest in scene.sources}) == 1
