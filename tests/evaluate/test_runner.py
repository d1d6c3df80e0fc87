"""Repeated evaluation: no test pixel is trained on, a run goes on where it stopped, and never on another's results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdiffclip.commands.views import show_evaluation
from fastdiffclip.config import Config
from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.evaluate import contest, runner
from fastdiffclip.evaluate.contest import Contest, held_out, log_odds, predict_centres
from fastdiffclip.evaluate.metrics import BINARY
from fastdiffclip.evaluate.runner import Plan, evaluate, scene_title
from fastdiffclip.scene.labelled import labelled_pixels
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.flc import FlcResult, window_source
from fastdiffclip.train.umd import UmdResult

KEYS = {
    "scene", "split", "shots", "method", "features", "oa_mean", "oa_sd", "aa_mean", "aa_sd", "kappa_mean", "kappa_sd",
    "ece_mean", "ece_sd", "seeds", "per_class",
}  # fmt: skip
PLAN = Plan(shots=(2, 4), seeds=2, baselines=("1nn", "clip", "linear"))


@pytest.fixture
def run(small_scene: Scene, small_config: Config, small_umd: UmdResult) -> Callable[..., list[dict[str, Any]]]:
    """Evaluate with the pretrained small model; returns the rows."""

    def rows(plan: Plan = PLAN, config: Config = small_config, **settings: Any) -> list[dict[str, Any]]:
        settings = {"umd": small_umd, "device": "cpu"} | settings
        return evaluate([small_scene], plan, config, **settings).rows()

    return rows


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the methods that were really run."""
    names: list[str] = []
    plain = Contest.run

    def spy(self: Contest, method: str, *others: Any) -> Any:
        names.append(method)
        return plain(self, method, *others)

    monkeypatch.setattr(Contest, "run", spy)
    return names


def test_rows(run: Callable[..., list[dict[str, Any]]], small_scene: Scene) -> None:
    rows = run()
    assert [(row["shots"], row["method"], row["features"]) for row in rows] == [
        (shots, method, features)
        for shots in (2, 4)
        for method, features in (
            ("fastdiffclip", "window"), ("1nn", "pixel"), ("1nn", "window"), ("clip", "window"), ("linear", "window"),
        )
    ]  # fmt: skip
    for row in rows:
        assert set(row) == KEYS and row["seeds"] == 2
        assert (row["scene"], row["split"]) == (small_scene.name, "disjoint")
        assert 0 <= row["oa_mean"] <= 100 and 0 <= row["aa_mean"] <= 100 and row["oa_sd"] >= 0
        assert set(row["per_class"]) == {1, 2, 4}
    assert json.loads(json.dumps(rows, allow_nan=False))
    ours = [row for row in rows if row["method"] == "fastdiffclip"]
    assert all(row["aa_mean"] > 80 for row in ours)  # three materials that are easy to tell apart


@pytest.mark.parametrize("split", ["disjoint", "random"])
@pytest.mark.parametrize("encoder", ["frozen", "finetune"])
def test_no_method_trains_on_a_test_pixel(
    run: Callable[..., list[dict[str, Any]]], small_scene: Scene, small_config: Config, split: str, encoder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every trainer is given exactly the shots of its draw, and predicts exactly the test pixels."""
    labelled = labelled_pixels([small_scene])
    splits = {seed: labelled.split(split, 2, seed, 3) for seed in (5, 6)}
    reads: list[set[tuple[int, ...]]] = []
    given: list[tuple[str, int, int]] = []
    plain_windows, plain_flc = contest.WindowSource.windows, contest.train_flc
    plain_baseline, plain_linear = contest.predict_baseline, contest.predict_linear

    def windows(self: Any, centres: np.ndarray) -> list[np.ndarray]:
        reads.append({tuple(c) for c in centres.tolist()})
        return plain_windows(self, centres)

    def flc(scenes: Any, shots: Any, *others: Any, **settings: Any) -> FlcResult:
        train = splits[settings["seed"]].train
        assert {tuple(c) for c in shots.centres.tolist()} == {tuple(c) for c in train.tolist()}
        assert np.array_equal(small_scene.read_labels()[shots.centres[:, 1], shots.centres[:, 2]], shots.labels)
        given.append(("flc", len(shots.centres), settings["seed"]))
        reads.clear()
        result = plain_flc(scenes, shots, *others, **settings)
        assert reads == [{tuple(c) for c in train.tolist()}]
        return result

    def baseline(name: str, x: np.ndarray, y: np.ndarray, test: np.ndarray, *, seed: int) -> Any:
        given.append((name, len(x), len(test)))
        assert np.array_equal(y, splits[seed].train_labels) and len(test) == len(splits[seed].test)
        return plain_baseline(name, x, y, test, seed=seed)

    def linear(train: Any, labels: np.ndarray, test: Any) -> Any:
        given.append(("linear", len(labels), len(next(iter(test.values())))))
        return plain_linear(train, labels, test)

    monkeypatch.setattr(contest.WindowSource, "windows", windows)
    monkeypatch.setattr(contest, "train_flc", flc)
    monkeypatch.setattr(contest, "predict_baseline", baseline)
    monkeypatch.setattr(contest, "predict_linear", linear)
    config = small_config.model_copy(update={"flc": small_config.flc.model_copy(update={"encoder": encoder})})
    run(Plan(shots=(2,), seeds=2, first_seed=5, split=split, baselines=("svm", "linear", "clip")), config)
    assert [name for name, *_ in given].count("flc") == 4  # ours and clip, two seeds
    assert all(count == 6 for _, count, _ in given)
    for draw in splits.values():
        train, test = ({tuple(c) for c in part.tolist()} for part in (draw.train, draw.test))
        assert not train & test and len(test) > 50


def test_resume_computes_nothing_twice(
    run: Callable[..., list[dict[str, Any]]], trained_on: list[str], tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(task: str, done: int, total: int, note: str = "") -> None:
        if task == "evaluate" and done == 7:
            raise Stop

    whole = run()
    assert len(trained_on) == 20
    trained_on.clear()
    out = tmp_path / "out"
    with pytest.raises(Stop):
        run(out=out, progress=stop)
    assert len(trained_on) == 7
    with open(out / "predictions.jsonl", "a") as file:  # as a kill leaves it
        file.write('{"key": "[\\"disj')
    with pytest.raises(UsageError, match="not empty"):
        run(out=out)
    trained_on.clear()
    assert run(out=out, resume=True) == whole and len(trained_on) == 13
    trained_on.clear()
    assert run(out=out, resume=True) == whole and trained_on == []
    more = Plan(shots=(2, 4), seeds=3, baselines=("1nn", "clip", "linear", "svm"))
    assert len(run(more, out=out, resume=True)) == 14 and len(trained_on) == 3 * 14 - 20


@pytest.mark.parametrize(
    "change",
    [
        {"plan": Plan(shots=(2,), seeds=1, baselines=(), prompts="p1")},
        {"plan": Plan(shots=(2,), seeds=1, baselines=(), classes=(1, 2))},
        {"plan": Plan(shots=(2,), seeds=1, baselines=(), test_limit=5)},
        {"plan": Plan(shots=(2,), seeds=1, baselines=(), on_short="use-all")},
        {"umd": None, "pretrain": False},
        {"config": {"lr": 1e-4}},
    ],
)
def test_results_of_other_settings_are_not_taken(
    run: Callable[..., list[dict[str, Any]]], small_config: Config, tmp_path: Path, change: dict[str, Any]
) -> None:
    plan, out = Plan(shots=(2,), seeds=1, baselines=()), tmp_path / "out"
    run(plan, out=out)
    settings = {"plan": plan} | change
    if "config" in change:
        settings["config"] = small_config.model_copy(
            update={"flc": small_config.flc.model_copy(update=change["config"])}
        )
    with pytest.raises(UsageError, match=r"predictions\.jsonl was made with other settings"):
        run(out=out, resume=True, **settings)
    memory = small_config.model_copy(update={"memory_gib": 0.5})
    run(plan, memory, out=out, resume=True)


def test_results_of_other_texts_or_another_version_are_not_taken(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, out = tmp_path / "texts.yaml", tmp_path / "out"
    plan = Plan(shots=(2,), seeds=1, baselines=(), prompts=str(texts))
    texts.write_text("{1: water, 2: grass, 4: a roof}")
    run(plan, out=out)
    texts.write_text("{4: a roof, 2: grass, 1: water}")  # worded alike
    run(plan, out=out, resume=True)
    texts.write_text("{1: a lake, 2: grass, 4: a roof}")
    with pytest.raises(UsageError, match=r"predictions\.jsonl was made with other settings"):
        run(plan, out=out, resume=True)
    texts.write_text("{1: water, 2: grass, 4: a roof}")
    monkeypatch.setattr(runner, "FORMAT", runner.FORMAT + 1)
    with pytest.raises(UsageError, match=r"predictions\.jsonl was written by fastdiffclip"):
        run(plan, out=out, resume=True)


def test_a_folder_belongs_to_one_evaluation_at_a_time(run: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    plan, out = Plan(shots=(2,), seeds=1, baselines=()), tmp_path / "out"

    def another(task: str, done: int, total: int, note: str = "") -> None:
        with pytest.raises(UsageError, match="another process works in"):
            run(plan, out=out, resume=True)

    run(plan, out=out, progress=another)
    assert os.listdir(out) == ["predictions.jsonl"]


def test_pretraining_is_kept(small_scene: Scene, small_config: Config, small_umd: UmdResult, tmp_path: Path) -> None:
    plan, tasks = Plan(shots=(2,), seeds=1, baselines=()), []

    def note(task: str, done: int, total: int, text: str = "") -> None:
        tasks.append(task)

    first = evaluate([small_scene], plan, small_config, out=tmp_path / "out", device="cpu", progress=note)
    assert "train-umd" in tasks and sorted(os.listdir(tmp_path / "out")) == ["predictions.jsonl", "umd"]
    tasks.clear()
    again = evaluate([small_scene], plan, small_config, out=tmp_path / "out", resume=True, device="cpu", progress=note)
    assert "train-umd" not in tasks and again.rows() == first.rows()
    given = evaluate([small_scene], plan, small_config, umd=small_umd, device="cpu")
    assert given.rows() == first.rows()


def test_wrong_input_is_found_before_pretraining(
    small_scene: Scene, small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("pretraining began")

    monkeypatch.setattr(runner, "train_umd", never)
    with pytest.raises(InputDataError, match="too few valid labelled pixels"):
        evaluate([small_scene], Plan(shots=(500,), seeds=1), small_config, device="cpu")
    with pytest.raises(UsageError):
        evaluate([small_scene], Plan(seeds=1, prompts="p9"), small_config, device="cpu")
    (tmp_path / "x").write_text("")
    with pytest.raises(UsageError, match="not empty"):
        evaluate([small_scene], Plan(seeds=1), small_config, out=tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"baselines": ("svn",)}, r"no baseline 'svn' \(did you mean 'svm'\?\); there is: svm, extratrees"),
        ({"seeds": 0}, "at least one seed"),
        ({"shots": ()}, "one shot"),
        ({"shots": (0,)}, "one shot"),
    ],
)
def test_plans_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Plan(**settings)


def test_held_out_figures(flc_run: FlcResult, small_scene: Scene, small_config: Config, small_umd: UmdResult) -> None:
    split = labelled_pixels([small_scene]).split("disjoint", 4, 0, 3)
    source = window_source([small_scene], small_config, small_umd)
    predicted = predict_centres(flc_run, source, split.test, "cpu")
    scores = held_out(flc_run, source, split, "cpu")
    assert scores.oa == pytest.approx(100 * (predicted == split.test_labels).mean()) and scores.pixels == len(
        split.test
    )
    assert scores.aa > 80


def test_two_classes_have_the_figures_of_medicine(
    run: Callable[..., list[dict[str, Any]]], small_scene: Scene, small_config: Config, small_umd: UmdResult,
    trained_on: list[str], tmp_path: Path,
) -> None:  # fmt: skip
    plan = Plan(shots=(3,), seeds=2, baselines=("svm", "extratrees", "1nn", "linear"), classes=(1, 2))
    rows = run(plan, out=tmp_path / "out")
    assert all(set(row) == KEYS | {f"{k}_{s}" for k in BINARY for s in ("mean", "sd")} for row in rows)
    for row in rows:
        assert (row["auc_mean"] is None) == (row["method"] == "1nn")
        assert row["acc_mean"] == row["oa_mean"] and (row["auc_mean"] or 100) > 80
        assert (row["se_mean"], row["sp_mean"]) == pytest.approx((row["per_class"][2], row["per_class"][1]))
    trained_on.clear()
    assert run(plan, out=tmp_path / "out", resume=True) == rows and trained_on == []
    result = evaluate([small_scene], plan, small_config, umd=small_umd, out=tmp_path / "out", resume=True, device="cpu")
    summary = show_evaluation(result, tmp_path / "table")
    assert any("accuracy of 'roof'" in note for note in summary["notes"])
    table = (tmp_path / "table" / "table.md").read_text(encoding="utf-8").splitlines()
    assert table[2].endswith("| kappa | ECE % | AUC % | SE % | SP % |")
    assert sum("| none |" in line for line in table) == 6  # no probabilities
    assert sum("| none | none |" in line for line in table) == 2  # and nothing to rank by


def test_log_odds_tell_apart_what_rounds_to_certainty() -> None:
    probabilities = np.array([[1.0, 1e-20], [1.0, 1e-30], [0.5, 0.5], [0.0, 1.0]], np.float32)
    odds = log_odds(probabilities, [1, 2])
    assert odds is not None and np.array_equal(np.argsort(odds), [1, 0, 2, 3]) and np.isfinite(odds).all()
    assert np.array_equal(log_odds(probabilities, [9, 2]), -odds)
    assert log_odds(np.ones((1, 3)) / 3, [1, 2, 3]) is None


def test_all_shots_of_a_class(run: Callable[..., list[dict[str, Any]]]) -> None:
    rows = run(Plan(shots=(None,), seeds=1, baselines=()))
    assert rows[0]["shots"] == "all" and rows[0]["oa_sd"] is None and rows[0]["seeds"] == 1


def test_titles(small_scene: Scene) -> None:
    assert scene_title([small_scene]) == "small"
    assert scene_title([small_scene, small_scene]) == f"{small_scene.path.parent.name} (2 scenes)"
