"""The studies as data: they fit together, and their settings exist."""

from __future__ import annotations

import pytest

from fastdiffclip.config import load_config
from fastdiffclip.errors import UsageError
from fastdiffclip.evaluate.contest import BASELINES, OURS
from fastdiffclip.study.catalogue import FIGURES, STUDIES, find_study
from fastdiffclip.study.features import FEWEST


def test_all_of_the_paper_is_there() -> None:
    assert sorted(STUDIES) == ["fig3", "fig4", "fig5", *(f"table{number}" for number in range(1, 7))]
    assert STUDIES["table1"].shots == (2, 8, 20) and STUDIES["table5"].shots == (40, None)
    assert [row.prompts for row in STUDIES["table4"].rows] == ["p1", "p2", "p3", "p4", "p5", "none"]
    assert STUDIES["table6"].figures[:4] == ("acc", "auc", "se", "sp") and STUDIES["table6"].exams
    assert FEWEST > 1


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("recipe", ["best", "paper"])
def test_rows_fit_together(name: str, recipe: str) -> None:
    study = STUDIES[name]
    labels = [row.label for row in study.rows]
    assert len(set(labels)) == len(labels) and study.reference in ("", *labels)
    assert {study.judged_by, *study.figures} <= set(FIGURES) and study.seeds >= 1
    panels = dict(study.axes)
    for row in study.rows:
        assert row.method in (OURS, *BASELINES) and row.features in ("pixel", "window")
        assert (row.panel in panels) == (row.value is not None) == bool(panels)
        load_config(row.recipe or recipe, None, row.settings)


def test_an_unknown_study_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no study 'tabel1' \(did you mean 'table1'\?\); there is: table1, table2"):
        find_study("tabel1")
