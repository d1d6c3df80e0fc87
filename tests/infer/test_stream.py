"""Maps of whole scenes: equal to predicting pixel by pixel, whatever the blocks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import InputDataError
from fastdiffclip.infer import engine
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.infer.engine import Batches
from fastdiffclip.infer.finish import Outputs
from fastdiffclip.infer.interest import interest_of
from fastdiffclip.infer.stream import Prediction, open_job, predict
from fastdiffclip.scene.layout import StoredArray
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import Scene, open_scene
from fastdiffclip.scene.writer import SceneWriter
from fastdiffclip.train.flc import FlcResult

from .streams import raw_probabilities, write_scene


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pixel_by_pixel(classifier: Classifier, scene: Scene) -> np.ndarray:
    """(H, W, K) probabilities of each pixel by itself, through the window source; NaN where one is invalid."""
    valid = scene.read_valid("hsi") & scene.read_valid("lidar")
    rows, cols = np.nonzero(valid)
    centres = np.stack([np.zeros_like(rows), rows, cols], axis=1).astype(np.int64)
    source = WindowSource([scene], classifier.front_end, 3, 1 << 30)
    result = np.full((*valid.shape, len(classifier.classes)), np.nan, np.float32)
    for first in range(0, len(centres), 50):
        part = centres[first : first + 50]
        result[part[:, 1], part[:, 2]] = classifier.probabilities(source.windows(part))
    return result


def run(classifier: Classifier, scene: Scene, out: Path, rows: int, cols: int, **part: Any) -> Prediction:
    """A whole prediction in blocks of ``rows`` x ``cols`` tiles, with probabilities and confidence."""
    outputs = Outputs(out / "map.tif", out / "p.tif", out / "c.tif")
    with open_job(scene, classifier, outputs, interest_of(scene, **part), "cpu") as job:
        return job.run(replace(job.plan(), rows=rows, cols=cols))


def test_the_map_is_what_single_pixels_give(classifier: Classifier, small_scene: Scene, tmp_path: Path) -> None:
    expected = pixel_by_pixel(classifier, small_scene)
    seen: list[tuple[int, int]] = []
    result = predict(
        small_scene,
        classifier,
        tmp_path / "map.tif",
        probabilities=tmp_path / "p.tif",
        confidence=tmp_path / "c.tif",
        png=tmp_path / "map.png",
        progress=lambda task, done, total, note: seen.append((done, total)) if task == "predict" else None,
    )
    assert sorted(os.listdir(tmp_path)) == ["c.tif", "map.png", "map.tif", "map.tif.aux.xml", "p.tif"]
    assert result.files == [tmp_path / name for name in ("map.tif", "p.tif", "c.tif", "map.png")]
    with rasterio.open(tmp_path / "p.tif") as file:
        written = np.moveaxis(file.read(), 0, 2)
        assert file.crs.to_epsg() == 32632 and tuple(file.transform)[:6] == small_scene.affine_transform
    np.testing.assert_allclose(written, expected, rtol=1e-5, atol=1e-7)
    invalid = ~small_scene.read_valid("lidar")
    assert invalid.any() and np.array_equal(np.isnan(written).all(2), invalid)
    with rasterio.open(tmp_path / "map.tif") as file:
        class_map = file.read(1)
        assert file.nodata == 0 and file.dtypes == ("uint8",)
        assert file.crs.to_epsg() == 32632 and tuple(file.transform)[:6] == small_scene.affine_transform
    assert np.array_equal(class_map, result.class_map)
    assert np.array_equal(class_map == 0, invalid) and result.nodata_pixels == invalid.sum()
    best = np.array([1, 2, 4])[np.nan_to_num(written).argmax(2)]
    assert np.array_equal(class_map[~invalid], best[~invalid])
    with rasterio.open(tmp_path / "c.tif") as file:
        assert file.dtypes == ("float32",) and file.descriptions == ("confidence",) and np.isnan(file.nodata)
        np.testing.assert_array_equal(file.read(1), written.max(axis=2))
    labels = small_scene.read_labels()
    known = (labels > 0) & ~invalid
    assert (class_map[known] == labels[known]).mean() > 0.9
    assert [row["pixels"] for row in result.areas] == [int((class_map == v).sum()) for v in (1, 2, 4)]
    assert result.areas[0]["hectares"] == pytest.approx((class_map == 1).sum() * 4 / 1e4)
    assert seen[-1] == (720, 720) and all(a <= b for (a, _), (b, _) in zip(seen, seen[1:], strict=False))


def test_the_same_map_twice(classifier: Classifier, flc_run: FlcResult, small_scene: Scene, tmp_path: Path) -> None:
    assert flc_run.folder is not None
    predict(small_scene, classifier, tmp_path / "a.tif", probabilities=tmp_path / "ap.tif")
    predict(small_scene, str(flc_run.folder), tmp_path / "b.tif", probabilities=tmp_path / "bp.tif", device="cpu")
    for a, b in (("a.tif", "b.tif"), ("ap.tif", "bp.tif")):
        assert (tmp_path / a).read_bytes() == (tmp_path / b).read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_and_threads_do_not_show_in_a_bit(
    flc_run: FlcResult, small_scene: Scene, tmp_path: Path, small_tiles: None, precision: str
) -> None:
    assert flc_run.folder is not None
    classifier = Classifier.load(flc_run.folder, "cpu", precision)
    whole = raw_probabilities(classifier, small_scene, tmp_path, 1000, 1000)
    for rows, cols in [(1, 1), (2, 1), (1, 2), (5, 2), (23, 1)]:
        np.testing.assert_array_equal(raw_probabilities(classifier, small_scene, tmp_path, rows, cols), whole)
    with threads(3):
        np.testing.assert_array_equal(raw_probabilities(classifier, small_scene, tmp_path, 5, 1), whole)
        assert torch.get_num_threads() == 3


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    height=st.integers(1, 24), width=st.integers(1, 30), tile=st.integers(1, 60), windows=st.integers(1, 9),
    stem=st.integers(1, 40), rows=st.integers(1, 7), cols=st.integers(1, 4),
)  # fmt: skip
def test_scenes_tiles_and_blocks_of_any_shape(
    classifier: Classifier, small_scene: Scene, tmp_path_factory: pytest.TempPathFactory, height: int, width: int,
    tile: int, windows: int, stem: int, rows: int, cols: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("scene")
    scene = write_scene(folder / "s.zarr", small_scene, slice(0, height), slice(0, width))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine.BATCHES, "cpu", Batches(stem, 9 * windows, tile))
        found = raw_probabilities(classifier, scene, folder, rows, cols)
        np.testing.assert_array_equal(found, raw_probabilities(classifier, scene, folder, 99, 99))
    np.testing.assert_allclose(
        np.moveaxis(found.view(np.float32), 0, 2), pixel_by_pixel(classifier, scene), rtol=1e-5, atol=1e-6
    )


def test_the_files_are_the_same_for_all_blocks(
    classifier: Classifier, small_scene: Scene, tmp_path: Path, small_tiles: None
) -> None:
    first = run(classifier, small_scene, tmp_path / "a", 1000, 1000)
    second = run(classifier, small_scene, tmp_path / "b", 2, 1)
    for one, other in zip(first.files, second.files, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert first.areas == second.areas


def test_every_chunk_is_read_once(
    classifier: Classifier, small_scene: Scene, tmp_path: Path, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdiffclip.scene.writer.chunk_shape", lambda *shape: (5, 7))
    scene = write_scene(tmp_path / "s.zarr", small_scene)
    read: list[tuple[str, tuple[int, ...]]] = []
    plain = StoredArray.read_chunk

    def counted(array: StoredArray, root: Path, index: tuple[int, ...]) -> np.ndarray:
        read.append((array.name, index))
        return plain(array, root, index)

    monkeypatch.setattr(StoredArray, "read_chunk", counted)
    for rows in (1, 7, 100):
        read.clear()
        raw_probabilities(classifier, scene, tmp_path, rows, 2)
        assert len(read) == len(set(read)) == 4 * 5 * 5


@pytest.mark.parametrize(
    ("rows", "cols"),
    [(slice(0, 1), slice(None)), (slice(None), slice(3, 4)), (slice(5, 6), slice(7, 8)), (slice(0, 2), slice(0, 2))],
)
def test_scenes_smaller_than_a_window(
    classifier: Classifier, small_scene: Scene, tmp_path: Path, rows: slice, cols: slice
) -> None:
    scene = write_scene(tmp_path / "s.zarr", small_scene, rows, cols)
    result = predict(scene, classifier, tmp_path / "map.tif")
    expected = pixel_by_pixel(classifier, scene)
    values = np.where(np.isnan(expected[..., 0]), 0, np.array([1, 2, 4])[np.nan_to_num(expected).argmax(2)])
    assert np.array_equal(result.class_map, values) and result.class_map.shape == (scene.height, scene.width)


def test_a_box_is_cut_out_of_the_whole(
    classifier: Classifier, small_scene: Scene, tmp_path: Path, small_tiles: None
) -> None:
    whole = raw_probabilities(classifier, small_scene, tmp_path)
    part = raw_probabilities(classifier, small_scene, tmp_path, bbox="pixels:7,4,20,9")
    np.testing.assert_array_equal(part, whole[:, 4:9, 7:20])
    result = run(classifier, small_scene, tmp_path / "out", 2, 1, bbox="500014,5199982,500040,5199992")
    with rasterio.open(tmp_path / "out" / "p.tif") as file:
        np.testing.assert_array_equal(file.read().view(np.uint32), part)
        assert tuple(file.transform)[:6] == (2, 0, 500014, 0, -2, 5199992) and file.crs.to_epsg() == 32632
    assert result.class_map.shape == (5, 13) and result.pixels == 65


def test_a_mask_leaves_the_rest_as_nodata_and_blocks_without_a_pixel_unread(
    classifier: Classifier, small_scene: Scene, tmp_path: Path, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = raw_probabilities(classifier, small_scene, tmp_path)
    mask = np.zeros((24, 30), np.uint8)
    mask[10:12, 3:9] = mask[11, 25] = 1
    np.save(tmp_path / "mask.npy", mask)
    rows_read: list[slice] = []
    plain = Scene.read

    def counted(scene: Scene, modality: str, rows: slice = slice(None), cols: slice = slice(None)) -> np.ndarray:
        rows_read.append(rows)
        return plain(scene, modality, rows, cols)

    monkeypatch.setattr(Scene, "read", counted)
    monkeypatch.setattr(Scene, "chunk_rows", lambda scene, modality: 1)
    found = raw_probabilities(classifier, small_scene, tmp_path, mask=tmp_path / "mask.npy")
    np.testing.assert_array_equal(found[:, mask == 1], whole[:, mask == 1])
    assert np.isnan(found.view(np.float32)[:, mask == 0]).all()
    assert {row for rows in rows_read for row in range(rows.start, rows.stop)} == {9, 10, 11, 12}


def test_other_bands_are_refused_by_name(classifier: Classifier, small_scene: Scene, tmp_path: Path) -> None:
    hsi, waves = small_scene.read("hsi"), small_scene.modalities["hsi"].wavelengths
    assert waves is not None
    for number, (changes, said) in enumerate(
        [
            ({"source": hsi[:, :, :11], "bands": 11, "wavelengths": waves[:11]}, "has 11 bands.*fitted on 12"),
            ({"wavelengths": tuple(w + 5 for w in waves)}, "band 1 at 405 nm.*400 nm"),
            ({"scale": 1.0}, "scale 1 .*scale 0.0001"),
        ]
    ):
        scene = write_scene(tmp_path / f"{number}.zarr", small_scene, **changes)
        out = tmp_path / f"out{number}"
        with pytest.raises(InputDataError, match=said):
            predict(scene, classifier, out / "map.tif", probabilities=out / "p.tif", png=out / "map.png")
        assert not out.exists() or os.listdir(out) == []
    with SceneWriter(tmp_path / "hsi.zarr", height=24, width=30) as writer:
        writer.add_modality("hsi", hsi, bands=12, dtype="uint16", wavelengths=waves, scale=1e-4)
    with pytest.raises(InputDataError, match="no modality 'lidar'"):
        predict(open_scene(tmp_path / "hsi.zarr"), classifier, tmp_path / "map.tif")
    assert not (tmp_path / "map.tif").exists()


def test_another_scene_is_read_with_the_statistics_of_the_model(
    classifier: Classifier, small_scene: Scene, tmp_path: Path
) -> None:
    # Half the scene has other statistics than the whole, yet its inner pixels come out the same.
    half = write_scene(tmp_path / "half.zarr", small_scene, slice(0, 12))
    assert half.modalities["hsi"].mean != small_scene.modalities["hsi"].mean
    found = raw_probabilities(classifier, half, tmp_path).view(np.float32)
    whole = raw_probabilities(classifier, small_scene, tmp_path).view(np.float32)
    np.testing.assert_allclose(found[:, :11], whole[:, :11], rtol=1e-5, atol=1e-6)


def test_a_modality_more_does_not_matter(classifier: Classifier, small_scene: Scene, tmp_path: Path) -> None:
    with SceneWriter(tmp_path / "more.zarr", height=24, width=30) as writer:
        writer.add_modality("sar", np.full((24, 30, 2), np.nan, np.float32), bands=2, dtype="float32")
        for name, modality in small_scene.modalities.items():
            writer.add_modality(
                name, small_scene.read(name), bands=modality.bands, dtype=modality.dtype,
                wavelengths=modality.wavelengths, scale=modality.scale,
            )  # fmt: skip
    first = predict(small_scene, classifier, tmp_path / "a.tif")
    second = predict(open_scene(tmp_path / "more.zarr"), classifier, tmp_path / "b.tif")
    assert np.array_equal(first.class_map, second.class_map)


@pytest.mark.parametrize("with_probabilities", [True, False])
def test_no_valid_pixel_leaves_nothing(
    classifier: Classifier, small_scene: Scene, tmp_path: Path, with_probabilities: bool
) -> None:
    scene = write_scene(tmp_path / "s.zarr", small_scene, valid=np.zeros((24, 30), bool))
    out = tmp_path / "out"
    with pytest.raises(InputDataError, match=r"no pixel of .*s\.zarr .* is valid in every modality"):
        predict(scene, classifier, out / "map.tif", probabilities=out / "p.tif" if with_probabilities else None)
    assert not out.exists() or os.listdir(out) == []


def test_a_damaged_model_is_named(flc_run: FlcResult, small_scene: Scene, tmp_path: Path) -> None:
    assert flc_run.folder is not None
    folder = Path(shutil.copytree(flc_run.folder, tmp_path / "run"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputDataError, match=r"run/model\.safetensors"):
        predict(small_scene, folder, tmp_path / "map.tif", device="cpu")
    assert not (tmp_path / "map.tif").exists()
