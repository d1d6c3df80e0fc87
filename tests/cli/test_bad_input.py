"""Bad input: one sentence, exit code 3, nothing half-written; and input that looks bad but works."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .console import BANDS, FULL, HEIGHT, WIDTH, leftovers, tiny

Call = Callable[..., Any]


def refused(result: Any, folder: Path, *words: str, out: str = "x.zarr") -> None:
    result.one_sentence(3, *words)
    assert not (folder / out).exists() and leftovers(folder) == []


def test_a_missing_variable_lists_what_is_there(real: Call, call: Call, files: Path) -> None:
    arguments = ["ingest", "--hsi", "cube.mat:hsi", "--out", "x.zarr"]
    refused(real(arguments, files), files, "'hsi'", "HSI (30 x 40 x 8 uint16)", "other (3 x 3 double)")
    refused(call(["ingest", "--hsi", "cube.mat", "--out", "x.zarr"], files), files, "HSI", "other", "cube.mat:HSI")


def test_a_missing_file(call: Call, files: Path) -> None:
    refused(call(["ingest", "--hsi", "nowhere.tif", "--out", "x.zarr"], files), files, "nowhere.tif")
    refused(call(["ingest", "--hsi", "no*.tif", "--out", "x.zarr"], files), files, "no*.tif")
    call(["scene", "info", "nowhere.zarr"], files).one_sentence(3, "nowhere.zarr")
    call(["train-umd", "nowhere.zarr"], files).one_sentence(3, "nowhere.zarr")


def test_shapes_that_do_not_match_are_both_named(call: Call, files: Path) -> None:
    np.save(files / "small.npy", np.zeros((20, 20), np.float32))
    words = ["cube.npy", "30 x 40", "small.npy", "20 x 20"]
    with_modality = ["ingest", "--hsi", "cube.npy", "--modality", "lidar=small.npy", "--out", "x.zarr"]
    refused(call(with_modality, files), files, *words)
    with_labels = ["ingest", "--hsi", "cube.npy", "--labels", "small.npy", "--out", "x.zarr"]
    refused(call(with_labels, files), files, *words)


def write_tif(path: Path, crs: str, values: np.ndarray) -> None:
    import rasterio
    from affine import Affine

    profile = {"driver": "GTiff", "height": values.shape[0], "width": values.shape[1], "count": 1, "crs": crs}
    with rasterio.open(path, "w", dtype=values.dtype, transform=Affine(2, 0, 3e5, 0, -2, 4e6), **profile) as raster:
        raster.write(values, 1)


def test_crs_that_do_not_match_are_both_named(call: Call, files: Path) -> None:
    write_tif(files / "other.tif", "EPSG:32616", np.ones((HEIGHT, WIDTH), np.float32))
    arguments = ["ingest", "--modality", "a=dsm.tif", "--modality", "b=other.tif", "--out", "x.zarr"]
    refused(call(arguments, files), files, "dsm.tif", "EPSG:32615", "other.tif", "EPSG:32616")


def test_a_map_on_another_grid_is_not_judged(call: Call, files: Path) -> None:
    write_tif(files / "map.tif", "EPSG:32615", np.ones((HEIGHT, WIDTH), np.uint8))
    write_tif(files / "labels.tif", "EPSG:32616", np.ones((HEIGHT, WIDTH), np.uint8))
    np.save(files / "small.npy", np.ones((20, 20), np.uint8))
    judge = ["evaluate", "--map", "map.tif", "--labels"]
    call([*judge, "labels.tif"], files).one_sentence(3, "map.tif", "EPSG:32615", "labels.tif", "EPSG:32616")
    call([*judge, "small.npy"], files).one_sentence(3, "30 x 40", "20 x 20")
    np.save(files / "empty.npy", np.zeros((HEIGHT, WIDTH), np.uint8))
    call([*judge, "empty.npy"], files).one_sentence(3, "empty.npy", "no labelled pixel")


def test_label_values_without_a_class(call: Call, files: Path) -> None:
    (files / "two.csv").write_text("value,name\n1,grass\n2,road\n")
    arguments = ["ingest", "--hsi", "cube.npy", "--labels", "gt.npy", "--classes", "two.csv", "--out", "x.zarr"]
    refused(call(arguments, files), files, "class table", "3 (48 pixels)")


def test_labels_without_a_table_get_names_and_a_warning(call: Call, files: Path) -> None:
    result = call(["ingest", "--hsi", "cube.npy", "--labels", "gt.npy", "--out", "x.zarr", "--json"], files)
    assert result.code == 0 and "warning:" in result.err and "--classes" in result.err
    assert result.json["warnings"]
    summary = call(["scene", "info", "x.zarr", "--json"], files).json
    assert [item["name"] for item in summary["classes"]] == ["class 1", "class 2", "class 3"]


def test_fewer_labels_than_shots_names_the_classes(call: Call, scene: Path) -> None:
    short = ["train-flc", "scene.zarr", "--shots", "40", "--umd", "none", "--split", "random", *tiny()]
    labels = np.load(scene / "gt.npy")
    labels[labels == 2] = 0
    labels[15, 1:4] = 2
    np.save(scene / "few.npy", labels)
    assert call(["ingest", "--hsi", "cube.npy", "--labels", "few.npy", "--out", "few.zarr"], scene).code == 0
    short[1] = "few.zarr"
    call(short, scene).one_sentence(3, "'class 2' has 3", "40", "--on-short use-all")
    taken = call([*short, "--on-short", "use-all", "--json"], scene)
    assert taken.code == 0, taken.err
    assert taken.json["train_pixels"] == 40 + 3 + 40


def test_nan_and_nodata_pixels_are_masked_and_counted(call: Call, files: Path) -> None:
    cube = np.load(files / "cube.npy").astype(np.float32)
    cube[0, 0] = np.nan
    cube[1, :5, 2] = np.nan
    cube[2, :7] = -9999
    np.save(files / "holes.npy", cube)
    arguments = ["ingest", "--hsi", "holes.npy", "--labels", "gt.npy", "--nodata", "-9999", "--out", "x.zarr"]
    result = call(arguments, files)
    assert result.code == 0 and "13 pixels invalid (7 nodata, 6 NaN or infinite)" in result.out
    assert call(["train-flc", "x.zarr", "--umd", "none", "--out", "m", *tiny()], files).code == 0
    mapped = call(["predict", "x.zarr", "--model", "m", "--out", "map.tif", "--json"], files)
    assert mapped.json["nodata_pixels"] == 13


def test_no_valid_pixel(call: Call, files: Path) -> None:
    np.save(files / "empty.npy", np.full((HEIGHT, WIDTH, 2), np.nan, np.float32))
    refused(call(["ingest", "--hsi", "empty.npy", "--out", "x.zarr"], files), files, "no valid pixel", "NaN")


@pytest.mark.parametrize("prepare", ["mnf", "standard"])
def test_constant_and_bad_bands(prepare: str, call: Call, files: Path) -> None:
    cube = np.load(files / "cube.npy").astype(np.float32)
    cube[:, :, 3] = 7
    cube[:, :, 5] = np.nan
    np.save(files / "odd.npy", cube)
    (files / "bad.txt").write_text("6\n")
    arguments = ["ingest", "--hsi", "odd.npy", "--bad-bands", "bad.txt", "--labels", "gt.npy", "--out", "x.zarr"]
    result = call(arguments, files)
    assert result.code == 0, result.err
    assert "1 of 8 bands are constant" in result.err and "0 pixels invalid" in result.out
    assert "bad" in call(["scene", "info", "x.zarr"], files).out
    trained = call(["train-flc", "x.zarr", "--set", f"prepare={prepare}", "--umd", "none", *tiny()], files)
    assert trained.code == 0, trained.err


@pytest.mark.parametrize("prepare", ["mnf", "standard"])
def test_one_band(prepare: str, call: Call, files: Path) -> None:
    assert call(["ingest", "--modality", "dsm=dsm.tif", "--labels", "gt.npy", "--out", "x.zarr"], files).code == 0
    trained = call(["train-flc", "x.zarr", *tiny(f"prepare={prepare}")], files)
    assert trained.code == 0, trained.err
    assert call(["predict", "x.zarr", "--out", "map.tif"], files).code == 0


def test_a_window_larger_than_the_scene_is_clamped(call: Call, files: Path) -> None:
    np.save(files / "c.npy", np.load(files / "cube.npy")[10:16, :5])
    labels = np.zeros((6, 5), np.uint8)
    labels[:2], labels[4:] = 1, 2
    np.save(files / "l.npy", labels)
    assert call(["ingest", "--hsi", "c.npy", "--labels", "l.npy", "--out", "x.zarr"], files).code == 0
    trained = call(["train-flc", "x.zarr", "--split", "random", *tiny("model.window=9")], files)
    assert trained.code == 0, trained.err
    mapped = call(["predict", "x.zarr", "--out", "map.tif", "--json"], files)
    assert mapped.code == 0 and mapped.json["pixels"] == 30 and mapped.json["nodata_pixels"] == 0


def test_one_class_is_one_clear_sentence(call: Call, files: Path) -> None:
    np.save(files / "one.npy", (np.load(files / "gt.npy") == 1).astype(np.uint8))
    assert call(["ingest", "--hsi", "cube.npy", "--labels", "one.npy", "--out", "x.zarr"], files).code == 0
    for command in (["train-flc", "x.zarr"], ["evaluate", "x.zarr"]):
        refused(call([*command, *tiny()], files), files, "'class 1'", "at least two classes", out="runs")
    assert call(["train-umd", "x.zarr", *tiny()], files).code == 0


def test_no_labels(call: Call, files: Path) -> None:
    assert call(["ingest", "--hsi", "cube.npy", "--out", "x.zarr"], files).code == 0
    refused(call(["train-flc", "x.zarr", *tiny()], files), files, "no labelled pixel", "--labels", out="runs")


@pytest.mark.parametrize("name", ["cube.mat", "cube.npy", "dsm.tif"])
def test_a_truncated_file(name: str, call: Call, files: Path) -> None:
    whole = (files / name).read_bytes()
    (files / name).write_bytes(whole[: len(whole) // 2])
    variable = ":HSI" if name == "cube.mat" else ""
    refused(call(["ingest", "--hsi", name + variable, "--out", "x.zarr"], files), files, name)


def test_an_unfinished_scene(call: Call, scene: Path) -> None:
    from fastdiffclip.scene.layout import MANIFEST

    shutil.rmtree(scene / "scene.zarr" / MANIFEST)
    for command in (["scene", "info"], ["scene", "verify"], ["train-umd"], ["train-flc"], ["evaluate"]):
        call([*command, "scene.zarr"], scene).one_sentence(3, "scene.zarr", "ingest")
    call(["predict", "scene.zarr", "--out", "map.tif"], scene).one_sentence(3, "scene.zarr")


def test_a_damaged_scene_names_array_and_chunk(call: Call, scene: Path) -> None:
    chunk = next(path for path in sorted((scene / "scene.zarr" / "hsi").rglob("*")) if path.name != "zarr.json")
    chunk = chunk if chunk.is_file() else next(path for path in sorted(chunk.rglob("*")) if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[10] ^= 1
    chunk.write_bytes(data)
    result = call(["scene", "verify", "scene.zarr", "--json"], scene)
    result.one_sentence(3, "hsi", "damaged")
    assert result.json["ok"] is False and "hsi" in result.json["problems"][0]
    refused(call(["train-umd", "scene.zarr", *tiny()], scene), scene, "hsi", out="runs")


def test_a_scene_with_other_bands_than_the_model(call: Call, scene: Path) -> None:
    np.save(scene / "fewer.npy", np.load(scene / "cube.npy")[:, :, : BANDS - 1])
    assert call(["train-flc", "scene.zarr", "--umd", "none", "--out", "m", *tiny()], scene).code == 0
    assert call(["ingest", "--hsi", "fewer.npy", "--modality", "lidar=dsm.tif", "--out", "y.zarr"], scene).code == 0
    predict = ["predict", "y.zarr", "--model", "m", "--out", "map.tif"]
    refused(call(predict, scene), scene, "hsi", "7", "8", out="map.tif")
    (scene / "m" / "model.safetensors").write_bytes(b"x" * 100)
    refused(call(predict, scene), scene, "model.safetensors", out="map.tif")
    call([*predict[:3], "runs", *predict[4:]], scene).one_sentence(3, "runs", "not a finished run")


def test_two_scenes_whose_class_tables_disagree(call: Call, scene: Path) -> None:
    (scene / "other.csv").write_text("value,name\n1,water\n2,road\n3,roof\n")
    other = [part.replace("classes.csv", "other.csv").replace("scene.zarr", "y.zarr") for part in FULL]
    assert call(other, scene).code == 0
    both = ["train-flc", "scene.zarr", "y.zarr", "--dry-run", *tiny()]
    call(both, scene).one_sentence(3, "'grass'", "'water'")


def test_an_output_that_cannot_be_written(call: Call, scene: Path) -> None:
    (scene / "file").write_text("")
    call(["predict", "scene.zarr", "--out", "file/map.tif"], scene).one_sentence(4, "--out file/map.tif")
    call(["train-umd", "scene.zarr", "--out", "file/run", *tiny()], scene).one_sentence(4, "file/run")
