"""A prediction that is killed, at any moment, goes on to the same bytes; what it left misleads nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdiffclip.errors import UsageError
from fastdiffclip.infer import unfinished
from fastdiffclip.infer.rawfile import Layer, RawFile
from fastdiffclip.infer.tiles import Rect
from fastdiffclip.infer.unfinished import Unfinished
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.flc import FlcResult

LAYERS = [Layer("classes", 1, "uint8"), Layer("probabilities", 3, "float32")]
AREA = Rect(2, 10, 3, 15)


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    small_scene: Scene, flc_run: FlcResult, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("killing.py")
    done = subprocess.run(
        [sys.executable, str(script), str(small_scene.path), str(flc_run.folder), str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 11
    for moment, state in found.items():
        assert state["killed"], moment
        assert state["half there"] == [], moment
        assert state["resumed"] == 0, moment
        assert state["other bytes"] == [], moment
        assert state["left"] == [], moment
    known = {moment: state["tiles"][0] for moment, state in found.items()}
    total = found["first tile"]["tiles"][1]
    assert known["folder is made, nothing said"] == known["first tile"] == known["folder half removed"] == 0
    assert known["tile written, not entered"] == 3 and known["tiles entered"] == 6
    assert 0 < known["half a line of the journal"] < 6
    for moment in ("raw files are complete", "probabilities half written", "map renamed, names not", "all renamed"):
        assert known[moment] == total


def tile_values(tile: Rect, number: int) -> dict[str, np.ndarray]:
    shape = tile.height, tile.width
    return {
        "classes": np.full((1, *shape), number, np.uint8),
        "probabilities": np.arange(3 * tile.pixels, dtype=np.float32).reshape(3, *shape) + number,
    }


def begun(out: Path, tiles: dict[int, Rect], run: dict[str, Any] | None = None) -> None:
    """Leave an unfinished prediction with these tiles."""
    lock, _ = unfinished.start(out, run or {"model": "a"}, False)
    with Unfinished(out, LAYERS, AREA, 0) as state:
        for number, tile in tiles.items():
            state.commit({number: state.write(tile, tile_values(tile, number))})
    lock.release()


TILES = {0: Rect(0, 4, 0, 8), 1: Rect(0, 4, 8, 16), 2: Rect(4, 10, 0, 20), 3: Rect(4, 12, 3, 15)}


def known(out: Path, run: dict[str, Any] | None = None) -> set[int]:
    """The tiles that a resumed run takes up."""
    lock, resumed = unfinished.start(out, run or {"model": "a"}, True)
    try:
        with Unfinished(out, LAYERS, AREA, 0) as state:
            if resumed:
                state.verify(TILES)
            return set(state.done)
    finally:
        lock.release()


def test_tiles_are_cut_to_the_area_and_come_back(tmp_path: Path) -> None:
    out = tmp_path / "map.tif"
    begun(out, TILES)
    with RawFile(out.with_name(".map.tif.partial"), LAYERS[1], AREA.height, AREA.width) as raw:
        for number in (1, 3):  # not overwritten by a later one
            inside = TILES[number].within(AREA)
            expected = tile_values(TILES[number], number)["probabilities"][:, *inside.relative_to(TILES[number]).slices]
            np.testing.assert_array_equal(raw.read(inside.relative_to(AREA)), expected)
    assert known(out) == {0, 1, 3}  # tile 2 was overwritten by tile 3


def test_a_tile_whose_bytes_changed_is_done_again(tmp_path: Path) -> None:
    out = tmp_path / "map.tif"
    begun(out, {0: TILES[0], 1: TILES[1], 3: TILES[3]})
    path = tmp_path / ".map.tif.partial" / "classes.raw"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))
    assert known(out) == {1, 3}
    path.write_bytes(bytes(data)[: len(data) // 2])
    assert known(out) == {1}
    assert known(out) == {1}


@pytest.mark.parametrize("damage", [b"0 12 13 99\n", b"1 2\n", b"x y z\n", b"\n", b"\xff\x00\n", b"3 1 2"])
def test_lines_of_a_journal_that_are_not_whole_are_passed_over(tmp_path: Path, damage: bytes) -> None:
    out = tmp_path / "map.tif"
    begun(out, {1: TILES[1]})
    journal = tmp_path / ".map.tif.partial" / "journal-0"
    journal.write_bytes(damage + (b"\n" if not damage.endswith(b"\n") else b"") + journal.read_bytes() + damage)
    assert known(out) == {1}


def test_journals_of_several_processes_become_one(tmp_path: Path) -> None:
    out = tmp_path / "map.tif"
    begun(out, {1: TILES[1]})
    with Unfinished(out, LAYERS, AREA, 5) as other:
        other.commit({3: other.write(TILES[3], tile_values(TILES[3], 3))})
    assert known(out) == {1, 3}
    assert [path.name for path in (tmp_path / ".map.tif.partial").glob("journal-*")] == ["journal-0"]
    assert known(out) == {1, 3}


def test_another_prediction_is_not_resumed_but_may_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "map.tif"
    begun(out, {1: TILES[1]}, {"model": "a", "scene": "b"})
    with pytest.raises(UsageError, match="started with another model; resume with the same, or leave out --resume"):
        known(out, {"model": "c", "scene": "b"})
    assert known(out, {"model": "a", "scene": "b"}) == {1}
    begun(out, {}, {"model": "c"})
    assert known(out, {"model": "c"}) == set()


def test_resume_with_nothing_there_starts_fresh(tmp_path: Path) -> None:
    assert known(tmp_path / "map.tif") == set()
    (tmp_path / ".map.tif.partial" / "run.json").write_text("{")
    assert known(tmp_path / "map.tif") == set()


def test_the_folder_of_a_run_at_work_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "map.tif"
    lock, _ = unfinished.start(out, {"model": "a"}, False)
    for resume in (True, False):
        with pytest.raises(UsageError, match="another process is predicting into .*map.tif"):
            unfinished.start(out, {"model": "a"}, resume)
    lock.release()
    unfinished.start(out, {"model": "a"}, False)[0].release()
    unfinished.discard(out)
    assert os.listdir(tmp_path) == []
    unfinished.discard(out)
