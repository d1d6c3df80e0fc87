"""What to label next: uncertain, unlike what is known, apart from each other, and where it lies on the earth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.warp import transform

from fastdiffclip.errors import InputDataError
from fastdiffclip.evaluate.contest import as_classifier
from fastdiffclip.infer.suggest import choose, geojson, suggest
from fastdiffclip.scene.store import Scene, open_scene
from fastdiffclip.scene.writer import SceneWriter
from fastdiffclip.train.flc import FlcResult

NOTHING = np.empty((0, 2)), np.empty((0, 2), np.int64)
LINE = np.stack([np.zeros(5, np.int64), 10 * np.arange(5)], axis=1)


def sure(*shares: float) -> np.ndarray:
    return np.array([[share, 1 - share] for share in shares])


def test_the_least_sure_comes_first_and_neighbours_are_left_out() -> None:
    embeddings = np.arange(10.0).reshape(5, 2)
    assert choose(sure(0.9, 0.5, 0.99, 0.6, 1.0), embeddings, LINE, *NOTHING, 1, 3) == [1]
    near = np.array([[0, 0], [0, 1], [0, 9], [9, 0], [1, 1]])
    found = choose(sure(0.5, 0.51, 0.6, 0.6, 0.5), embeddings, near, *NOTHING, 9, 3)
    assert found[0] == 0 and sorted(found) == [0, 2, 3]


def test_of_two_alike_only_one_is_asked_about() -> None:
    embeddings = np.array([[0.0, 0], [0, 0], [1, 0], [5, 0], [5, 0]])
    found = choose(sure(0.5, 0.5, 0.9, 0.6, 0.6), embeddings, LINE, *NOTHING, 2, 3)
    assert found == [0, 3]
    labelled = np.array([[0.0, 0]]), np.array([[90, 90]])
    assert choose(sure(0.5, 0.5, 0.9, 0.6, 0.6), embeddings, LINE, *labelled, 2, 3) == [3, 2]


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 5), st.integers(1, 12), st.sampled_from([1, 3, 7]))
@settings(max_examples=40, deadline=None)
def test_any_sizes(pixels: int, classes: int, known: int, count: int, window: int) -> None:
    random = np.random.default_rng(pixels)
    probabilities = random.dirichlet(np.ones(classes), pixels)
    places = np.stack(np.unravel_index(random.permutation(400)[: pixels + known], (20, 20)), axis=1)
    embeddings = random.standard_normal((pixels + known, 3))
    found = choose(
        probabilities, embeddings[:pixels], places[:pixels], embeddings[pixels:], places[pixels:], count, window
    )
    assert len(found) == len(set(found)) <= count
    for number, index in enumerate(found):
        others = np.concatenate([places[found[:number]], places[pixels:]])
        assert (np.abs(others - places[index]).max(axis=1) >= window).all()


def test_points_of_a_scene(flc_run: FlcResult, small_scene: Scene) -> None:
    labelled = np.array([[2, 2], [8, 8]])
    found = suggest(small_scene, as_classifier(flc_run, "cpu"), 6, labelled, 1 << 30)
    assert len(found) == 6 and {item.name for item in found} <= {"grass", "roof", "water"}
    again = suggest(small_scene, as_classifier(flc_run, "cpu"), 6, labelled, 1 << 30)
    assert found == again
    valid = small_scene.read_valid_everywhere()
    assert all(valid[item.row, item.col] and 0 <= item.margin <= item.confidence <= 1 for item in found)
    document = json.loads(json.dumps(geojson(small_scene, found)))
    assert document["type"] == "FeatureCollection" and len(document["features"]) == 6
    first = document["features"][0]
    east = 500000 + 2 * (first["properties"]["col"] + 0.5)
    north = 5200000 - 2 * (first["properties"]["row"] + 0.5)
    longitude, latitude = transform("EPSG:32632", "EPSG:4326", [east], [north])
    assert first["geometry"]["coordinates"] == pytest.approx([longitude[0], latitude[0]], abs=1e-7)
    assert first["properties"]["rank"] == 1 and first["properties"]["coordinates"] == "WGS 84"


def test_a_scene_without_a_place_on_earth(flc_run: FlcResult, small_scene: Scene, tmp_path: Path) -> None:
    with SceneWriter(tmp_path / "bare.zarr", height=24, width=30) as writer:
        modality = small_scene.modalities["hsi"]
        hsi, lidar = small_scene.read("hsi"), small_scene.read("lidar")
        writer.add_modality("hsi", hsi, bands=12, dtype="uint16", wavelengths=modality.wavelengths, scale=1e-4)
        writer.add_modality("lidar", lidar, bands=1, dtype="float32")
    bare = open_scene(tmp_path / "bare.zarr")
    found = suggest(bare, as_classifier(flc_run, "cpu"), 2, np.empty((0, 2)), 1 << 30)
    feature = geojson(bare, found)["features"][1]
    assert feature["geometry"]["coordinates"] == [found[1].col + 0.5, found[1].row + 0.5]
    assert feature["properties"]["coordinates"] == "pixels"
    assert geojson(bare, [])["features"] == []


def test_a_scene_without_a_valid_pixel(flc_run: FlcResult, small_scene: Scene, tmp_path: Path) -> None:
    with SceneWriter(tmp_path / "dark.zarr", height=24, width=30) as writer:
        waves = small_scene.modalities["hsi"].wavelengths
        writer.add_modality("hsi", small_scene.read("hsi"), bands=12, dtype="uint16", wavelengths=waves, scale=1e-4)
        writer.add_modality("lidar", np.full((24, 30, 1), np.nan, np.float32), bands=1, dtype="float32")
    with pytest.raises(InputDataError, match="can be suggested"):
        suggest(open_scene(tmp_path / "dark.zarr"), as_classifier(flc_run, "cpu"), 2, np.empty((0, 2)), 1 << 30)
