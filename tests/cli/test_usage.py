"""Wrong usage ends with exit code 2 and one sentence that says what to do; nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .console import encoded, tiny

WRONG: list[tuple[list[str], list[str]]] = [
    (["train-flc", "scene.zarr", "--shot", "2"], ["no such option: --shot", "--shots", "train-flc --help"]),
    (["predct", "scene.zarr"], ["predct", "predict"]),
    (["predict", "scene.zarr"], ["missing option '--out'", "predict --help"]),
    (["train-umd", "scene.zarr", "--seed", "x"], ["'--seed'"]),
    (["train-umd", "scene.zarr", "--seed", "-1"], ["'--seed'"]),
    (["train-flc", "scene.zarr", "--shots", "0"], ["--shots", "1 or more", "'0'"]),
    (["train-flc", "scene.zarr", "--split", "disjiont"], ["'disjiont'", "did you mean 'disjoint'"]),
    (["train-flc", "scene.zarr", "--prompts", "p9"], ["p9"]),
    (["train-flc", "scene.zarr", "--on-short", "ignore"], ["--on-short", "use-all"]),
    (["train-umd", "scene.zarr", "--recipe", "bset"], ["'bset'", "did you mean 'best'"]),
    (["train-umd", "scene.zarr", "--set", "umd.epoch=3"], ["'umd.epoch'", "did you mean 'umd.epochs'"]),
    (["train-umd", "scene.zarr", "--set", "umd.epochs"], ["--set", "key=value"]),
    (["train-umd", "scene.zarr", "--set", "umd.epochs=many"], ["umd.epochs", "'many'"]),
    (["train-umd", "scene.zarr", "--set", "umd.epochs=["], ["umd.epochs=["]),
    (["train-umd", "scene.zarr", "--set", "model.window=4"], ["odd", "4"]),
    (["train-umd", "scene.zarr", "--config", "nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
    (["train-umd", "scene.zarr", "--device", "abacus"], ["abacus", "cpu"]),
    (["train-umd", "scene.zarr", "--resume"], ["--resume", "--out"]),
    (["train-umd", "scene.zarr", "--out", "full"], ["full", "not empty", "--resume"]),
    (["train-flc", "scene.zarr", "--out", "full"], ["full", "not empty", "--resume"]),
    (["evaluate", "scene.zarr", "--out", "full"], ["full", "not empty", "--resume"]),
    (["demo", "--out", "full"], ["full", "not empty"]),
    (["evaluate", "scene.zarr", "--baselines", "svn"], ["'svn'", "did you mean 'svm'"]),
    (["evaluate", "scene.zarr", "--classes", "1,two"], ["--classes", "1,two"]),
    (["evaluate", "--map", "map.tif"], ["--map", "--labels"]),
    (["evaluate", "scene.zarr", "--map", "map.tif", "--labels", "gt.mat"], ["--map", "no scene"]),
    (["predict", "scene.zarr", "--out", "map.tif"], ["no trained model", "--model", "train-flc"]),
    (["predict", "scene.zarr", "--out", "full"], ["--out full", "folder"]),
    (["predict", "scene.zarr", "--out", "m.tif", "--png", "m.tif"], ["--out", "--png", "m.tif"]),
    (["ingest", "--out", "x.zarr"], ["--hsi", "--modality"]),
    (["ingest", "--hsi", "cube.npy", "--modality", "dsm.tif", "--out", "x.zarr"], ["--modality", "lidar=dsm.tif"]),
    (["ingest", "--hsi", "cube.npy", "--nodata", "none", "--out", "x.zarr"], ["--nodata", "'none'"]),
    (["ingest", "--hsi", "cube.npy", "--valid", "lidr=dsm.tif", "--out", "x.zarr"], ["lidr", "hsi"]),
    (["ingest", "--hsi", "cube.npy", "--out", "scene.zarr"], ["scene.zarr", "--overwrite"]),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(arguments)[:60] for arguments, _ in WRONG])
def test_wrong_usage(arguments: list[str], words: list[str], call: Callable[..., Any], scene: Path) -> None:
    (scene / "full").mkdir()
    (scene / "full" / "mine.txt").write_text("mine")
    before = sorted(scene.rglob("*"))
    call(arguments, scene).one_sentence(2, *words)
    assert sorted(scene.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "others"),
    [
        ("demo", []), ("train-umd", []), ("train-flc", []), ("evaluate", []), ("study", ["table4"]),
        ("add-class", ["m", "scene.zarr", "--name", "pond"]),
    ],
)  # fmt: skip
def test_a_full_folder_points_to_resume_where_there_is_such_an_option(
    command: str, others: list[str], call: Callable[..., Any], scene: Path
) -> None:
    (scene / "full").mkdir()
    (scene / "full" / "mine.txt").write_text("mine")
    refused = call([command, *others, "--out", "full"], scene)
    refused.one_sentence(2, "full is not empty; give another --out")
    assert ("--resume" in refused.err) == ("--resume" in call([command, "--help"], scene).out)


def test_wrong_usage_as_a_process(real: Callable[..., Any], scene: Path) -> None:
    real(["train-umd", "scene.zarr", "--set", "umd.epoch=3"], scene).one_sentence(2, "did you mean 'umd.epochs'")
    real(["train-umd", "--shots", "3"], scene).one_sentence(2, "no such option: --shots")
    wrong = real(["train-umd", "--debug", "--set", "umd.epoch=3"], scene)
    assert wrong.code == 2 and "Traceback" in wrong.err and "UsageError" in wrong.err


def test_dry_run_checks_everything_and_writes_nothing(call: Callable[..., Any], scene: Path) -> None:
    before = sorted(scene.rglob("*"))
    umd = call(["train-umd", "scene.zarr", "--dry-run", "--json", *tiny()], scene)
    assert umd.code == 0, umd.err
    assert umd.json["pixels"] == 1200 and umd.json["windows"] == 64 and umd.json["steps"] == 4 and umd.json["dry_run"]
    flc = call(["train-flc", "scene.zarr", "--shots", "all", "--dry-run", "--json", *encoded()], scene)
    assert flc.json["windows"] == 144 and flc.json["shots"] == "all" and "train-umd runs first" in flc.out
    call(["train-flc", "scene.zarr", "--shots", "60", "--dry-run", *tiny()], scene).one_sentence(3, "'grass' has")
    assert sorted(scene.rglob("*")) == before


def test_no_scene_means_the_built_in_one(call: Callable[..., Any], tmp_path: Path) -> None:
    result = call(["train-flc", "--dry-run", "--json"], tmp_path)
    assert result.code == 0, result.err
    assert result.json["scenes"] == "suburb" and result.json["classes"] >= 10
    assert result.json["out"].startswith("runs/suburb/flc-")
    assert list(tmp_path.iterdir()) == []
