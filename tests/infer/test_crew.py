"""Several processes on one map: the same bytes as one, whoever dies; who belongs together finds together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdiffclip.errors import UsageError
from fastdiffclip.infer.crew import Claims, Crew
from fastdiffclip.infer.stream import predict
from fastdiffclip.locks import Lock
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.flc import FlcResult

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def crews(small_scene: Scene, flc_run: FlcResult, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``crews.py`` found."""
    folder = tmp_path_factory.mktemp("crews")
    script = Path(__file__).with_name("crews.py")
    done = subprocess.run(
        [sys.executable, str(script), str(small_scene.path), str(flc_run.folder), str(folder)],
        capture_output=True, text=True, timeout=300, check=False, env=ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_three_processes_share_the_tiles_and_make_the_file_of_one(crews: dict[str, Any]) -> None:
    state = crews["three"]
    assert state["status"] == [0, 0, 0]
    assert state["equal"] == ["map.tif", "p.tif"] and state["left"] == []
    tiles = [said["tiles"] for said in state["said"]]
    assert sorted(tile for part in tiles for tile in part) == list(range(12))
    assert all(len(part) >= 2 for part in tiles), tiles
    assert [said["files"] for said in state["said"]] == [2, 0, 0]


def test_a_process_that_dies_leaves_its_block_to_the_first(crews: dict[str, Any]) -> None:
    state = crews["one dies"]
    assert state["status"] == [0, 9, 0] and state["said"][1] is None
    assert state["equal"] == ["map.tif", "p.tif"] and state["left"] == []
    assert sorted(state["said"][0]["tiles"] + state["said"][2]["tiles"]) == list(range(12))


def test_a_process_with_another_model_is_sent_away(crews: dict[str, Any]) -> None:
    state = crews["another model"]
    assert "process 1 was started with another scene, model or part" in state["said"][1]
    assert state["equal"] == ["map.tif", "p.tif"] and state["left"] == []


def test_the_others_hear_that_the_first_gave_up(crews: dict[str, Any]) -> None:
    first, second = crews["leader fails"]["said"]
    assert first.startswith("cannot write") and second.startswith("the first process gave up: ")


def test_torchrun_and_the_command_make_the_same_map(small_scene: Scene, flc_run: FlcResult, tmp_path: Path) -> None:
    command = f"-m fastdiffclip predict {small_scene.path} --model {flc_run.folder} --device cpu".split()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    together = [sys.executable, *torchrun, *command, "--out", "two.tif", "--json"]
    done = subprocess.run(
        together, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, env=ONE_THREAD
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"areas"') == 1, "both processes reported"
    predict(small_scene, str(flc_run.folder), tmp_path / "one.tif", device="cpu")
    assert (tmp_path / "one.tif").read_bytes() == (tmp_path / "two.tif").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["one.tif", "one.tif.aux.xml", "two.tif", "two.tif.aux.xml"]


def test_ranks_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Crew.of_environment() == Crew(0, 1, 0)
    assert Crew().agree("anything", {"a": 1}) == {"a": 1}
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UsageError, match="RANK is 1 and WORLD_SIZE 1"):
        Crew.of_environment()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Crew.of_environment() == Crew(1, 4, 0)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UsageError, match="must be numbers"):
        Crew.of_environment()


def test_each_process_gets_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew(3, 4, 3)
    assert crew.device("auto") == "auto" and crew.device("cpu") == "cpu"  # no GPU here
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert crew.device("auto") == crew.device("cuda") == "cuda:1"
    assert crew.device("cuda:0") == "cuda:0" and Crew().device("auto") == "auto"


def test_a_block_is_taken_once_and_falls_to_the_leader_when_its_owner_is_gone(tmp_path: Path) -> None:
    leader, helper = Claims(tmp_path, Crew(0, 2)), Claims(tmp_path, Crew(1, 2))
    leader.clear()
    alive = Lock(tmp_path / "rank-1.lock")
    assert alive.acquire()
    assert helper.take(5) and not leader.take(5) and leader.take(6) and not helper.take(6)
    assert leader.is_abandoned(7) and leader.is_abandoned(6) and not leader.is_abandoned(5)
    alive.release()
    assert leader.is_abandoned(5)
    leader.clear()
    assert leader.take(5)
