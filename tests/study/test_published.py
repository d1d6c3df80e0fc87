"""The paper's figures: each has a source, and stands only beside a data set of the paper's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import yaml

from fastdiffclip.files import config_text
from fastdiffclip.model.prompts import PRESETS, load_preset
from fastdiffclip.scene.store import ClassInfo, Scene
from fastdiffclip.study import output
from fastdiffclip.study.catalogue import FIGURES, STUDIES
from fastdiffclip.study.output import notes_of, table_of
from fastdiffclip.study.published import MRNET, dataset_of, published_rows
from fastdiffclip.study.runner import StudyResult


def test_every_row_says_where_it_was_read() -> None:
    rows = yaml.safe_load(config_text("study/published.yaml"))["rows"]
    assert rows
    for row in rows:
        assert row["source"] and row["study"] in STUDIES and set(row["figures"]) <= set(FIGURES)
        assert set(row["data"]) <= {*PRESETS, MRNET}
        assert row.get("shots", "all") == "all" or row["shots"] in STUDIES[row["study"]].shots


@pytest.mark.parametrize("name", PRESETS)
def test_a_data_set_of_the_paper_is_known_by_its_classes(small_scene: Scene, name: str) -> None:
    classes = [ClassInfo(c.value, c.name.upper(), "") for c in load_preset(name).classes]
    assert dataset_of([small_scene], classes) == name
    assert dataset_of([small_scene], classes[:3]) == name  # --classes keeps some
    (row,) = published_rows("table1", name)
    assert row.shots == 2 and row.figures == {"oa": 10.65} and row.minus == "clip"


def test_the_papers_claim_stands_beside_ours(
    study: Callable[..., StudyResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "dataset_of", lambda scenes, classes: "trento")
    result = study("table1", only=("best", "paper", "clip"), shots=(2, 3))
    columns, rows = table_of(result)
    assert rows[3][:3] == ["2", "DiffCLIP - CLIP, mean of the paper's three scenes (published)", "+10.65"]
    assert [row[1] for row in rows[4:]] == ["best", "paper", "clip"] and {len(row) for row in rows} == {len(columns)}
    first, second, third = (cell.scores for cell in result.cells[:3])
    gaps = [
        np.mean([a.oa - b.oa for a, b in zip(ours, third, strict=True)]) for ours in (first, second)
    ]  # fmt: skip
    note = next(note for note in notes_of(result) if note.startswith("Published: abstract"))
    assert f"best - clip: OA {gaps[0]:+.1f} ±" in note and f"paper - clip: OA {gaps[1]:+.1f} ±" in note
    without = study("table1", "other", only=("best",), shots=(2,))
    assert not any("Here" in note for note in notes_of(without))


def test_other_scenes_have_no_published_rows(small_scene: Scene) -> None:
    assert dataset_of([small_scene], small_scene.classes) is None
    assert published_rows("table1", None) == [] and published_rows("fig5", "trento") == []
