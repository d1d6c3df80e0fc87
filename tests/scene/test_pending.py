"""Folders that appear whole or not at all, and what a killed process leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fastdiffclip.errors import UsageError
from fastdiffclip.scene.ingest import IngestRequest, ingest
from fastdiffclip.scene.pending import is_scene, pending_folder, remove_leftovers
from fastdiffclip.scene.store import open_scene

WRITING = """
import sys, time
from pathlib import Path
from fastdiffclip.scene.pending import pending_folder
with pending_folder(Path(sys.argv[1]), True, lambda old: True) as folder:
    (folder / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(600)
"""


@contextmanager
def writing(target: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is in the middle of writing ``target``."""
    child = subprocess.Popen([sys.executable, "-c", WRITING, str(target)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()


def scene(tmp_path: Path, value: int, **options: object) -> Path:
    np.save(tmp_path / "hsi.npy", np.full((3, 4, 2), value, np.uint16))
    request = IngestRequest([("hsi", f"{tmp_path}/hsi.npy")], tmp_path / "x.zarr", **options)  # type: ignore[arg-type]
    return ingest(request).scenes[0]


def test_what_a_killed_ingest_leaves_is_removed_by_the_next_one(tmp_path: Path) -> None:
    with writing(tmp_path / "x.zarr") as child:
        kill(child)
    (left,) = names(tmp_path)
    assert left.startswith(".x.zarr.") and left.endswith(".partial")
    scene(tmp_path, 7)
    assert names(tmp_path) == ["hsi.npy", "x.zarr"]


def test_what_a_running_process_writes_stays(tmp_path: Path) -> None:
    with writing(tmp_path / "x.zarr") as child:
        (live,) = names(tmp_path)
        scene(tmp_path, 7)
        assert names(tmp_path) == [live, "hsi.npy", "x.zarr"] and (tmp_path / live / "half").exists()
        kill(child)
        remove_leftovers(tmp_path / "x.zarr")
        assert names(tmp_path) == ["hsi.npy", "x.zarr"]


def test_other_targets_and_other_names_are_left_alone(tmp_path: Path) -> None:
    with writing(tmp_path / "y.zarr") as child:
        kill(child)
    (tmp_path / ".x.zarr.notes.partial").mkdir()
    (tmp_path / ".x.zarr.01234567.partial.bak").mkdir()
    (tmp_path / ".x.zarr.extra.01234567.partial").mkdir()
    before = names(tmp_path)
    remove_leftovers(tmp_path / "x.zarr")
    assert names(tmp_path) == before and len(before) == 4


def test_a_scene_that_was_about_to_be_replaced_comes_back(tmp_path: Path) -> None:
    scene(tmp_path, 7)
    (tmp_path / "x.zarr").rename(tmp_path / ".x.zarr.01234567.old")  # killed between the two renames
    (tmp_path / ".x.zarr.01234567.partial").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        scene(tmp_path, 8)
    assert int(open_scene(tmp_path / "x.zarr").read("hsi")[0, 0, 0]) == 7
    assert names(tmp_path) == ["hsi.npy", "x.zarr"]
    (tmp_path / ".x.zarr.01234567.old").mkdir()  # killed after them
    scene(tmp_path, 8, overwrite=True)
    assert int(open_scene(tmp_path / "x.zarr").read("hsi")[0, 0, 0]) == 8
    assert names(tmp_path) == ["hsi.npy", "x.zarr"]


def test_folders_made_for_nothing_go_again(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "x.zarr"
    with pytest.raises(KeyboardInterrupt), pending_folder(target, False, is_scene) as folder:
        assert folder.is_dir() and folder.parent == target.parent
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    with pending_folder(target, False, is_scene) as folder:
        (folder / "whole").write_text("x")
    assert names(target) == ["whole"]


def test_a_killed_ingest_of_a_large_file_can_be_started_again(tmp_path: Path) -> None:
    np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.uint16, (800, 500, 100))[::50] = 3
    code = (
        "import sys\nfrom fastdiffclip.scene.ingest import IngestRequest, ingest\n"
        "ingest(IngestRequest([('hsi', sys.argv[1])], sys.argv[2]), lambda share, text: print(share, flush=True))"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "large.npy"), str(tmp_path / "deep" / "x.zarr")]
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert child.stdout is not None
    while float(child.stdout.readline()) < 0.1:
        time.sleep(0)
    kill(child)
    child.stdout.close()
    (left,) = names(tmp_path / "deep")
    assert any((tmp_path / "deep" / left).rglob("c/*/*/*"))
    request = IngestRequest([("hsi", str(tmp_path / "large.npy"))], tmp_path / "deep" / "x.zarr")
    assert open_scene(ingest(request).scenes[0]).height == 800
    assert names(tmp_path / "deep") == ["x.zarr"]
