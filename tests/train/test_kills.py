"""Runs that are killed at random moments; two hundred kills by hand: see docs/reliability.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiffclip.errors import UsageError
from fastdiffclip.files import held_folder
from fastdiffclip.scene.store import Scene

HERE = Path(__file__).parent


def test_ten_kills_change_nothing(small_scene: Scene, tmp_path: Path) -> None:
    """Half of them in float32, half in bfloat16; the script compares weights byte by byte."""
    command = [sys.executable, str(HERE / "kills.py"), str(small_scene.path), str(tmp_path / "runs"), "10", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [entry["kills"] for entry in found.values()] == [5, 5]
    # The moments are drawn: some have to have met a run that had something to lose.
    places = [place for entry in found.values() for place in entry["killed_at"]]
    assert any(place.split()[-1].isdigit() or "finished" in place for place in places), places


def test_one_process_at_a_time_in_a_folder(tmp_path: Path) -> None:
    with held_folder(tmp_path / "run", False) as folder:
        other = held_folder(folder, False)
        with pytest.raises(UsageError, match=r"another process works in .*run; wait for it, or give another --out"):
            other.__enter__()
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert list(folder.iterdir()) == []


def test_the_hold_of_a_dead_process_is_none(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom fastdiffclip.files import held_folder\n"
        "hold = held_folder(Path(sys.argv[1]), False)\nhold.__enter__()\nos._exit(1)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], check=False, timeout=60)
    (tmp_path / "run" / ".model.safetensors.1.tmp").write_bytes(b"half")
    assert (tmp_path / "run" / ".lock").exists()
    with held_folder(tmp_path / "run", True) as folder:
        assert [path.name for path in folder.iterdir()] == [".lock"]  # what it left half-written is gone
