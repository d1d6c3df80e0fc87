"""``suggest``, ``add-class`` and ``predict --reject`` from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .console import Result, tiny


@pytest.fixture(scope="module")
def trained(ingested: Path, tmp_path_factory: pytest.TempPathFactory, real: Callable[..., Result]) -> Path:
    """A folder with a scene and its model in ``m``."""
    folder = tmp_path_factory.mktemp("classes")
    (folder / "scene.zarr").symlink_to(ingested / "scene.zarr")
    result = real(["train-flc", "scene.zarr", "--shots", "3", "--out", "m", *tiny()], folder)
    assert result.code == 0, result.err
    return folder


def test_suggest(trained: Path, call: Callable[..., Result]) -> None:
    result = call(["suggest", "scene.zarr", "--model", "m", "--count", "4", "--out", "p.geojson", "--json"], trained)
    assert result.code == 0, result.err
    assert result.json == {"model": "m", "file": "p.geojson", "points": 4, "labelled": 9}
    points = json.loads((trained / "p.geojson").read_text())["features"]
    assert [point["properties"]["rank"] for point in points] == [1, 2, 3, 4]
    assert all(point["properties"]["class"] in result.out for point in points)
    call(["suggest", "scene.zarr", "--out", "p.geojson"], trained).one_sentence(2, "--model", "train-flc")
    call(["suggest", "scene.zarr", "--model", "m", "--out", "no/p.geojson"], trained)
    call(["suggest", "scene.zarr", "--model", "gone", "--out", "p.geojson"], trained).one_sentence(3, "gone")


def test_add_class_and_map_it(trained: Path, call: Callable[..., Result]) -> None:
    words = ["--name", "pond", "--description", "a dark pond", "--share", "0.3", "--out", "wider", "--json"]
    added = call(["add-class", "m", "scene.zarr", *words], trained)
    assert added.code == 0, added.err
    assert added.json["name"] == "pond" and added.json["model"] == "wider" and "No pixel of it was seen" in added.out
    result = call(["predict", "scene.zarr", "--model", "wider", "--out", "w.tif", "--json"], trained)
    assert result.code == 0 and result.json["areas"][-1]["name"] == "pond"
    assert result.json["areas"][-1]["pixels"] > 0
    again = ["add-class", "wider", "scene.zarr", "--name", "pond", "--out", "third"]
    call(again, trained).one_sentence(2, "knows a class named 'pond'")
    call(["add-class", "gone", "scene.zarr", "--name", "pond", "--out", "third"], trained).one_sentence(3, "gone")


def test_predict_rejects_what_is_not_sure(trained: Path, call: Callable[..., Result]) -> None:
    result = call(["predict", "scene.zarr", "--model", "m", "--out", "r.tif", "--reject", "0.99", "--json"], trained)
    assert result.code == 0, result.err
    assert result.json["areas"][-1]["name"] == "none of these" and "none of these" in result.out
    assert sum(row["pixels"] for row in result.json["areas"]) + result.json["nodata_pixels"] == result.json["pixels"]
    for wrong in ("0", "1.5", "nan"):
        call(["predict", "scene.zarr", "--model", "m", "--out", "x.tif", "--reject", wrong], trained).one_sentence(
            2, "--reject", "above 0 and at most 1"
        )
