"""zarr of both formats as input: values, what conventions say, what is missing, what is refused unopened."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
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
from fastdiffclip.scene.readers.source import RasterSource
from fastdiffclip.scene.store import Scene, open_scene

CUBE = np.random.default_rng(6).integers(1, 9999, (9, 8, 5)).astype(np.int16)
UTM = CRS.from_epsg(32617)
PLACE = (2.0, 0.0, 404000.0, 0.0, -2.0, 3285000.0)
FORMATS = pytest.mark.parametrize("version", [2, 3])


def whole(source: RasterSource, step: int = 2) -> np.ndarray:
    starts = range(0, source.height, step)
    return np.concatenate([source.read_rows(slice(r, min(r + step, source.height))) for r in starts])


def write(path: Path, cube: np.ndarray = CUBE, version: int = 3, name: str = "cube", **options: Any) -> Path:
    """Write one array into a group; every chunk is written unless the options say otherwise."""
    group = zarr.open_group(path, mode="a", zarr_format=version)
    config = {"write_empty_chunks": options.pop("write_empty_chunks", True)}
    attributes = options.pop("attributes", {})
    array = group.create_array(
        name, shape=cube.shape, dtype=cube.dtype, **{"chunks": (4, 3, 5)[: cube.ndim], "config": config, **options}
    )
    array[...] = cube
    array.attrs.update(attributes)
    return path


def zipped(folder: Path, method: int = zipfile.ZIP_STORED) -> Path:
    path = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return path


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


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


@FORMATS
def test_a_missing_chunk_is_named(tmp_path: Path, version: int) -> None:
    path = write(tmp_path / "x.zarr", version=version)
    key = "cube/c/1/2/0" if version == 3 else "cube/1.2.0"
    (path / key).unlink()
    with open_raster(path) as source:
        np.testing.assert_array_equal(source.read_rows(slice(0, 4)), CUBE[:4])
        with pytest.raises(InputDataError, match=rf"x\.zarr:/cube lacks the chunk {key}, and its fill value 0\.0 is"):
            source.read_rows(slice(3, 5))


@FORMATS
def test_chunks_of_declared_nodata_may_be_missing(tmp_path: Path, version: int) -> None:
    cube = np.full((9, 8, 5), -9999, np.int16)
    cube[:4] = CUBE[:4]
    path = write(
        tmp_path / "x.zarr", cube, version, fill_value=-9999, write_empty_chunks=False, attributes={"_FillValue": -9999}
    )
    assert len([file for file in path.rglob("*") if file.is_file()]) < 10
    with open_raster(path) as source:
        np.testing.assert_array_equal(whole(source), cube)
        assert source.nodata == -9999.0


def test_a_missing_piece_of_a_shard_is_named(tmp_path: Path) -> None:
    cube = CUBE.copy()
    cube[4:8, 3:6] = 0
    path = write(tmp_path / "x.zarr", cube, shards=(8, 6, 5), write_empty_chunks=False)
    with open_raster(path) as source:
        np.testing.assert_array_equal(source.read_rows(slice(0, 4)), cube[:4])
        with pytest.raises(InputDataError, match=r"lacks the piece 1\.1\.0 of the shard cube/c/0/0/0, and its fill"):
            source.read_rows(slice(4, 5))


def test_the_index_of_a_shard_may_stand_first(tmp_path: Path) -> None:
    shards = zarr.codecs.ShardingCodec(chunk_shape=(4, 3, 5), index_location="start")
    group = zarr.open_group(tmp_path / "x.zarr", mode="a")
    group.create_array("cube", data=CUBE, chunks=(8, 6, 5), serializer=shards, compressors=None, filters=None)
    with open_raster(tmp_path / "x.zarr") as source:
        np.testing.assert_array_equal(whole(source), CUBE)


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


def test_object_codecs_are_refused_unopened(tmp_path: Path) -> None:
    bird = tmp_path / "sang"
    song = pickle.dumps(np.array([[Canary(bird)] * 2] * 2, object))
    root = tmp_path / "x.zarr"
    (root / "objects").mkdir(parents=True)
    (root / ".zgroup").write_text('{"zarr_format": 2}')
    array = {
        "zarr_format": 2, "shape": [2, 2], "chunks": [2, 2], "dtype": "|O", "fill_value": None, "order": "C",
        "compressor": None, "filters": [{"id": "pickle", "protocol": 5}],
    }  # fmt: skip
    for name, change in {
        "objects": {},
        "numbers": {"dtype": "<f8"},
        "compressed": {"dtype": "<f8", "filters": None, "compressor": {"id": "pickle"}},
    }.items():
        (root / name).mkdir(exist_ok=True)
        (root / name / ".zarray").write_text(json.dumps({**array, **change}))
        (root / name / "0.0").write_bytes(song)
    with pytest.raises(InputDataError, match=r"/objects holds Python objects, expected real numbers"):
        open_raster(root, "objects")
    for name in ("numbers", "compressed"):
        with pytest.raises(InputDataError, match=rf"/{name} needs pickle, which is not read: expected codecs of "):
            open_raster(root, name)
    assert not bird.exists()
    pickle.loads(song)
    assert bird.exists()  # the canary does sing when somebody lets it


@pytest.mark.parametrize(("change", "message"), [
    ({"data_type": "string"}, "holds string, expected real numbers"),
    ({"data_type": {"name": "numpy.datetime64", "configuration": {}}}, "holds .*, expected real numbers"),
    ({"codecs": [{"name": "vlen-utf8"}]}, "needs vlen-utf8, which is not read"),
    ({"codecs": [{"name": "bytes"}, {"name": "numcodecs.pickle", "configuration": {}}]}, "needs numcodecs.pickle"),
    ({"storage_transformers": [{"name": "x"}]}, "needs storage_transformers"),
    ({"chunk_grid": {"name": "rectangular", "configuration": {"chunk_shape": [4, 3, 5]}}}, "needs rectangular"),
    ({"shape": [2**40, 2**20, 4]}, r"declares \d{19} bytes and the file holds"),
    ({"shape": [9, 8, -1]}, r"has metadata that are damaged .*is no shape"),
    ({"shape": "big"}, "has metadata that are damaged"),
    ({"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 3, 5]}}}, "has metadata that are damaged"),
    ({"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 3]}}}, "has metadata that are damaged"),
    ({"codecs": None}, "has metadata that are damaged"),
])  # fmt: skip
def test_metadata_that_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "x.zarr")
    edit(path / "cube" / "zarr.json", lambda found: found.update(change))
    for store in (path, zipped(path)):
        with pytest.raises(InputDataError, match=rf"x\.zarr.*:/cube {message}"):
            open_raster(store, "cube@yxb")


def test_links_out_of_the_store_are_refused(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside.zarr")
    path = write(tmp_path / "x.zarr")
    chunk = path / "cube/c/0/0/0"
    chunk.unlink()
    chunk.symlink_to(outside / "cube/c/0/0/0")
    with open_raster(path) as source, pytest.raises(InputDataError, match="leads out of the store: 'cube/c/0/0/0'"):
        whole(source)
    (path / "linked").symlink_to(outside / "cube")
    with pytest.raises(InputDataError, match=r"x\.zarr:/linked is a link, which is not followed"):
        open_raster(path, "linked")
    (path / "cube" / "zarr.json").unlink()
    (path / "cube" / "zarr.json").symlink_to(outside / "cube" / "zarr.json")
    with pytest.raises(InputDataError, match="leads out of the store"):
        open_raster(path, "cube")


def test_a_chunk_that_is_no_file_does_not_hang(tmp_path: Path) -> None:
    path = write(tmp_path / "x.zarr")
    (path / "cube/c/0/0/0").unlink()
    os.mkfifo(path / "cube/c/0/0/0")
    with open_raster(path) as source, pytest.raises(InputDataError, match="'cube/c/0/0/0' is no regular file"):
        whole(source)


@pytest.mark.parametrize(("version", "codec"), [
    (2, numcodecs.Blosc()), (2, numcodecs.Zlib()), (2, numcodecs.Zstd()), (2, numcodecs.LZ4()), (2, numcodecs.BZ2()),
    (2, numcodecs.LZMA()), (2, None), (3, zarr.codecs.BloscCodec()), (3, zarr.codecs.GzipCodec()),
    (3, zarr.codecs.ZstdCodec()), (3, None), (3, (zarr.codecs.BloscCodec(), zarr.codecs.Crc32cCodec())), (3, "shards"),
])  # fmt: skip
def test_truncated_and_damaged_chunks(tmp_path: Path, version: int, codec: Any) -> None:
    blosc = zarr.codecs.BloscCodec()
    options = {"compressors": codec} if codec != "shards" else {"compressors": blosc, "shards": (4, 6, 5)}
    path = write(tmp_path / "x.zarr", version=version, **options)
    chunk = path / ("cube/c/0/0/0" if version == 3 else "cube/0.0.0")
    data = chunk.read_bytes()
    with open_raster(path) as source:
        np.testing.assert_array_equal(whole(source), CUBE)
    damaged = [data[:size] for size in (0, 1, 5, 15, 16, 17, len(data) // 2, len(data) - 5, len(data) - 1)]
    for chunk_bytes in damaged + ([b"\xff" * len(data), data[::-1]] if codec is not None else []):
        chunk.write_bytes(chunk_bytes)
        reasons = r"x\.zarr:/cube (cannot be read as a zarr store, it may be truncated|lacks the piece)"
        with open_raster(path) as source, pytest.raises(InputDataError, match=reasons):
            whole(source)


@FORMATS
def test_flipped_bytes_of_metadata_are_survived(tmp_path: Path, version: int) -> None:
    path = write(tmp_path / "x.zarr", version=version)
    file = path / "cube" / ("zarr.json" if version == 3 else ".zarray")
    data = file.read_bytes()
    rng = np.random.default_rng(8)
    for _ in range(80):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 2):
            damaged[place] = rng.integers(32, 127)
        file.write_bytes(damaged)
        try:
            with open_raster(path, "cube") as source:
                whole(source)
        except InputDataError as error:
            assert "x.zarr" in str(error) and "\n" not in str(error)


def test_archives_that_climb_or_claim_too_much(tmp_path: Path) -> None:
    path = zipped(write(tmp_path / "x.zarr"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../climbed/zarr.json", "{}")
    with pytest.raises(InputDataError, match=r"x\.zarr\.zip is refused: its entry '\.\./\.\./climbed/.*' climbs out"):
        open_raster(path)
    shutil.rmtree(tmp_path / "x.zarr")
    path = zipped(write(tmp_path / "x.zarr"), zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (2**31).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(InputDataError, match=r"claims to unpack to 2147483648 bytes"):
        open_raster(path)
    for damaged in (bytes(data[:200]), b"PK\x03\x04", b"text" * 100):
        path.write_bytes(damaged)
        with pytest.raises(InputDataError, match=r"x\.zarr\.zip cannot be read as a zarr store"):
            open_raster(path)
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "no store")
    path.write_bytes(other.getvalue())
    with pytest.raises(InputDataError, match="is no zarr store"):
        open_raster(path)


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
