"""The journal of a long job: what was finished is read back, what a kill cut short is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastdiffclip import __version__
from fastdiffclip.errors import UsageError
from fastdiffclip.evaluate import journal
from fastdiffclip.evaluate.contest import Predicted
from fastdiffclip.evaluate.journal import Journal


def test_entries_come_back(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    kept = Journal(path, "one", 1)
    assert kept.entries == {} and path.is_file()
    kept.add("a", {"value": 1})
    kept.add("b", {"value": [2, None]})
    assert Journal(path, "one", 1).entries == kept.entries == {"a": {"value": 1}, "b": {"value": [2, None]}}


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.jsonl"
    kept = Journal(path, "one", 1)
    kept.add("a", {"value": 1})
    kept.add("b", {"value": 2})
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path, "one", 1)
    assert set(again.entries) == ({"a", "b"} if cut == 1 else {"a"})
    again.add("c", {"value": 3})
    assert Journal(path, "one", 1).entries["c"] == {"value": 3}


def test_another_identity_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "x.jsonl", "one", 1).add("a", {})
    with pytest.raises(UsageError, match=r"x\.jsonl was made with other settings"):
        Journal(tmp_path / "x.jsonl", "two", 1)


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    Journal(path, "one", 1).add("a", {"value": 1})
    before = path.read_bytes()
    with pytest.raises(UsageError, match=rf"was written by fastdiffclip {__version__} \(format 1\), .*\(format 2\)"):
        Journal(path, "one", 2)
    monkeypatch.setattr(journal, "__version__", "9.9")
    with pytest.raises(UsageError, match=r"and this is fastdiffclip 9\.9 .*, or give another --out"):
        Journal(path, "one", 1)
    assert path.read_bytes() == before


def test_a_journal_that_does_not_say_who_wrote_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"fingerprint": "one"}\n{"key": "a", "value": 1}\n')
    with pytest.raises(UsageError, match=r"x\.jsonl was written by an earlier state of fastdiffclip, and this is"):
        Journal(path, "one", 1)


def test_without_a_file_entries_are_in_memory() -> None:
    kept = Journal(None, "one", 1)
    kept.add("a", {"value": 1})
    assert kept.entries == {"a": {"value": 1}}


@pytest.mark.parametrize("ranking", [None, np.array([0.5, -1.25])])
@pytest.mark.parametrize("confidence", [None, np.array([0.9, 0.4321])])
def test_predictions_as_entries(ranking: np.ndarray | None, confidence: np.ndarray | None) -> None:
    found = Predicted.from_entry(Predicted(np.array([3, 1]), ranking, confidence).to_entry())
    assert found.values.tolist() == [3, 1] and found.values.dtype == np.int64
    for mine, theirs in ((found.ranking, ranking), (found.confidence, confidence)):
        assert (mine is None) == (theirs is None) and (theirs is None or np.array_equal(mine, theirs))
