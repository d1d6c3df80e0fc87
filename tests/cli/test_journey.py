"""The four commands of the README on small files, each as a process of its own, and what they leave behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from .console import FULL, HEIGHT, WIDTH, Result, encoded, leftovers, tiny

RUN_FILES = {"model.safetensors", "config.yaml", "manifest.json", "metrics.json", "log.csv"}


@pytest.fixture(scope="module")
def journey(
    source: Path, tmp_path_factory: pytest.TempPathFactory, real: Callable[..., Result]
) -> tuple[Path, dict[str, Result]]:
    """The folder and what the commands printed: ingest, train-umd, train-flc, predict."""
    folder = tmp_path_factory.mktemp("journey") / "files"
    shutil.copytree(source, folder)
    commands = {
        "ingest": [*FULL, "--json"],
        "umd": ["train-umd", "scene.zarr", "--json", *tiny()],
        "flc": ["train-flc", "scene.zarr", "--shots", "3", "--json", *encoded()],
        "predict": ["predict", "scene.zarr", "--out", "out/map.tif", "--png", "map.png", "--probabilities", "p.tif"],
    }
    results = {name: real(arguments, folder) for name, arguments in commands.items()}
    for name, result in results.items():
        assert result.code == 0, f"{name}: {result.err}"
        assert result.err == "", f"{name}: {result.err}"
    return folder, results


def test_ingest_says_what_it_read(journey: tuple[Path, dict[str, Result]]) -> None:
    folder, results = journey
    assert results["ingest"].json["scenes"] == ["scene.zarr"] and results["ingest"].json["warnings"] == []
    assert "hsi: 30 x 40 pixels, 8 bands, uint16" in results["ingest"].out
    assert leftovers(folder) == []


def test_runs_lie_in_their_default_folders(journey: tuple[Path, dict[str, Result]]) -> None:
    folder, results = journey
    for stage in ("umd", "flc"):
        out = Path(results[stage].json["out"])
        assert out.parent == Path("runs/scene") and out.name.startswith(f"{stage}-20")
        assert {path.name for path in (folder / out).iterdir()} == RUN_FILES
        manifest = json.loads((folder / out / "manifest.json").read_text())
        assert manifest["stage"] == stage and manifest["seed"] == 0 and manifest["scenes"][0]["name"] == "scene"
        assert manifest["versions"]["torch"] and len(manifest["scenes"][0]["sha256"]) == 64
        steps = results[stage].json["steps"]
        assert len((folder / out / "log.csv").read_text().splitlines()) == steps + 1
        assert json.loads((folder / out / "metrics.json").read_text())["steps"] == steps


def test_the_pretrained_model_is_found_and_used(journey: tuple[Path, dict[str, Result]]) -> None:
    folder, results = journey
    assert results["flc"].json["umd"] == results["umd"].json["out"]
    assert f"Pretrained network: {results['umd'].json['out']}" in results["flc"].out
    assert len(list((folder / "runs" / "scene").glob("umd-*"))) == 1


def test_held_out_figures_are_printed_and_stored(journey: tuple[Path, dict[str, Result]]) -> None:
    folder, results = journey
    figures = results["flc"].json["held_out"]
    assert figures["pixels"] == 96 and 0 <= figures["oa"] <= 100
    assert len(results["flc"].json["split_report"]) == 3 and "3 classes: separated by" in results["flc"].out
    assert results["flc"].json["train_pixels"] == 9 and "disjoint split, 96 test pixels" in results["flc"].out
    for word in ("OA ", "AA ", "kappa ", "grass", "road", "roof"):
        assert word in results["flc"].out
    stored = json.loads((folder / results["flc"].json["out"] / "metrics.json").read_text())
    assert stored["held_out"] == figures


def test_the_map_lies_on_the_grid_of_the_input(journey: tuple[Path, dict[str, Result]]) -> None:
    import rasterio

    folder, results = journey
    with rasterio.open(folder / "dsm.tif") as dsm, rasterio.open(folder / "out" / "map.tif") as found:
        assert (found.height, found.width, found.count) == (HEIGHT, WIDTH, 1)
        assert found.crs == dsm.crs and found.transform == dsm.transform
        assert found.nodata == 0 and set(np.unique(found.read(1))) <= {1, 2, 3}
        assert found.colormap(1)[1][3] == 255
        classes = found.read(1)
    with rasterio.open(folder / "p.tif") as likely:
        assert likely.descriptions == ("grass", "road", "roof") and likely.crs is not None
        np.testing.assert_allclose(likely.read().sum(axis=0), 1, atol=1e-5)
        assert (likely.read().argmax(axis=0) + 1 == classes).all()
    assert (folder / "map.png").read_bytes().startswith(b"\x89PNG")
    assert results["predict"].out.count("Written: ") == 3 and "hectares" in results["predict"].out
    assert leftovers(folder) == []


def test_predict_takes_the_newest_model_and_repeats_itself(
    journey: tuple[Path, dict[str, Result]], call: Callable[..., Result]
) -> None:
    folder, results = journey
    again = call(["predict", "scene.zarr", "--out", "again.tif", "--json"], folder)
    assert again.json["model"] == results["flc"].json["out"]
    assert (folder / "again.tif").read_bytes() == (folder / "out" / "map.tif").read_bytes()


def test_evaluate_a_map(journey: tuple[Path, dict[str, Result]], call: Callable[..., Result]) -> None:
    folder, _ = journey
    result = call(["evaluate", "--map", "out/map.tif", "--labels", "gt.mat:gt", "--json"], folder)
    assert result.code == 0 and result.json["pixels"] == 144 and "grass" in result.out
    import rasterio

    with rasterio.open(folder / "out" / "map.tif") as found:
        classes, labels = found.read(1), np.load(folder / "gt.npy")
    assert result.json["oa"] == pytest.approx(100 * (classes == labels)[labels > 0].mean())


def test_evaluate_with_baselines(journey: tuple[Path, dict[str, Result]], call: Callable[..., Result]) -> None:
    folder, results = journey
    options = ["--shots", "2,3", "--seeds", "2", "--baselines", "1nn,linear,clip", *tiny()]
    result = call(["evaluate", "scene.zarr", "--json", *options], folder)
    assert result.code == 0, result.err
    rows = result.json["rows"]
    assert [(row["shots"], row["method"], row["features"]) for row in rows[:5]] == [
        (2, "fastdiffclip", "window"), (2, "1nn", "pixel"), (2, "1nn", "window"), (2, "linear", "window"),
        (2, "clip", "window"),
    ]  # fmt: skip
    assert len(rows) == 10
    keys = {"scene", "split", "shots", "method"} | {f"{k}_{s}" for k in ("oa", "aa", "kappa") for s in ("mean", "sd")}
    assert all(keys | {"seeds"} <= set(row) and row["seeds"] == 2 for row in rows)
    out = folder / result.json["out"]
    assert out.parent == folder / "runs" / "scene" and out.name.startswith("evaluate-")
    assert {"table.md", "table.csv", "results.json", "predictions.jsonl"} == {path.name for path in out.iterdir()}
    assert "unlabelled pixels of the whole scene" in result.out  # what pretraining saw, in every table
    longer = call(["evaluate", "scene.zarr", "--resume", "--out", str(out), *options], folder)
    assert longer.code == 0 and longer.out.splitlines()[:6] == result.out.splitlines()[:6]


def test_scene_info_and_verify(journey: tuple[Path, dict[str, Result]], call: Callable[..., Result]) -> None:
    folder, _ = journey
    info = call(["scene", "info", "scene.zarr", "--json"], folder)
    assert info.json["height"] == HEIGHT and [part["name"] for part in info.json["modalities"]] == ["hsi", "lidar"]
    for word in ("30 x 40 pixels", "UTM zone 15N", "144 pixels in 'labels'", "uint16", "grass", "cube.mat"):
        assert word in info.out
    verified = call(["scene", "verify", "scene.zarr", "--json"], folder)
    assert verified.json["ok"] is True and "all whole" in verified.out


def test_flc_runs_umd_first_when_none_fits(scene: Path, call: Callable[..., Result]) -> None:
    first = call(["train-flc", "scene.zarr", "--json", *encoded()], scene)
    assert first.code == 0 and "train-umd runs first" in first.out
    assert first.json["umd"].startswith("runs/scene/umd-") and (scene / first.json["umd"] / "manifest.json").exists()
    second = call(["train-flc", "scene.zarr", "--seed", "1", "--out", "second", "--json", *encoded()], scene)
    assert second.json["umd"] == first.json["umd"] and "runs first" not in second.out
    other = call(["train-flc", "scene.zarr", "--dry-run", *encoded("umd.epochs=3")], scene)
    assert "train-umd runs first" in other.out  # other settings of pretraining are another model
    named = call(["train-flc", "scene.zarr", "--umd", first.json["umd"], *encoded("model.width=32")], scene)
    named.one_sentence(3, first.json["umd"], "model.width", "16", "32")
    none = call(["train-flc", "scene.zarr", "--umd", "none", "--out", "none", "--json", *encoded()], scene)
    assert none.code == 0 and none.json["umd"] is None


def test_bands_are_pretrained_where_the_head_reads_restored(scene: Path, call: Callable[..., Result]) -> None:
    bands = tiny("logistic.views=[means,restored]", "bands.steps=4", "bands.batch=16", "bands.samples=50")
    plan = call(["train-umd", "scene.zarr", "--dry-run", "--json", *bands], scene).json
    assert (plan["tokens"], plan["windows"], plan["batch"], plan["steps"]) == ("bands", 50, 16, 4)
    first = call(["train-flc", "scene.zarr", "--out", "m", "--json", *bands], scene)
    assert first.code == 0 and "train-umd runs first" in first.out and first.json["umd"].startswith("runs/scene/umd-")
    again = call(["train-flc", "scene.zarr", "--out", "n", "--json", *bands], scene)
    assert again.json["umd"] == first.json["umd"] and again.json["held_out"] == first.json["held_out"]
    assert call(["predict", "scene.zarr", "--model", "m", "--out", "map.tif"], scene).code == 0
    refused = call(["train-flc", "scene.zarr", "--umd", first.json["umd"], *encoded()], scene)
    refused.one_sentence(3, first.json["umd"], "it restores bands", "pixels")
    judged = call(["evaluate", "scene.zarr", "--shots", "2", "--seeds", "1", "--json", *bands], scene)
    assert judged.code == 0 and judged.json["rows"][0]["aa_mean"] > 50


def test_a_head_that_does_not_look_through_the_encoder_needs_no_pretraining(
    scene: Path, call: Callable[..., Result]
) -> None:
    result = call(["train-flc", "scene.zarr", "--json", *tiny()], scene)
    assert result.code == 0 and "train-umd" not in result.out and "no network" in result.out
    assert result.json["umd"] is None and result.json["encoder"] is None
    assert not list((scene / "runs" / "scene").glob("umd-*"))


def test_all_shots_are_judged_by_leaving_out(scene: Path, call: Callable[..., Result]) -> None:
    result = call(
        ["train-flc", "scene.zarr", "--shots", "all", "--umd", "none", "--out", "m", "--json", *tiny()], scene
    )
    assert result.code == 0, result.err
    assert result.json["train_pixels"] == 144 and "folds" in result.json["judged_by"]
    assert result.json["held_out"]["pixels"] == 144


def test_resume_with_nothing_there_starts_fresh(scene: Path, call: Callable[..., Result]) -> None:
    fresh = call(["train-umd", "scene.zarr", "--out", "m", "--resume", "--json", *tiny()], scene)
    assert fresh.code == 0 and {path.name for path in (scene / "m").iterdir()} == RUN_FILES
    again = call(["train-umd", "scene.zarr", "--out", "m", "--resume", "--json", *tiny()], scene)
    # Finished already: the same figures, no second training, and so no first step.
    assert again.code == 0 and again.json == {**fresh.json, "seconds_to_first_step": None}
    call(["train-umd", "scene.zarr", "--out", "m", *tiny()], scene).one_sentence(2, "m is not empty")
    other = call(["train-umd", "scene.zarr", "--out", "m", "--resume", *tiny("umd.lr=1")], scene)
    other.one_sentence(2, "m was started with other settings")


def test_official_maps(files: Path, call: Callable[..., Result]) -> None:
    labels = np.load(files / "gt.npy")
    train, test = labels.copy(), labels.copy()
    train[:, 14:], test[:, :14] = 0, 0
    np.save(files / "train.npy", train)
    np.save(files / "test.npy", test)
    maps = ["--labels", "train=train.npy", "--labels", "test=test.npy", "--classes", "classes.csv"]
    assert call(["ingest", "--hsi", "cube.npy", *maps, "--out", "x.zarr"], files).code == 0
    common = ["train-flc", "x.zarr", "--umd", "none", "--split", "official"]
    result = call([*common, "--shots", "all", "--json", *tiny()], files)
    assert result.code == 0, result.err
    assert result.json["train_pixels"] == 48 and result.json["held_out"]["pixels"] == 96


def test_a_folder_of_scenes(files: Path, call: Callable[..., Result]) -> None:
    for number in (1, 2):
        shutil.copy(files / "cube.npy", files / f"plot{number}_hsi.npy")
        shutil.copy(files / "gt.npy", files / f"plot{number}_gt.npy")
    globs = ["--hsi", "plot*_hsi.npy", "--labels", "plot*_gt.npy", "--classes", "classes.csv", "--out", "plots"]
    assert len(call(["ingest", *globs, "--json"], files).json["scenes"]) == 2
    result = call(["train-flc", "plots", "--umd", "none", "--json", *tiny()], files)
    assert result.code == 0, result.err
    assert result.json["scenes"] == "plots (2 scenes)" and result.json["out"].startswith("runs/plots/flc-")


def test_the_demo_goes_from_nothing_to_a_report(
    tmp_path: Path, real: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    import rasterio

    from fastdiffclip.commands.demonstration import free_folder

    result = real(["demo", "--shots", "2", "--json", *tiny()], tmp_path)
    assert result.code == 0 and result.err == "", result.err
    out = tmp_path / "runs" / "demo"
    assert {"suburb.zarr", "umd", "flc", "evaluation", "map.tif", "map.png", "report.html"} <= {
        path.name for path in out.iterdir()
    }
    assert result.json["report"] == "runs/demo/report.html" and result.json["map"] == "runs/demo/map.tif"
    assert {row["method"] for row in result.json["rows"]} == {"fastdiffclip", "svm", "extratrees", "1nn", "linear"}
    for step in ("1/5", "2/5", "3/5", "4/5", "5/5", "suburb, split disjoint, 5 draws", "Report"):
        assert step in result.out
    with rasterio.open(out / "map.tif") as found:
        assert found.shape == (200, 300) and found.crs is not None
    assert leftovers(tmp_path) == []
    monkeypatch.chdir(tmp_path)
    assert free_folder() == Path("runs/demo-2")  # a second demo does not stumble over the first
