"""The journal of a long job: what was finished is read back, what a kill cut short is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastdiffclip.errors import UsageError
from fastdiffclip.evaluate.contest import Predicted
from fastdiffclip.evaluate.journal import Journal


def test_entries_come_back(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    journal = Journal(path, "one")
    assert journal.entries == {} and path.is_file()
    journal.add("a", {"value": 1})
    journal.add("b", {"value": [2, None]})
    assert Journal(path, "one").entries == journal.entries == {"a": {"value": 1}, "b": {"value": [2, None]}}


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.jsonl"
    journal = Journal(path, "one")
    journal.add("a", {"value": 1})
    journal.add("b", {"value": 2})
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path, "one")
    assert set(again.entries) == ({"a", "b"} if cut == 1 else {"a"})
    again.add("c", {"value": 3})
    assert Journal(path, "one").entries["c"] == {"value": 3}


def test_another_identity_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "x.jsonl", "one").add("a", {})
    with pytest.raises(UsageError, match=r"x\.jsonl was made with other settings"):
        Journal(tmp_path / "x.jsonl", "two")


def test_without_a_file_entries_are_in_memory() -> None:
    journal = Journal(None, "one")
    journal.add("a", {"value": 1})
    assert journal.entries == {"a": {"value": 1}}


@pytest.mark.parametrize("ranking", [None, np.array([0.5, -1.25])])
@pytest.mark.parametrize("confidence", [None, np.array([0.9, 0.4321])])
def test_predictions_as_entries(ranking: np.ndarray | None, confidence: np.ndarray | None) -> None:
    found = Predicted.from_entry(Predicted(np.array([3, 1]), ranking, confidence).to_entry())
    assert found.values.tolist() == [3, 1] and found.values.dtype == np.int64
    for mine, theirs in ((found.ranking, ranking), (found.confidence, confidence)):
        assert (mine is None) == (theirs is None) and (theirs is None or np.array_equal(mine, theirs))
