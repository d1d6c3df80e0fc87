"""Ingest: from a user's files to scenes, and one clear sentence when they do not fit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastdiffclip.errors import FastDiffCLIPError, InputDataError, UsageError
from fastdiffclip.scene.ingest import IngestRequest, ingest
from fastdiffclip.scene.store import open_scene, scene_summary, verify_scene

from .ingest_files import TRANSFORM, cube, npy, plots, run, tiff


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(
        ["bool", "uint8", "int8", "uint16", "int16", "float16", "float32", "float64", "int64", "uint32"]
    ).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            st.one_of(
                hnp.array_shapes(min_dims=2, max_dims=3, max_side=7),
                st.tuples(st.just(1), st.integers(1, 50)),
            ),
            elements=st.integers(-(2**20), 2**20)
            if dtype == "int64"
            else st.integers(0, 70000)
            if dtype == "uint32"
            else None,
        )
    )
)
def test_every_dtype_and_shape_round_trips(tmp_path_factory: pytest.TempPathFactory, array: np.ndarray) -> None:
    tmp_path = tmp_path_factory.mktemp("ingest")
    raster = array.reshape(*array.shape[:2], -1)
    if array.dtype.kind == "f" and not np.isfinite(raster).all(-1).any():
        with pytest.raises(InputDataError, match="no valid pixel"):
            run(tmp_path, array)
        return
    with np.errstate(over="ignore"):
        expected = raster.astype(np.float32) if array.dtype == np.float64 else raster
    if not np.isfinite(expected).all(-1).any():
        return
    run(tmp_path, array)
    scene = open_scene(tmp_path / "out.zarr")
    stored = scene.read("hsi")
    assert stored.dtype.name in ("uint16", "int16", "float16", "float32")
    np.testing.assert_array_equal(stored.astype(np.float64), expected.astype(np.float64))
    np.testing.assert_array_equal(scene.read_valid("hsi"), np.isfinite(expected).all(-1))


@pytest.mark.parametrize(("values", "dtype"), [
    ([0, 65535], "uint16"), ([-32768, 32767], "int16"), ([-5, 40000], "float32"),
    ([-(2**31), 2**24], "float32"),
])  # fmt: skip
def test_wide_integers_take_the_first_dtype_that_holds_them(tmp_path: Path, values: list[int], dtype: str) -> None:
    run(tmp_path, np.array([values], np.int64))
    assert open_scene(tmp_path / "out.zarr").modalities["hsi"].dtype == dtype


def test_integers_that_nothing_holds_exactly(tmp_path: Path) -> None:
    with pytest.raises(InputDataError, match="int64 values from 0 to 16777217 .* rescale"):
        run(tmp_path, np.array([[1, 2**24 + 1]]))


def test_everything_a_user_can_say_arrives(tmp_path: Path) -> None:
    hsi = cube()
    hsi[0, 0] = 5  # nodata in all bands
    hsi[0, 1, 0] = 5  # in one band only: valid
    (tmp_path / "w.csv").write_text("band,wavelength,fwhm\n1,0.45,1\n2,0.55,1\n3,0.65,1\n4,0.851,1\n")
    (tmp_path / "bad.txt").write_text("2\n")
    (tmp_path / "classes.csv").write_text("value,name,colour\n1,oak,#ff0000\n2,road,\n")
    labels = np.zeros((6, 7), np.uint8)
    labels[1, 1:4] = [1, 2, 2]
    height = np.linspace(0, 30, 42).reshape(6, 7)
    height[5, 6] = np.nan
    mask = np.ones((6, 7), bool)
    mask[2, 2] = False
    seen: list[float] = []
    report = ingest(
        IngestRequest(
            modalities=[("hsi", tiff(tmp_path / "hsi.tif", hsi)), ("lidar", npy(tmp_path / "h.npy", height))],
            labels=[("labels", npy(tmp_path / "gt.npy", labels))],
            classes=tmp_path / "classes.csv",
            out=tmp_path / "deep" / "out.zarr",
            valid={"hsi": npy(tmp_path / "mask.npy", mask)},
            wavelengths=tmp_path / "w.csv",
            bad_bands=tmp_path / "bad.txt",
            nodata={"hsi": 5.0},
            scale=1e-4,
            name="forest",
        ),
        progress=lambda share, text: seen.append(share),
    )
    scene = open_scene(report.scenes[0])
    modality = scene.modalities["hsi"]
    assert modality.wavelengths == (450.0, 550.0, 650.0, 851.0)
    assert modality.bad_bands == (False, True, False, False)
    assert (modality.nodata, modality.scale, modality.offset) == (5.0, 1e-4, 0.0)
    valid = mask.copy()
    valid[0, 0] = False
    np.testing.assert_array_equal(scene.read_valid("hsi"), valid)
    np.testing.assert_allclose(modality.mean, hsi[valid].mean(0) * 1e-4)
    assert scene.modalities["lidar"].scale == 1.0 and scene.modalities["lidar"].valid_pixels == 41
    assert rasterio.CRS.from_wkt(scene.crs_wkt).to_epsg() == 32617
    assert scene.affine_transform == tuple(TRANSFORM)[:6]
    assert [(c.value, c.name) for c in scene.classes] == [(1, "oak"), (2, "road")]
    assert scene.classes[0].colour == (255, 0, 0) and scene.classes[1].colour is not None
    np.testing.assert_array_equal(scene.read_labels(), labels)
    assert scene.name == "forest" and {role for role, _, _ in scene.sources} == {
        "modality hsi", "modality lidar", "labels labels", "valid hsi"
    }  # fmt: skip
    assert report.warnings == []
    assert "2 pixels invalid (1 nodata, 1 by the mask)" in report.lines[0]
    assert "1 pixels invalid (1 NaN or infinite)" in report.lines[1]
    assert "3 pixels in 2 classes" in report.lines[2]
    assert seen == sorted(seen) and seen[-1] == 1.0
    json.dumps(scene_summary(scene), allow_nan=False)


def test_nodata_rules(tmp_path: Path) -> None:
    zero = np.ones((2, 3), np.float32)
    zero[0, 0], zero[0, 1] = 0, -1
    files = {
        "named": tiff(tmp_path / "named.tif", zero, nodata=-1),
        "plain": tiff(tmp_path / "plain.tif", zero),
    }
    lidar = [("named", files["named"]), ("plain", files["plain"])]

    def invalid(nodata: object, first: str) -> list[int]:
        report = ingest(
            IngestRequest([("hsi", files[first]), *lidar], tmp_path / "o.zarr", nodata=nodata, overwrite=True)  # type: ignore[arg-type]
        )
        scene = open_scene(report.scenes[0])
        return [6 - m.valid_pixels for m in scene.modalities.values()]

    assert invalid(None, "named") == [1, 1, 0]
    assert invalid(0.0, "named") == [1, 1, 1]
    modality = open_scene(tmp_path / "o.zarr").modalities
    assert (modality["hsi"].nodata, modality["named"].nodata, modality["plain"].nodata) == (0.0, -1.0, 0.0)
    assert invalid({"plain": 0.0}, "named") == [1, 1, 1]
    assert open_scene(tmp_path / "o.zarr").modalities["hsi"].nodata == -1.0
    assert invalid(1.0, "plain") == [4, 1, 4]


def test_scale_of_the_file_and_of_the_user(tmp_path: Path) -> None:
    hsi = tiff(tmp_path / "hsi.tif", np.full((2, 2), 10, np.int16))
    with rasterio.open(hsi, "r+") as dataset:
        dataset.scales, dataset.offsets = (0.5,), (100.0,)
    for factor, mean, overwrite in ((None, 105.0, False), (2.0, 20.0, True), ({"hsi": 0.5}, 5.0, True)):
        run(tmp_path, hsi, scale=factor, overwrite=overwrite)
        assert open_scene(tmp_path / "out.zarr").modalities["hsi"].mean == (mean,)


def test_constant_bands_are_counted(tmp_path: Path) -> None:
    hsi = cube().astype(np.float64)
    hsi[..., 1] = 0.1
    hsi[..., 3] = 7
    (tmp_path / "bad.txt").write_text("0 0 0 1")
    assert run(tmp_path, hsi).warnings == ["out: hsi: 2 of 4 bands are constant and tell nothing: 2, 4"]
    assert open_scene(tmp_path / "out.zarr").modalities["hsi"].std[1] == 0.0
    assert run(tmp_path, hsi, bad_bands=tmp_path / "bad.txt", overwrite=True).warnings == [
        "out: hsi: 1 of 4 bands are constant and tell nothing: 2"
    ]


def test_float64_beyond_float32_is_invalid_not_a_warning(tmp_path: Path) -> None:
    hsi = np.ones((2, 2), np.float64)
    hsi[0, 0], hsi[0, 1] = -1.7976931348623157e308, 1e300
    run(tmp_path, hsi, nodata=-1.7976931348623157e308)
    np.testing.assert_array_equal(open_scene(tmp_path / "out.zarr").read_valid("hsi"), [[False, False], [True, True]])


def test_grids_that_differ_are_both_named(tmp_path: Path) -> None:
    plane = np.ones((6, 7), np.uint8)
    hsi = tiff(tmp_path / "hsi.tif", cube())
    others = {
        r"lidar .*o\.tif: 5 x 7 pixels.* grid of hsi .*hsi\.tif: 6 x 7 pixels.*height and width": tiff(
            tmp_path / "a" / "o.tif", plane[:5]
        ),
        "EPSG:32618.*EPSG:32617.*the CRS must be the same": tiff(tmp_path / "b" / "o.tif", plane, crs="EPSG:32618"),
        r"corner \(404025, 3284961\).*corner \(404023, 3284961\).*the transform": tiff(
            tmp_path / "c" / "o.tif", plane, shift=2
        ),
        "the transform must": tiff(tmp_path / "d" / "o.tif", plane, shift=1e-5),
    }
    for message, other in others.items():
        with pytest.raises(InputDataError, match=message):
            run(tmp_path, hsi, more=[("lidar", other)])
        with pytest.raises(InputDataError, match=message.replace("lidar", "labels 'labels'")):
            run(tmp_path, hsi, labels=[("labels", other)])
        with pytest.raises(InputDataError, match=message.replace("lidar", "validity of hsi")):
            run(tmp_path, hsi, valid={"hsi": other})
    assert not (tmp_path / "out.zarr").exists()
    run(tmp_path, hsi, more=[("lidar", tiff(tmp_path / "e" / "o.tif", plane, shift=1e-8))])


def test_georeference_comes_from_whichever_file_has_one(tmp_path: Path) -> None:
    run(tmp_path, cube(), more=[("lidar", tiff(tmp_path / "l.tif", np.ones((6, 7))))])
    scene = open_scene(tmp_path / "out.zarr")
    assert scene.crs_wkt is not None and scene.affine_transform == tuple(TRANSFORM)[:6]
    with pytest.raises(InputDataError, match="x .*x.tif.* does not lie on the grid of lidar .*l.tif"):
        run(
            tmp_path,
            cube(),
            overwrite=True,
            more=[
                ("lidar", str(tmp_path / "l.tif")),
                ("x", tiff(tmp_path / "x.tif", np.ones((6, 7)), shift=3)),
            ],
        )


def test_a_failure_in_one_of_many_scenes_leaves_none(tmp_path: Path) -> None:
    hsi = plots(tmp_path, "hsi", ["p1", "p2", "p3"])
    os.truncate(tmp_path / "hsi" / "p3.tif", 200)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputDataError, match=r"p3\.tif .*(truncated|damaged)"):
        ingest(IngestRequest([("hsi", hsi)], tmp_path / "out"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("several", [False, True])
def test_interrupt_leaves_nothing(tmp_path: Path, several: bool) -> None:
    hsi = plots(tmp_path, "hsi", ["p1", "p2"] if several else ["p1"])
    before = sorted(tmp_path.rglob("*"))

    def stop(share: float, text: str) -> None:
        if share > 0.4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        ingest(IngestRequest([("hsi", hsi)], tmp_path / "out"), stop)
    assert sorted(tmp_path.rglob("*")) == before


def test_existing_out(tmp_path: Path) -> None:
    hsi = plots(tmp_path, "hsi", ["p1", "p2"])
    ingest(IngestRequest([("hsi", hsi)], tmp_path / "out"))
    with pytest.raises(UsageError, match="exists already"):
        ingest(IngestRequest([("hsi", hsi)], tmp_path / "out"))
    plots(tmp_path, "hsi", ["p3"])
    ingest(IngestRequest([("hsi", hsi)], tmp_path / "out", overwrite=True))
    assert len(list((tmp_path / "out").iterdir())) == 3
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not replaced"):
        ingest(IngestRequest([("hsi", hsi)], tmp_path / "out", overwrite=True))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_labels_without_a_class_row(tmp_path: Path) -> None:
    (tmp_path / "classes.csv").write_text("1,oak\n")
    labels = npy(tmp_path / "gt.npy", np.tile(np.array([0, 1, 2, 2, 7, 0, 0]), (6, 1)))
    with pytest.raises(InputDataError, match=r"label values 2 \(12 pixels\), 7 \(6 pixels\)"):
        run(tmp_path, cube(), labels=[("labels", labels)], classes=tmp_path / "classes.csv")
    assert not (tmp_path / "out.zarr").exists()
    report = run(tmp_path, cube(), labels=[("train", labels), ("test", labels)])
    assert [c.name for c in open_scene(report.scenes[0]).classes] == ["class 1", "class 2", "class 7"]
    assert "called 'class N'" in report.warnings[0]


def test_labels_that_are_all_zero_are_said(tmp_path: Path) -> None:
    report = run(tmp_path, cube(), labels=[("labels", npy(tmp_path / "gt.npy", np.zeros((6, 7), np.uint8)))])
    assert "no labelled pixel" in report.warnings[0]


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"modalities": []}, UsageError, "at least one modality"),
    ({"modalities": [("hsi", "x.npy"), ("hsi", "x.npy")]}, UsageError, "modality 'hsi' is given twice"),
    ({"modalities": [("HSI", "x.npy")]}, UsageError, "cannot name a modality"),
    ({"labels": [("lables", "x.npy")]}, UsageError, r"no label map \(did you mean 'labels'\?\)"),
    ({"valid": {"lidar": "x.npy"}}, UsageError, "valid is given for 'lidar'"),
    ({"nodata": {"hsy": 0.0}}, UsageError, r"did you mean 'hsi'\?"),
    ({"modalities": [("hsi", "none.npy")]}, InputDataError, "there is no file none.npy"),
    ({"modalities": [("hsi", "x.npy:VAR")]}, InputDataError, "leave out ':VAR'"),
    ({"modalities": [("hsi", "x.jpg")]}, InputDataError, r"give one of \.mat"),
    ({"valid": {"hsi": "x.npy"}}, InputDataError, "has 4 bands, expected one"),
    ({"labels": [("labels", "x.npy")]}, InputDataError, "have 4 bands, expected one"),
    ({"classes": "none.csv"}, InputDataError, "none.csv cannot be read"),
    ({"wavelengths": "none.txt"}, InputDataError, "there is no file none.txt"),
    ({"nodata": 1.0, "modalities": [("hsi", "ones.npy")]}, InputDataError, r"no valid pixel \(4 nodata\)"),
    ({"modalities": [("hsi", "*.npy")], "name": "x"}, UsageError, "a name fits one scene"),
])  # fmt: skip
def test_wrong_requests(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict,
    error: type[FastDiffCLIPError],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", cube())
    np.save("ones.npy", np.ones((2, 2)))
    Path("x.jpg").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        ingest(IngestRequest(**{"modalities": [("hsi", "x.npy")], "out": "out.zarr", **change}))
    assert sorted(tmp_path.rglob("*")) == before


def test_one_band_one_pixel(tmp_path: Path) -> None:
    report = run(tmp_path, np.array([[3.5]]))
    scene = open_scene(report.scenes[0])
    assert (scene.height, scene.width, scene.modalities["hsi"].bands) == (1, 1, 1)
    assert scene.modalities["hsi"].mean == (3.5,) and verify_scene(report.scenes[0]).ok
