"""Any study: what it computes, what it finds there already, what it leaves, and what it says is wrong."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdiffclip.errors import InputDataError, ResourceError, UsageError
from fastdiffclip.evaluate import journal
from fastdiffclip.scene.store import Scene, open_scene
from fastdiffclip.study import exams, runner
from fastdiffclip.study import job as jobs_of
from fastdiffclip.study.catalogue import STUDIES, Row
from fastdiffclip.study.crew import count_jobs
from fastdiffclip.study.exams import generated_exams
from fastdiffclip.study.job import Options, make_job
from fastdiffclip.study.output import summary_of, table_of, write_study
from fastdiffclip.study.runner import StudyResult, run_study

from .conftest import TINY

Run = Callable[..., StudyResult]
SMALL = replace(STUDIES["table3"], rows=(*STUDIES["table3"].rows[:2], Row("linear", "linear")))


def labels_of(result: StudyResult) -> list[str]:
    return [cell.row.label for cell in result.cells]


def test_table1_has_both_recipes_the_controls_and_the_baselines(study: Run) -> None:
    result = study("table1", shots=(2, 3), seeds=1)
    one = [
        "best", "best + encoder", "best + encoder, random weights", "paper", "clip", "linear", "svm, pixel",
        "svm, window", "extratrees, pixel", "extratrees, window", "1nn, pixel", "1nn, window",
    ]  # fmt: skip
    assert labels_of(result) == 2 * one and [cell.shots for cell in result.cells] == 12 * [2] + 12 * [3]
    assert all(len(cell.entries) == 1 and cell.seeds == (0,) for cell in result.cells)
    assert result.computed == 24 and result.pretrainings == 2  # of best + encoder and of paper
    by_label = {cell.row.label: cell for cell in result.cells[:12]}
    assert by_label["best"].settings["umd"] is None and by_label["paper"].settings["umd"] is not None
    assert by_label["clip"].settings["prompts"] == ["grass", "roof", "water"]
    assert by_label["clip"].settings["prepare"] == "standard" and by_label["best"].settings["prepare"] == "mnf"
    assert by_label["linear"].summary()["aa_mean"] > 80 and by_label["linear"].summary()["ece_mean"] is not None
    assert by_label["1nn, pixel"].summary()["ece_mean"] is None


def test_rows_about_the_encoder_read_it_in_place_of_the_network_over_bands(study: Run) -> None:
    bands = (*TINY, "logistic.views=[means,restored]", "bands.steps=3", "bands.batch=16")
    result = study("table3", seeds=1, overrides=bands, only=("best", "best + encoder"), reference="best")
    assert result.pretrainings == 2
    views = {cell.row.label: cell.settings["logistic"]["views"] for cell in result.cells}
    assert views == {"best": ["means", "restored"], "best + encoder": ["means", "tokens"]}


def test_the_network_over_bands_has_its_controls(study: Run) -> None:
    bands = (*TINY, "logistic.views=[means,restored]", "bands.steps=3", "bands.batch=16")
    rows = ("best", "best, random weights", "best without a network")
    result = study("table1", seeds=1, overrides=bands, only=rows)
    assert labels_of(result) == list(rows) and result.pretrainings == 1
    found = {
        cell.row.label: (cell.settings["logistic"]["views"], cell.settings["umd"] is None) for cell in result.cells
    }
    both = ["means", "restored"]
    assert list(found.values()) == [(both, False), (both, True), (["means"], True)]
    alone = (*bands[:-3], "logistic.views=[restored]", *bands[-2:])
    single = study("table1", "single", seeds=1, overrides=alone, only=rows[2:])
    assert single.cells[0].settings["logistic"]["views"] == ["means"]


def test_differences_are_of_the_same_draws(study: Run) -> None:
    result = study(SMALL, seeds=3, reference="linear")
    mine, reference = result.cells[0], result.cells[2]
    gaps = np.array([a.aa - b.aa for a, b in zip(mine.scores, reference.scores, strict=True)])
    found = mine.differences["aa"]
    assert found["mean"] == pytest.approx(gaps.mean()) and found["draws"] == 3
    assert found["se"] == pytest.approx(gaps.std(ddof=1) / math.sqrt(3))
    assert reference.differences == {} and result.reference == "linear"
    columns, rows = table_of(result)
    assert columns[-1] == "AA - linear (± se)" and rows[2][-1] == "" and rows[0][-1][0] in "+-"


def test_what_is_left(study: Run, tmp_path: Path) -> None:
    result = study(SMALL)
    files = write_study(result)
    assert [path.name for path in files] == ["table3.md", "table3.csv", "table3.json"]
    written = json.loads(files[2].read_text(encoding="utf-8"))
    assert [row["label"] for row in written["rows"]] == labels_of(result)
    for row, cell in zip(written["rows"], result.cells, strict=True):
        assert [draw["seed"] for draw in row["draws"]] == [0, 1] and all(draw["seconds"] >= 0 for draw in row["draws"])
        assert [draw["scores"]["aa"] for draw in row["draws"]] == [scores.aa for scores in cell.scores]
        assert row["settings"]["model"]["window"] == 3 and row["aa_mean"] == cell.summary()["aa_mean"]
    assert written["versions"]["torch"] and written["split"] == "disjoint" and written["seconds"] > 0
    columns, rows = table_of(result)
    read = list(csv.reader(files[1].read_text(encoding="utf-8").splitlines()))
    assert read == [columns, *rows]
    text = files[0].read_text(encoding="utf-8")
    assert (
        text.startswith("**table3: What each part is worth. small, split disjoint, 2 draws") and "Without text" in text
    )
    assert sorted(os.listdir(tmp_path / "out" / "umd")) == [result.cells[0].settings["umd"]]


def test_a_study_goes_on_where_it_stopped(study: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def stop(task: str, done: int, total: int, note: str = "") -> None:
        if task == "table3" and done == 3:
            raise Stop

    whole = study(SMALL, "whole")
    with pytest.raises(Stop):
        study(SMALL, progress=stop)
    assert len((tmp_path / "out" / "draws.jsonl").read_text().splitlines()) == 4  # and the first line
    with open(tmp_path / "out" / "draws.jsonl", "a") as file:
        file.write('{"key": "0123", "sco')  # as a kill leaves it
    with pytest.raises(UsageError, match="not empty"):
        study(SMALL)
    rest = study(SMALL, resume=True)
    assert (rest.computed, rest.pretrainings) == (3, 0)
    assert table_of(rest) == table_of(whole)
    again = study(SMALL, resume=True)
    assert again.computed == 0 and table_of(again) == table_of(whole)
    assert study(SMALL, resume=True, seeds=3).computed == 3
    assert study(SMALL, resume=True, test_limit=9, seeds=1).computed == 3  # other pixels, other results


def test_results_of_another_version_are_not_taken(study: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = replace(SMALL, rows=SMALL.rows[-1:])
    study(one, seeds=1)
    before = sorted(path for path in (tmp_path / "out").rglob("*"))
    monkeypatch.setattr(journal, "__version__", "9.9")
    with pytest.raises(UsageError, match=r"draws\.jsonl was written by fastdiffclip .*, and this is fastdiffclip 9\.9"):
        study(one, seeds=1, resume=True)
    assert sorted(path for path in (tmp_path / "out").rglob("*")) == before


def test_studies_share_pretraining_and_results(study: Run, tmp_path: Path) -> None:
    first = study(SMALL)
    second = study("table4", resume=True, recipe="best")
    assert second.pretrainings == 0  # best reads no encoder
    more = study(replace(STUDIES["table2"], rows=STUDIES["table2"].rows[:1]), resume=True)
    assert (more.computed, more.pretrainings) == (2, 0)
    table3 = study("table3", resume=True)
    assert table3.computed == 2 * 6 - 2 * 2 - 2 - 2  # full, without text; random weights; best is p5 of table4
    assert table3.pretrainings == 2  # without diffusion, without mask
    assert table3.cells[0].summary() == first.cells[0].summary()
    assert len(os.listdir(tmp_path / "out" / "umd")) == 3


def test_results_do_not_depend_on_the_number_of_processes(study: Run) -> None:
    alone = study(SMALL, "one", seeds=1)
    shared = study(SMALL, "two", seeds=1, jobs=2)
    assert shared.computed == 3 and table_of(shared) == table_of(alone)
    for one, two in zip(alone.cells, shared.cells, strict=True):
        assert one.keys == two.keys
        assert [entry["scores"] for entry in one.entries] == [entry["scores"] for entry in two.entries]


def test_a_killed_worker_is_one_sentence(study: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing

    def kill(task: str, done: int, total: int, note: str = "") -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None and task == "table3 umd":
                os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(ResourceError, match="a worker process was killed.*--resume and fewer --jobs"):
        study(SMALL, seeds=1, jobs=2, progress=kill)
    assert multiprocessing.active_children() == []


def test_pretrainings_take_turns(study: Run) -> None:
    result = study(SMALL, seeds=3, umd_seeds=2)
    assert result.pretrainings == 2 and "The draws take turns with 2 pretrainings." in result.notes


def test_windows_of_all_sizes_are_compared_on_the_same_pixels(small_scene: Scene, tmp_path: Path) -> None:
    options = Options(overrides=TINY, seeds=1)
    job, _ = make_job(STUDIES["fig4"], [small_scene], options, tmp_path, "cpu", 2**30)
    assert job.window == 11 and {line.config.model.window for line in job.lines} == {3, 5, 7, 9, 11}
    # The mask ratio does not touch a window's size: the line with the recipe's own value is shared.
    by_label = {job.lines[piece.line].row.label: piece.key for piece in job.pieces}
    same = load_mask_ratio(job)
    assert by_label["window 3"] == by_label[f"mask ratio {same:g}"]


def load_mask_ratio(job: jobs_of.Job) -> float:
    return next(line.config.umd.mask_ratio for line in job.lines if line.row.label == "window 3")


def test_a_prompt_that_needs_descriptions_is_left_out(study: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = jobs_of.class_prompts

    def without_descriptions(scenes: Any, labelled: Any, choice: str | None) -> tuple[str, ...]:
        if choice == "p5":
            raise InputDataError("no description")
        return plain(scenes, labelled, choice)

    monkeypatch.setattr(jobs_of, "class_prompts", without_descriptions)
    result = study("table4", seeds=1)
    assert labels_of(result) == ["p1", "p2", "p3", "p4", "no words"]
    assert "p5 is left out: no description." in result.notes
    assert result.cells[-1].settings["prompts"] == ["1", "2", "4"]
    with pytest.raises(InputDataError, match="no description"):
        study("table3", "other", prompts="p5")


def test_labels_that_do_not_suffice_are_found_first(study: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(runner, "_work", never)
    with pytest.raises(InputDataError, match="too few valid labelled pixels"):
        study("table1", shots=(2, 900))
    with pytest.raises(UsageError, match=r"no row 'linaer' to take differences to \(did you mean 'linear'\?\)"):
        study("table1", "b", reference="linaer")
    with pytest.raises(UsageError, match="needs the label maps"):
        study("table1", "c", split="official")
    with pytest.raises(InputDataError, match="'random' with all shots leaves no test pixel.*--split disjoint"):
        study("table5", "d", split="random", shots=(None,))


def test_rows_can_be_computed_alone(study: Run) -> None:
    some = study("table1", seeds=1, only=("linear", "1nn, pixel"))
    assert labels_of(some) == ["linear", "1nn, pixel"] and some.reference == "linear" and some.pretrainings == 0
    more = study("table1", seeds=1, only=("svm, pixel", "linear"), resume=True, reference="svm, pixel")
    assert more.computed == 1 and labels_of(more) == ["linear", "svm, pixel"]  # of the same splits
    with pytest.raises(UsageError, match=r"no row 'linar' to compute \(did you mean 'linear'\?\)"):
        study("table1", "b", only=("linar",))
    with pytest.raises(UsageError, match="no row 'best' to take differences to"):
        study("table1", "b", only=("linear",), reference="best")


def test_a_damaged_array_is_named(study: Run, tmp_path: Path) -> None:
    result = study("fig5", seeds=1)
    path = tmp_path / "out" / "arrays" / f"{result.cells[0].keys[0]}.npz"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputDataError, match=rf"{path.name} cannot be read"):
        result.arrays(result.cells[0])
    path.unlink()
    assert study("fig5", seeds=1, resume=True).computed == 1


def test_table6_is_about_exams(study: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exams, "EXAMS", {"train": 10, "valid": 10})
    with pytest.raises(UsageError, match="table6 is about exams.*is a landscape.*--preset mrnet"):
        study("table6")
    paths = generated_exams(tmp_path / "runs", 3)
    assert len(paths) == 20 and generated_exams(tmp_path / "runs", 3) == paths
    scenes = [open_scene(path) for path in paths]
    options = Options(seeds=1, shots=(2,), overrides=(*TINY, "model.window=5"))  # the exams' own side counts
    wanted = ("{recipe}", "paper", "svm, window", "1nn, window")
    table6 = replace(STUDIES["table6"], rows=tuple(row for row in STUDIES["table6"].rows if row.label in wanted))
    result = run_study(table6, scenes, options, out=tmp_path / "exams", device="cpu")
    assert result.split == "official" and result.cells[0].settings["model"]["window"] == 3
    columns, rows = table_of(result)
    assert columns[2:6] == ["ACC %", "AUC %", "SE %", "SP %"] and columns[-1] == "AUC - best (± se)"
    aucs = {row[1]: row[3] for row in rows}
    assert aucs["1nn, window"] == "" and float(aucs["svm, window"].split()[0]) > 60
    assert json.loads(json.dumps(summary_of(result), allow_nan=False))["published"] == []
    with pytest.raises(UsageError, match="fig3 needs a landscape.*is an exam"):
        make_job(STUDIES["fig3"], scenes, options, tmp_path, "cpu", 2**30)


def test_number_of_processes() -> None:
    assert count_jobs(3, "cpu") == 3 and count_jobs(0, "cuda:0") == 1
    assert count_jobs(0, "cpu") == len(os.sched_getaffinity(0))
