"""Damaged and hostile zarr stores: named, refused, never unpickled."""

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
import zarr

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers import open_raster

from .damage import Canary, assert_flips_are_survived, whole
from .zarr_files import CUBE, FORMATS, write, zipped


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


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
    assert_flips_are_survived(file, "cube", 80, places=2, seed=8, store=path, values=(32, 127))


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
