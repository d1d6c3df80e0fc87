"""Scene store: round trips, what xarray and users read of it, and every kind of damage."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.scene import layout
from fastdiffclip.scene.store import ClassInfo, open_scene, scene_summary, verify_scene
from fastdiffclip.scene.writer import SceneWriter

from .small_scenes import write_small

WKT = 'LOCAL_CS["plane",UNIT["metre",1]]'
TRANSFORM = (2.0, 0.0, 500.25, 0.0, -2.0, 1000.75)


@pytest.fixture
def scene_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scene of several chunks in each direction."""
    monkeypatch.setattr(layout, "_CHUNK_BYTES", 1000)
    write_small(tmp_path / "small.zarr", crs_wkt=WKT, affine_transform=TRANSFORM)
    return tmp_path / "small.zarr"


def chunk_of(path: Path, array: str, position: str) -> Path:
    return path / array / "c" / position


@settings(max_examples=40, deadline=None)
@given(
    cube=st.sampled_from(layout.MODALITY_DTYPES).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            st.one_of(
                hnp.array_shapes(min_dims=3, max_dims=3, max_side=9),
                st.tuples(st.just(1), st.integers(1, 40), st.just(1)),
            ),
        )
    ),
    chunk_bytes=st.sampled_from([1, 64, 500, 2**21]),
    window=st.tuples(*[st.integers(-3, 12)] * 4),
)
def test_round_trip(cube: np.ndarray, chunk_bytes: int, window: tuple[int, int, int, int]) -> None:
    height, width, bands = cube.shape
    rows, columns = slice(*window[:2]), slice(*window[2:])
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "_CHUNK_BYTES", chunk_bytes)
        path = Path(folder) / "s.zarr"
        with SceneWriter(path, height=height, width=width) as writer:
            writer.add_modality("hsi", lambda part: cube[part], bands=bands, dtype=cube.dtype.name)
        scene = open_scene(path)
        np.testing.assert_array_equal(scene.read("hsi"), cube)
        assert scene.read("hsi").dtype == cube.dtype
        np.testing.assert_array_equal(scene.read("hsi", rows, columns), cube[rows, columns])
        valid = np.isfinite(cube).all(axis=-1)
        np.testing.assert_array_equal(scene.read_valid("hsi", rows, columns), valid[rows, columns])
        np.testing.assert_array_equal(zarr.open_array(path / "hsi", mode="r")[...], cube)
        modality, used = scene.modalities["hsi"], cube[valid].astype(np.float64)
        assert modality.valid_pixels == len(used)
        if len(used):
            np.testing.assert_allclose(modality.mean, used.mean(0), rtol=1e-6, atol=1e-12)
            spread = 1e-6 * np.abs(used).max() + 1e-12
            np.testing.assert_allclose(modality.std, used.std(0), rtol=1e-6, atol=spread)
        assert verify_scene(path).ok


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20000), st.integers(1, 20000), st.integers(1, 600), st.sampled_from([1, 2, 4]))
def test_chunks_hold_one_to_four_mebibytes(height: int, width: int, bands: int, itemsize: int) -> None:
    rows, columns = layout.chunk_shape(height, width, bands, itemsize)
    assert 1 <= rows <= height and 1 <= columns <= width
    size = rows * columns * bands * itemsize
    assert size <= 4 * 2**20
    if height * width * bands * itemsize >= 2**22 and min(height, width) > 100:
        assert size >= 2**20 * 0.9
    assert rows * width * bands * itemsize <= max(200 * 2**20, width * bands * itemsize)


def test_everything_said_comes_back(tmp_path: Path) -> None:
    hsi = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    with SceneWriter(tmp_path / "x.zarr", height=2, width=4, crs_wkt=WKT, affine_transform=TRANSFORM, name="n") as w:
        returned = w.add_modality(
            "hsi", hsi, bands=3, dtype="float32", wavelengths=(1, 2.5, 3), fwhm=(1, 1, 2), nodata=math.nan,
            bad_bands=(False, True, False), scale=0.5, offset=-1.0,
        )  # fmt: skip
        w.add_labels("train", np.ones((2, 4), np.int64))
        w.add_labels("test", np.full((2, 4), 65535, np.uint16))
        w.set_classes([ClassInfo(1, "a"), ClassInfo(65535, "b", "text", (9, 8, 7))])
    scene = open_scene(tmp_path / "x.zarr")
    read = scene.modalities["hsi"]
    assert math.isnan(read.nodata or 0.0)
    assert {**vars(read), "nodata": 0} == {**vars(returned), "nodata": 0}
    assert read.wavelengths == (1.0, 2.5, 3.0) and read.bad_bands == (False, True, False)
    np.testing.assert_allclose(read.mean, (hsi * 0.5 - 1).mean((0, 1)))
    np.testing.assert_allclose(read.std, (hsi * 0.5 - 1).std((0, 1)))
    assert (scene.name, scene.crs_wkt, scene.affine_transform) == ("n", WKT, TRANSFORM)
    assert scene.label_maps == ("train", "test") and scene.classes[1] == ClassInfo(65535, "b", "text", (9, 8, 7))
    assert scene.read_labels("test").dtype == np.uint16 and (scene.read_labels("test") == 65535).all()


def test_content_decides_the_sha256(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_small(tmp_path / name, name="same")
    write_small(tmp_path / "c", name="same", width=41)
    one, two, three = (open_scene(tmp_path / name).sha256 for name in "abc")
    assert one == two != three


def test_xarray_reads_it(scene_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    scene = open_scene(scene_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = xarray.open_zarr(scene_path, consolidated=False, decode_coords="all", chunks=None)
    assert dataset["hsi"].dims == ("y", "x", "band")
    assert dataset["lidar"].dims == ("y", "x", "band_lidar")
    for name in ("hsi", "lidar"):
        np.testing.assert_array_equal(dataset[name].values, scene.read(name))
        np.testing.assert_array_equal(dataset[f"{name}_valid"].values, scene.read_valid(name))
    np.testing.assert_array_equal(dataset["labels"].values, scene.read_labels())
    reference = dataset["spatial_ref"].attrs
    assert reference["crs_wkt"] == WKT
    assert [float(n) for n in reference["GeoTransform"].split()] == [500.25, 2.0, 0.0, 1000.75, 0.0, -2.0]
    assert dataset.attrs["proj:wkt2"] == WKT
    assert dataset.attrs["spatial:transform"] == list(TRANSFORM)
    assert dataset.attrs["spatial:bbox"] == [500.25, 940.75, 580.25, 1000.75]


def test_summary_is_json(scene_path: Path) -> None:
    summary = json.loads(json.dumps(scene_summary(open_scene(scene_path)), allow_nan=False))
    labelled = int((open_scene(scene_path).read_labels() == 7).sum())
    assert summary["label_maps"] == {"labels": labelled}
    assert [row["pixels"]["labels"] for row in summary["classes"]] == [0, labelled]
    assert summary["modalities"][0]["wavelength_range"] == [400, 404]
    assert summary["sources"] == [{"role": "modality hsi", "file": "cube.mat", "sha256": "ab" * 32}]
    arrays = [p for p in scene_path.rglob("*") if p.is_file() and p.name != "zarr.json"]
    assert summary["bytes"] == sum(p.stat().st_size for p in arrays)


def test_wrong_names_are_usage_errors(scene_path: Path) -> None:
    scene = open_scene(scene_path)
    with pytest.raises(UsageError, match=r"no modality 'lidr' \(did you mean 'lidar'\?\)"):
        scene.read("lidr")
    with pytest.raises(UsageError, match="no label map 'train'; it has labels"):
        scene.read_labels("train")
    with pytest.raises(UsageError, match="contiguous"):
        scene.read("hsi", slice(None, None, 2))


@pytest.mark.parametrize("array", ["hsi", "hsi_valid", "lidar", "labels"])
def test_missing_chunk_is_named(scene_path: Path, array: str) -> None:
    scene = open_scene(scene_path)
    victim = sorted(p for p in (scene_path / array / "c").rglob("*") if p.is_file())[-1]
    position = str(victim.relative_to(scene_path / array / "c"))
    victim.unlink()
    message = f"array '{array}', chunk {position} is missing"
    with pytest.raises(InputDataError, match=message):
        open_scene(scene_path)
    reader = {"hsi_valid": lambda: scene.read_valid("hsi"), "labels": scene.read_labels}
    with pytest.raises(InputDataError, match=message):
        reader.get(array, lambda: scene.read(array))()
    assert [message in problem for problem in verify_scene(scene_path).problems] == [True]


def test_truncated_chunk_is_named(scene_path: Path) -> None:
    victim = chunk_of(scene_path, "hsi", "1/0/0")
    os.truncate(victim, victim.stat().st_size - 1)
    with pytest.raises(InputDataError, match=r"array 'hsi', chunk 1/0/0 has \d+ bytes instead of \d+"):
        open_scene(scene_path)


@pytest.mark.parametrize("offset", [0, 17, -5, -1])
def test_flipped_byte_is_named(scene_path: Path, offset: int) -> None:
    victim = chunk_of(scene_path, "hsi", "1/1/0")
    data = bytearray(victim.read_bytes())
    data[offset] ^= 1
    victim.write_bytes(data)
    scene = open_scene(scene_path)  # contents are looked at when they are read
    rows, columns = scene.chunk_rows("hsi"), scene.chunk_cols("hsi")
    scene.read("hsi", slice(0, rows))
    with pytest.raises(InputDataError, match=r"array 'hsi', chunk 1/1/0 is damaged.*hsi/c/1/1/0"):
        scene.read("hsi", slice(rows, rows + 1), slice(columns, columns + 1))
    report = verify_scene(scene_path)
    assert not report.ok and len(report.problems) == 1 and "chunk 1/1/0" in report.problems[0]


def test_chunks_that_changed_places_are_noticed(scene_path: Path) -> None:
    shutil.copy(chunk_of(scene_path, "hsi", "0/0/0"), chunk_of(scene_path, "hsi", "0/1/0"))
    with pytest.raises(InputDataError, match="chunk 0/1/0 is damaged"):
        open_scene(scene_path).read("hsi")


def test_missing_unfinished_and_foreign_are_refused(tmp_path: Path, scene_path: Path) -> None:
    with pytest.raises(InputDataError, match="there is no scene at"):
        open_scene(tmp_path / "nowhere.zarr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputDataError, match="is not a scene"):
        open_scene(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputDataError, match="is not a scene"):
        open_scene(tmp_path / "file")
    zarr.create_group(tmp_path / "foreign.zarr", zarr_format=3)
    with pytest.raises(InputDataError, match="another program's zarr store"):
        verify_scene(tmp_path / "foreign.zarr")
    shutil.rmtree(scene_path / "manifest")
    with pytest.raises(InputDataError, match="unfinished scene"):
        open_scene(scene_path)


def edit_json(file: Path, change: object) -> None:
    content = json.loads(file.read_text())
    change(content)  # type: ignore[operator]
    file.write_text(json.dumps(content))


def test_truncated_or_edited_metadata_is_refused(scene_path: Path) -> None:
    manifest, group, array = (scene_path / part / "zarr.json" for part in ("manifest", "", "hsi"))
    for file, message in (
        (array, "metadata of array 'hsi'.* changed"),
        (group, "metadata of scene .* changed"),
    ):
        original = file.read_bytes()
        edit_json(file, lambda content: content.update(extra=1))
        with pytest.raises(InputDataError, match=message):
            open_scene(scene_path)
        file.write_bytes(original)
    os.truncate(manifest, manifest.stat().st_size // 2)
    with pytest.raises(InputDataError, match="manifest of scene .* damaged"):
        open_scene(scene_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_type", "|O"),
        ("codecs", [{"name": "bytes"}, {"name": "pickle"}]),
        ("codecs", [{"name": "vlen-utf8"}]),
        ("shape", [2**50, 2**14, 5]),
        ("chunk_key_encoding", {"name": "v2"}),
        ("storage_transformers", [{"name": "x"}]),
    ],
)
def test_hostile_metadata_is_refused_before_zarr_sees_it(scene_path: Path, key: str, value: object) -> None:
    """Also with checksums made to fit, only the few known forms are opened."""
    edit_json(scene_path / "hsi" / "zarr.json", lambda content: content.update({key: value}))
    digest = layout.file_sha256(scene_path / "hsi" / "zarr.json")
    entry = {"data_type": "dtype", "shape": "shape"}.get(key)

    def forge(content: dict) -> None:
        content["attributes"]["arrays"]["hsi"]["metadata_sha256"] = digest
        if entry:
            content["attributes"]["arrays"]["hsi"][entry] = value

    edit_json(scene_path / "manifest" / "zarr.json", forge)
    with pytest.raises(InputDataError):
        open_scene(scene_path)


def test_newer_format_says_so(scene_path: Path) -> None:
    edit_json(scene_path / "manifest" / "zarr.json", lambda c: c["attributes"].update(version=99))
    with pytest.raises(InputDataError, match="scene format 99, this version reads 1"):
        open_scene(scene_path)
