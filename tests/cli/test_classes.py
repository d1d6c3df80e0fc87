"""``suggest``, ``add-class``, ``train-flc --add-class`` and ``predict --reject`` from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio

from fastdiffclip.scene.store import open_scene

from .console import Result, tiny


@pytest.fixture(scope="module")
def trained(ingested: Path, tmp_path_factory: pytest.TempPathFactory, real: Callable[..., Result]) -> Path:
    """A folder with a scene and its model in ``m``."""
    folder = tmp_path_factory.mktemp("classes")
    (folder / "scene.zarr").symlink_to(ingested / "scene.zarr")
    result = real(["train-flc", "scene.zarr", "--shots", "3", "--out", "m", *tiny()], folder)
    assert result.code == 0, result.err
    return folder


def test_suggest(trained: Path, source: Path, call: Callable[..., Result]) -> None:
    result = call(["suggest", "scene.zarr", "--model", "m", "--count", "4", "--out", "p.geojson", "--json"], trained)
    assert result.code == 0, result.err
    assert result.json == {"model": "m", "file": "p.geojson", "points": 4, "labelled": 9}
    points = json.loads((trained / "p.geojson").read_text())["features"]
    assert [point["properties"]["rank"] for point in points] == [1, 2, 3, 4]
    assert all(point["properties"]["class"] in result.out for point in points)

    rasters = ["--hsi", str(source / "cube.npy"), "--modality", f"lidar={source / 'dsm.tif'}"]
    back = call(["ingest", *rasters, "--labels", "p.geojson:value", "--out", "back.zarr"], trained)
    assert back.code == 0, back.err
    labels = open_scene(trained / "back.zarr").read_labels()
    assert np.count_nonzero(labels) == 4
    assert all(labels[point["row"], point["col"]] == point["value"] for point in (p["properties"] for p in points))

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


@pytest.fixture(scope="module")
def partly(source: Path, tmp_path_factory: pytest.TempPathFactory, real: Callable[..., Result]) -> Path:
    """A folder with a scene whose class table names `roof` and `old pond`; no pixel of them is labelled."""
    folder = tmp_path_factory.mktemp("partly")
    for name in ("cube.npy", "gt.npy"):
        shutil.copy(source / name, folder)
    labels = np.load(folder / "gt.npy")
    np.save(folder / "two.npy", np.where(labels == 3, 0, labels))
    np.save(folder / "roofs.npy", (labels == 3).astype(np.uint8))
    rows = "1,grass,short green grass\n2,road,grey asphalt\n3,roof,grey roof tiles\n7,old pond,still water\n"
    (folder / "classes.csv").write_text("value,name,description\n" + rows)
    made = ["ingest", "--hsi", "cube.npy", "--labels", "two.npy", "--classes", "classes.csv", "--out", "scene.zarr"]
    assert real(made, folder).code == 0
    result = real(["train-flc", "scene.zarr", "--shots", "3", "--out", "m", *tiny()], folder)
    assert result.code == 0, result.err
    assert "Left out, for no usable pixel is labelled so: roof, old pond." in result.out
    assert "--add-class roof" in result.out
    return folder


ADDED = ["--add-class", "roof", "--add-class", "puddle=dark road water", "--share", "roof=0.3", "--share", "puddle=0.2"]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_train_flc_maps_classes_without_labels(partly: Path, call: Callable[..., Result]) -> None:
    words = ["train-flc", "scene.zarr", "--shots", "3", "--out", "more", *tiny(), *ADDED, "--json"]
    plan = call([*words, "--dry-run"], partly)
    assert plan.code == 0 and not (partly / "more").exists()
    assert plan.json["added"] == [{"value": 3, "name": "roof"}, {"value": 8, "name": "puddle"}]
    assert plan.json["unlabelled"] == [{"value": 7, "name": "old pond"}]
    assert (plan.json["classes"], plan.json["windows"]) == (2, 6)
    assert "From words alone, without a labelled pixel: roof, puddle." in plan.out
    trained = call(words, partly)
    assert trained.code == 0, trained.err
    assert [entry["share"] for entry in trained.json["added"]] == [0.3, 0.2]
    assert trained.json["held_out"]["absent"] == [3, 8] and trained.out.count("no test pixels") == 2
    assert "'roof' (value 3) from words alone, most like road" in trained.out
    assert "No pixel of them was seen" in trained.out
    manifest = json.loads((partly / "more" / "manifest.json").read_text())
    assert manifest["prompts"][2:] == ["roof: grey roof tiles", "puddle: dark road water"]
    assert [entry["value"] for entry in manifest["classes"]] == [1, 2, 3, 8]
    assert all(entry["colour"] for entry in manifest["classes"])
    outputs = ["--out", "more.tif", "--png", "more.png", "--probabilities", "p.tif"]
    mapped = call(["predict", "scene.zarr", "--model", "more", *outputs, "--json"], partly)
    assert mapped.code == 0, mapped.err
    assert {row["name"]: round(row["share"]) for row in mapped.json["areas"]}.items() >= {("roof", 30), ("puddle", 20)}
    with rasterio.open(partly / "more.tif") as raster:
        assert set(np.unique(raster.read(1)).tolist()) <= {1, 2, 3, 8} and (raster.read(1) == 8).any()
        colours = raster.colormap(1)
    assert len({colours[entry["value"]] for entry in manifest["classes"]}) == 4
    assert all(colours[entry["value"]][:3] == tuple(entry["colour"]) for entry in manifest["classes"])
    with rasterio.open(partly / "p.tif") as raster:
        assert raster.count == 4


def test_a_class_with_test_pixels_alone_is_added_and_judged(
    source: Path, tmp_path: Path, call: Callable[..., Result]
) -> None:
    """The split `official`, whose training map lacks the class: the figures are of pixels that it never saw."""
    labels = np.load(source / "gt.npy")
    shutil.copy(source / "cube.npy", tmp_path)
    np.save(tmp_path / "train.npy", np.where((np.arange(labels.shape[1]) < 10) & (labels < 3), labels, 0))
    np.save(tmp_path / "test.npy", np.where(np.arange(labels.shape[1]) > 20, labels, 0))
    (tmp_path / "c.csv").write_text("value,name,description\n1,grass,green grass\n2,road,grey road\n3,roof,grey roof\n")
    maps = ["--labels", "train=train.npy", "--labels", "test=test.npy"]
    assert call(["ingest", "--hsi", "cube.npy", *maps, "--classes", "c.csv", "--out", "s.zarr"], tmp_path).code == 0
    words = ["train-flc", "s.zarr", "--split", "official", "--shots", "3", *tiny(), "--json"]
    known = call([*words, "--out", "a"], tmp_path)
    added = call([*words, "--out", "b", "--add-class", "roof"], tmp_path)
    assert known.code == added.code == 0, added.err
    assert known.json["held_out"]["per_class"]["3"] == 0.0 and known.json["unlabelled"] == []
    assert added.json["held_out"]["per_class"]["3"] > 50.0 and added.json["held_out"]["absent"] == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--add-class", "=water"], ["--add-class takes NAME", "'=water'"]),
        (["--add-class", "pond", "--add-class", "pond=x"], ["names 'pond' twice"]),
        (["--add-class", "Pond", "--add-class", "pond"], ["knows a class named 'Pond' already"]),
        (["--add-class", "Road"], ["--add-class road: 3 labelled pixels", "without any"]),
        (["--share", "0.2"], ["--share is that of a class", "--add-class"]),
        (["--add-class", "pond", "--share", "pnd=0.2"], ["'pnd'", "did you mean 'pond'"]),
        (["--add-class", "pond", "--share", "1"], ["above 0 and below 1; got 1"]),
        (["--add-class", "pond", "--share", "nan"], ["above 0 and below 1; got nan"]),
        (["--add-class", "pond", "--share", "much"], ["--share takes a number"]),
        (["--add-class", "a", "--add-class", "b", "--share", "0.5"], ["1 in all"]),
        (["--add-class", "pond", "--prompts", "none"], ["--prompts none", "'pond'"]),
        (["--add-class", "pond=short green grass", "--add-class", "x=grass", "--prompts", "p9"], ["p9"]),
        (
            ["--add-class", "pond", "--set", "flc.head=contrastive", "--set", "flc.encoder=finetune"],
            ["flc.head=logistic"],
        ),
    ],
)
def test_classes_that_cannot_be_added_while_training(
    partly: Path, call: Callable[..., Result], more: list[str], words: list[str]
) -> None:
    for dry in (["--dry-run"], []):
        result = call(["train-flc", "scene.zarr", "--shots", "3", "--out", "no", *tiny(), *more, *dry], partly)
        result.one_sentence(2, *words)
        assert not (partly / "no").exists()


def test_a_prompts_file_words_an_added_class(partly: Path, call: Callable[..., Result]) -> None:
    (partly / "prompts.yaml").write_text("grass: meadow\nroad: asphalt\nroof: asphalt tiles\n")
    words = ["train-flc", "scene.zarr", "--shots", "2", "--out", "filed", "--prompts", "prompts.yaml", *tiny()]
    call([*words, "--add-class", "old pond"], partly).one_sentence(3, "7 ('old pond')", "prompts.yaml")
    (partly / "twice.yaml").write_text("grass: meadow\nroad: asphalt\nroof: asphalt\n")
    twice = [part.replace("prompts.yaml", "twice.yaml") for part in words]
    call([*twice, "--add-class", "roof", "--dry-run"], partly).one_sentence(2, "another class has its text, 'asphalt'")
    result = call([*words, "--add-class", "roof", "--add-class", "old pond=wet asphalt", "--json"], partly)
    assert result.code == 0, result.err
    prompts = json.loads((partly / "filed" / "manifest.json").read_text())["prompts"]
    assert prompts == ["meadow", "asphalt", "asphalt tiles", "old pond: wet asphalt"]


def test_a_class_that_is_like_no_other_is_said_to_be(partly: Path, call: Callable[..., Result]) -> None:
    (partly / "plain.yaml").write_text("grass: meadow\nroad: asphalt\nroof: qqq\n")
    words = ["train-flc", "scene.zarr", "--shots", "2", "--out", "strange", "--prompts", "plain.yaml", *tiny()]
    result = call([*words, "--add-class", "roof"], partly)
    assert result.code == 0 and "The text of 'roof' has no word of another class's" in result.out


def test_every_label_trains_and_a_class_is_added(partly: Path, call: Callable[..., Result]) -> None:
    words = ["train-flc", "scene.zarr", "--shots", "all", "--out", "every", "--add-class", "roof", *tiny(), "--json"]
    result = call(words, partly)
    assert result.code == 0, result.err
    assert result.json["held_out"]["classes"] == [1, 2, 3] and "10 folds" in result.json["judged_by"]


def test_evaluate_says_what_is_left_out(partly: Path, call: Callable[..., Result]) -> None:
    words = ["evaluate", "scene.zarr", "--shots", "2", "--seeds", "1", "--baselines", "none", *tiny()]
    assert "labelled so: roof, old pond." in call([*words, "--out", "e1"], partly).out
    chosen = call([*words, "--classes", "1,2", "--out", "e2"], partly)
    assert chosen.code == 0 and "Left out" not in chosen.out


@pytest.mark.parametrize("spec", ["labelled.zarr", "gt.npy", "roofs.npy"])
def test_add_class_learns_from_a_few_pixels(partly: Path, call: Callable[..., Result], spec: str) -> None:
    """From a scene, from label values that the class table names, and from a mask."""
    if not (partly / "labelled.zarr").exists():
        made = ["ingest", "--hsi", "cube.npy", "--labels", "gt.npy", "--classes", "classes.csv"]
        assert call([*made, "--out", "labelled.zarr"], partly).code == 0
    out = f"taught-{spec}"
    words = ["add-class", "m", "scene.zarr", "--name", "Roof", "--shots-from", spec, "--shots", "2", "--out", out]
    result = call([*words, "--json"], partly)
    assert result.code == 0, result.err
    found = result.json
    assert (found["value"], found["name"], found["shots"], found["share"], found["model"]) == (3, "roof", 2, None, out)
    assert found["found"] > 90 and found["found_of"] == 32
    assert (found["taken"], found["taken_of"]) == ((None, 0) if spec == "roofs.npy" else (0.0, 96))
    assert "2 labelled pixels and its text" in result.out and "stay as they were" in result.out
    mapped = call(["predict", "scene.zarr", "--model", out, "--out", "taught.tif", "--json"], partly)
    assert [round(row["share"]) for row in mapped.json["areas"]] == [33, 33, 33]
    assert (
        call(["suggest", "scene.zarr", "--model", out, "--count", "2", "--out", "s.geojson", "--json"], partly).code
        == 0
    )


@pytest.mark.parametrize("kind", ["polygons", "regions"])
def test_add_class_learns_from_what_was_drawn(trained: Path, call: Callable[..., Result], kind: str) -> None:
    """A polygon in a GIS, and a region of interest of ENVI: columns 20 to 23 of rows 1 and 2 of the scene."""
    from rasterio.warp import transform

    east, north = transform("EPSG:32615", "EPSG:4326", [3e5 + 40, 3e5 + 48], [4e6 - 2, 4e6 - 6])
    ring = [[east[i], north[j]] for i, j in ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))]
    feature = {
        "type": "Feature",
        "properties": {"kind": "Pond"},
        "geometry": {"type": "Polygon", "coordinates": [ring]},
    }
    (trained / "drawn.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    head = "; Number of ROIs: 1\n; File Dimension: 40 x 30\n; ROI name: pond\n; ROI npts: 8\n;  ID X Y\n"
    points = [f"{number} {number % 4 + 21} {number // 4 + 2}\n" for number in range(8)]
    (trained / "drawn.txt").write_text(head + "".join(points))
    spec = {"polygons": "drawn.geojson:kind", "regions": "drawn.txt"}[kind]
    words = ["add-class", "m", "scene.zarr", "--name", "pond", "--shots-from", spec, "--out", f"drawn-{kind}", "--json"]
    result = call(words, trained)
    assert result.code == 0, result.err
    assert (result.json["value"], result.json["shots"], result.json["found"]) == (4, 8, None)
    shots = json.loads((trained / f"drawn-{kind}" / "manifest.json").read_text())["shots"][-8:]
    assert sorted(shots) == [[0, row, col, 4] for row in (1, 2) for col in (20, 21, 22, 23)]
    call([*words[:-3], "--out", "never", "--shots", "9"], trained).one_sentence(
        2, "8 valid labelled pixels", "asks for 9"
    )


def test_few_drawn_pixels_are_all_learnt_from(partly: Path, call: Callable[..., Result]) -> None:
    """One patch of labels, too small to part shots from test pixels: they are drawn all the same."""
    labels = np.zeros((30, 40), np.uint8)
    labels[23:25, 1:3] = 1
    np.save(partly / "patch.npy", labels)
    words = ["add-class", "m", "scene.zarr", "--name", "roof", "--shots-from", "patch.npy", "--json"]
    result = call([*words, "--shots", "4", "--out", "patch"], partly)
    assert result.code == 0 and (result.json["shots"], result.json["found"]) == (4, None)


def test_a_known_share_settles_how_much_a_class_wins(partly: Path, call: Callable[..., Result]) -> None:
    words = ["add-class", "m", "scene.zarr", "--name", "roof", "--shots-from", "roofs.npy", "--shots", "1"]
    result = call([*words, "--share", "0.2", "--out", "fifth", "--json"], partly)
    assert result.code == 0 and (result.json["shots"], result.json["share"]) == (1, 0.2)
    mapped = call(["predict", "scene.zarr", "--model", "fifth", "--out", "fifth.tif", "--json"], partly)
    assert {row["name"]: round(row["share"]) for row in mapped.json["areas"]}["roof"] == 20


def test_words_then_pixels(partly: Path, call: Callable[..., Result]) -> None:
    """A class that words mapped is learnt from pixels in its place; all of them are shots without --shots."""
    words = ["--name", "roof", "--json"]
    assert call(["add-class", "m", "scene.zarr", *words, "--out", "said"], partly).code == 0
    result = call(["add-class", "said", "scene.zarr", *words, "--shots-from", "roofs.npy", "--out", "shown"], partly)
    assert result.code == 0, result.err
    assert (result.json["shots"], result.json["found"], result.json["found_of"]) == (48, None, 0)
    assert "away from the shots" not in result.out
    again = ["add-class", "shown", "scene.zarr", *words, "--shots-from", "roofs.npy", "--out", "twice"]
    call(again, partly).one_sentence(2, "knows a class named 'roof' already")


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--shots-from", "gone.npy"], 3, ["no file gone.npy"]),
        (["--shots-from", "two.npy"], 3, ["two.npy labels no pixel 'roof'", "grass, road"]),
        (["--shots-from", "scene.zarr"], 3, ["scene.zarr labels no pixel 'roof'", "grass, road"]),
        (["--shots-from", "roofs.npy", "--shots", "49"], 2, ["48 valid labelled pixels", "asks for 49"]),
        (["--shots-from", "roofs.npy", "--shots", "0"], 2, ["--shots takes a whole number"]),
        (["--shots-from", "roofs.npy", "--share", "1.2"], 2, ["above 0 and below 1; got 1.2"]),
        (["--shots", "2"], 2, ["--shots-from, which is not given"]),
        (["--shots-from", "cube.npy"], 3, ["cube.npy"]),
        (["--shots-from", "classes.csv"], 3, ["classes.csv is not a raster"]),
        (["--shots-from", "*.npy"], 2, ["--shots-from takes one"]),
        (["scene.zarr", "--shots-from", "gt.npy"], 2, ["which lie on one SCENE; 2 are given"]),
    ],
)
def test_pixels_that_cannot_teach(
    partly: Path, call: Callable[..., Result], more: list[str], code: int, words: list[str]
) -> None:
    result = call(["add-class", "m", "scene.zarr", "--name", "roof", "--out", "no", *more], partly)
    result.one_sentence(code, *words)
    assert not (partly / "no").exists()


def test_predict_rejects_what_is_not_sure(trained: Path, call: Callable[..., Result]) -> None:
    result = call(["predict", "scene.zarr", "--model", "m", "--out", "r.tif", "--reject", "0.99", "--json"], trained)
    assert result.code == 0, result.err
    assert result.json["areas"][-1]["name"] == "none of these" and "none of these" in result.out
    assert sum(row["pixels"] for row in result.json["areas"]) + result.json["nodata_pixels"] == result.json["pixels"]
    for wrong in ("0", "1.5", "nan"):
        call(["predict", "scene.zarr", "--model", "m", "--out", "x.tif", "--reject", wrong], trained).one_sentence(
            2, "--reject", "above 0 and at most 1"
        )
