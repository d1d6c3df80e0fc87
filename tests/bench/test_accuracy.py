"""The accuracy bench on the small scene: every experiment runs, and its head is the product's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from fastdiffclip.bench.accuracy import Bench, main
from fastdiffclip.config import load_config
from fastdiffclip.evaluate.runner import Plan, evaluate
from fastdiffclip.scene.store import Scene

SMALL = ["--set", "model.window=3", "--set", "logistic.samples=100", "--shots", "2", "--draws", "2"]


@pytest.mark.parametrize("experiment", ["steps", "text", "zero-shot", "add-class", "active"])
def test_every_experiment_runs(
    experiment: str, small_scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    assert main([experiment, str(small_scene.path), *SMALL, "--rounds", "1", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("|") > 10
    assert json.loads(out.read_text())["experiment"] == experiment


def test_its_figures_are_those_of_evaluate(small_scene: Scene) -> None:
    sets = ["model.window=3", "logistic.samples=100", "precision=fp32", "logistic.views=[means,neighbours,pixel]"]
    config = load_config("best", None, sets)
    given = argparse.Namespace(
        classes=None, first=0, draws=2, shots=[2], gap=None, split="disjoint", test_limit=None, umd=None, seed=0,
        prompts=None,
    )  # fmt: skip
    bench = Bench([small_scene], config, given)
    found = [outcome.accuracy for outcome in bench.head()]
    plan = Plan((2,), 2, "disjoint", baselines=(), on_short="use-all")
    runs = next(iter(evaluate([small_scene], plan, config, device="cpu").scores.values()))
    np.testing.assert_allclose(found, [run.aa for run in runs], atol=1e-9)


def test_a_scene_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["steps", str(tmp_path / "gone.zarr"), *SMALL]) == 3
    assert "gone.zarr" in capsys.readouterr().err
