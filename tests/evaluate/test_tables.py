"""One table in three forms."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from fastdiffclip.errors import ResourceError
from fastdiffclip.evaluate.tables import markdown, write_tables

COLUMNS = ["method", "2 shots"]
ROWS = [["fastdiffclip", "71.2 ± 3.0"], ["svm, window", "60.0 ± 4.1"]]


def test_markdown() -> None:
    text = markdown("OSBS, disjoint split", COLUMNS, ROWS, ["10 seeds", "UMD saw all pixels"])
    assert text == (
        "**OSBS, disjoint split**\n\n| method | 2 shots |\n| --- | --- |\n| fastdiffclip | 71.2 ± 3.0 |\n"
        "| svm, window | 60.0 ± 4.1 |\n\n10 seeds  \nUMD saw all pixels  \n"
    )
    assert markdown("t", COLUMNS, []).endswith("| --- | --- |\n\n")


def test_three_files(tmp_path: Path) -> None:
    summary = {"rows": [{"oa_mean": 71.2, "oa_sd": None}], "notes": ["10 seeds"], "scene": "Fläche"}
    paths = write_tables(tmp_path / "out", "title", COLUMNS, ROWS, summary)
    assert [path.name for path in paths] == ["table.md", "table.csv", "results.json"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(path.name for path in paths)
    assert paths[0].read_text(encoding="utf-8") == markdown("title", COLUMNS, ROWS, ["10 seeds"])
    with open(paths[1], newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [COLUMNS, *ROWS]
    assert json.loads(paths[2].read_text(encoding="utf-8")) == summary


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError):
        write_tables(tmp_path / "file", "title", COLUMNS, ROWS, {})
