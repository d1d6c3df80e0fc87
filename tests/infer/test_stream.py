"""Maps of whole scenes: equal to predicting pixel by pixel, whatever the blocks, and nothing left after a failure."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from fastdiffclip.errors import InputDataError, ResourceError
from fastdiffclip.infer import stream
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.infer.stream import predict
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import Scene, open_scene
from fastdiffclip.scene.writer import SceneWriter
from fastdiffclip.train.flc import FlcResult


@pytest.fixture(scope="module")
def classifier(flc_run: FlcResult) -> Classifier:
    assert flc_run.folder is not None
    return Classifier.load(flc_run.folder, "cpu", "fp32")


def write_scene(path: Path, like: Scene, rows: slice = slice(None), cols: slice = slice(None), **changes: Any) -> Scene:
    """A part of a scene; ``changes`` replace what is given to the first modality."""
    hsi, lidar = like.read("hsi", rows, cols), like.read("lidar", rows, cols)
    modality = like.modalities["hsi"]
    given: dict[str, Any] = {
        "source": hsi, "bands": 12, "dtype": "uint16", "wavelengths": modality.wavelengths, "scale": 1e-4,
    } | changes  # fmt: skip
    with SceneWriter(path, height=hsi.shape[0], width=hsi.shape[1]) as writer:
        writer.add_modality("hsi", **given)
        writer.add_modality("lidar", lidar, bands=1, dtype="float32")
    return open_scene(path)


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


def test_the_map_is_what_single_pixels_give(classifier: Classifier, small_scene: Scene, tmp_path: Path) -> None:
    expected = pixel_by_pixel(classifier, small_scene)
    seen: list[tuple[int, int]] = []
    result = predict(
        small_scene,
        classifier,
        tmp_path / "map.tif",
        probabilities=tmp_path / "p.tif",
        png=tmp_path / "map.png",
        progress=lambda task, done, total, note: seen.append((done, total)),
    )
    assert sorted(os.listdir(tmp_path)) == ["map.png", "map.tif", "map.tif.aux.xml", "p.tif"]
    assert result.files == [tmp_path / name for name in ("map.tif", "p.tif", "map.png")]
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
    labels = small_scene.read_labels()
    known = (labels > 0) & ~invalid
    assert (class_map[known] == labels[known]).mean() > 0.9
    assert [row["pixels"] for row in result.areas] == [int((class_map == v).sum()) for v in (1, 2, 4)]
    assert seen[-1] == (720, 720) and all(a <= b for (a, _), (b, _) in zip(seen, seen[1:], strict=False))


def test_the_same_map_twice(classifier: Classifier, flc_run: FlcResult, small_scene: Scene, tmp_path: Path) -> None:
    assert flc_run.folder is not None
    predict(small_scene, classifier, tmp_path / "a.tif", probabilities=tmp_path / "ap.tif")
    predict(small_scene, str(flc_run.folder), tmp_path / "b.tif", probabilities=tmp_path / "bp.tif", device="cpu")
    for a, b in (("a.tif", "b.tif"), ("ap.tif", "bp.tif")):
        assert (tmp_path / a).read_bytes() == (tmp_path / b).read_bytes()


@pytest.mark.parametrize("rows", [1, 7, 24, 1000])
def test_blocks_do_not_show(
    classifier: Classifier, small_scene: Scene, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    whole = np.concatenate(list(stream.predict_rows(classifier, small_scene)), axis=1)
    monkeypatch.setattr(stream, "BLOCK_ROWS", rows)
    monkeypatch.setattr(stream, "GATHER", 100)
    blocks = list(stream.predict_rows(classifier, small_scene))
    assert [block.shape[1] for block in blocks] == [min(rows, 24 - top) for top in range(0, 24, rows)]
    parts = np.concatenate(blocks, axis=1)
    # The place of a window in its batch of 64 changes, and with it at most the last bits.
    np.testing.assert_allclose(parts, whole, rtol=2e-6, atol=1e-7)
    assert np.array_equal(np.nan_to_num(parts).argmax(0), np.nan_to_num(whole).argmax(0))


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
    with pytest.raises(InputDataError, match=r"no pixel of .*s\.zarr is valid in every modality"):
        predict(scene, classifier, out / "map.tif", probabilities=out / "p.tif" if with_probabilities else None)
    assert not out.exists() or os.listdir(out) == []


def test_a_failure_half_way_leaves_nothing(
    classifier: Classifier, small_scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK_ROWS", 8)
    out = tmp_path / "out"

    def interrupt(task: str, done: int, total: int, note: str = "") -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(small_scene, classifier, out / "map.tif", probabilities=out / "p.tif", progress=interrupt)
    assert os.listdir(out) == []


def test_an_output_that_cannot_be_written(classifier: Classifier, small_scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        predict(small_scene, classifier, tmp_path / "file" / "map.tif")
    assert os.listdir(tmp_path) == ["file"]


def test_a_damaged_model_is_named(flc_run: FlcResult, small_scene: Scene, tmp_path: Path) -> None:
    assert flc_run.folder is not None
    folder = Path(shutil.copytree(flc_run.folder, tmp_path / "run"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputDataError, match=r"run/model\.safetensors"):
        predict(small_scene, folder, tmp_path / "map.tif", device="cpu")
    assert not (tmp_path / "map.tif").exists()
