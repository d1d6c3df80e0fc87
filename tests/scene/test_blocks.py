"""Rows read in chunk order: the right ones, each chunk once, and nothing kept that nobody can ask for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.scene.blocks import RowReader

from .strategies import MemoryScene, random_scene


def reader(scene: MemoryScene, cols: slice = slice(None)) -> RowReader:
    found: Any = scene
    return RowReader(found, "hsi", cols)


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 40), chunk=st.integers(1, 9), seed=st.integers(0, 999), disjoint=st.booleans(),
    left=st.integers(0, 4), width=st.integers(1, 3),
)  # fmt: skip
def test_any_rows_that_do_not_move_backwards(
    height: int, chunk: int, seed: int, disjoint: bool, left: int, width: int
) -> None:
    rng = np.random.default_rng(seed)
    scene = random_scene(rng, height, 7, {"hsi": 2}, chunk=chunk)
    cols = slice(left, left + width)
    rows, start = reader(scene, cols), 0
    while start < height:
        stop = int(rng.integers(start + 1, height + 1))
        raw, valid = rows.rows(start, stop, stop if disjoint else None)
        np.testing.assert_array_equal(raw, scene._arrays["hsi"][start:stop, cols])
        np.testing.assert_array_equal(valid, scene._valid["hsi"][start:stop, cols])
        start = int(rng.integers(stop, height + 1)) if disjoint else int(rng.integers(start, stop + 1)) + 1
    assert set(scene.reads.values()) == {1}


def test_what_was_passed_cannot_be_asked_for_again() -> None:
    scene = random_scene(np.random.default_rng(0), 20, 3, {"hsi": 1}, chunk=4)
    rows = reader(scene)
    rows.rows(5, 9)
    rows.rows(5, 6)
    with pytest.raises(ValueError, match="rows 4 to 9 were already passed"):
        rows.rows(4, 9)
    rows.rows(6, 12, 12)
    with pytest.raises(ValueError, match="already passed: the buffer starts at 12"):
        rows.rows(11, 13)


def test_only_what_can_be_asked_for_is_kept() -> None:
    scene = random_scene(np.random.default_rng(0), 100, 3, {"hsi": 1}, chunk=10)
    rows = reader(scene)
    rows.rows(0, 95, 95)
    assert [(first, len(part)) for first, part in rows._raw._kept] == [(90, 10)]
    other = reader(scene)
    other.rows(0, 35)
    assert [first for first, _ in other._raw._kept] == [0, 10, 20, 30]
    other.rows(21, 22)
    assert [first for first, _ in other._raw._kept] == [20, 30]
    other.rows(29, 42)
    assert [first for first, _ in other._raw._kept] == [20, 30, 40]


def test_chunks_that_nobody_wants_are_skipped() -> None:
    scene = random_scene(np.random.default_rng(0), 100, 3, {"hsi": 1}, chunk=10)
    rows = reader(scene)
    rows.rows(3, 5)
    rows.rows(77, 81)
    assert sorted(scene.reads) == [("hsi", 0), ("hsi", 7), ("hsi", 8)]
