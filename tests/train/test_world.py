"""Several processes, and DeepSpeed, train the same run as one: real processes, real messages."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiffclip.config import Config
from fastdiffclip.errors import UsageError
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.model.logistic_classifier import LogisticClassifier
from fastdiffclip.scene.labelled import labelled_pixels
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.engine import choose_engine
from fastdiffclip.train.flc import Shots, class_prompts, train_flc
from fastdiffclip.train.umd import load_umd
from fastdiffclip.train.world import World

HERE = Path(__file__).parent
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the package deepspeed is not installed"
)


def launch(scene: Scene, out: Path, processes: int, *engines: str) -> dict[str, dict[str, list[float]]]:
    """Losses by engine, of workers that ``torchrun`` started; alone without it."""
    worker = [str(HERE / "worker.py"), str(scene.path), str(out / "losses.json"), *engines]
    command = [sys.executable, *worker]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += worker
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, list[float]]] = json.loads((out / "losses.json").read_text())
    return found


@pytest.fixture(scope="module")
def alone(small_scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of one process."""
    return launch(small_scene, tmp_path_factory.mktemp("alone"), 1, "single+bands")["single+bands"]


def assert_same_run(found: dict[str, list[float]], alone: dict[str, list[float]]) -> None:
    for stage, count in (("umd", 51), ("flc", 50)):
        ours, theirs = found[stage], alone[stage]
        assert len(ours) == len(theirs) == count and theirs[-1] < theirs[0]
        assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
        assert ours == pytest.approx(theirs, rel=1e-4)
    if "bands" in found:  # the noise of a step is larger than what 50 steps learn: nothing says that the loss falls
        ours, theirs = found["bands"], alone["bands"]
        assert len(ours) == len(theirs) == 50 and np.isfinite(ours).all()
        # Sums in another order: 2e-7 was measured, the rest is room for another machine's.
        assert ours[0] == pytest.approx(theirs[0], rel=1e-6) and ours == pytest.approx(theirs, rel=1e-5)


def assert_predicts(scene: Scene, folder: Path) -> None:
    """The run's folder is what one process would have left, and loads as such."""
    classifier = Classifier.load(folder / "flc", "cpu")
    windows = [torch.randn(3, 9, count).numpy() for count in classifier.front_end.channels.values()]
    assert classifier.probabilities(windows).shape == (3, 3)
    assert not (folder / "flc" / "checkpoints").exists()


def assert_restores(scene: Scene, folder: Path) -> None:
    """The network over bands is whole, and a classifier looks through it."""
    umd = load_umd(folder / "bands")
    labelled = labelled_pixels([scene])
    split = labelled.split("disjoint", 2, 0, 3)
    shots = Shots(split.train, split.train_labels, labelled.classes, class_prompts([scene], labelled, "p4"))
    result = train_flc([scene], shots, umd.config, umd=umd, device="cpu")
    assert isinstance(result.model, LogisticClassifier) and result.model.restorer is not None
    assert all(torch.isfinite(part).all() for part in result.model.restorer.state_dict().values())
    assert not (folder / "bands" / "checkpoints").exists()


@pytest.mark.parametrize("processes", [2, 4])
def test_data_parallel_processes_train_the_same_run(
    small_scene: Scene, tmp_path: Path, alone: dict[str, list[float]], processes: int
) -> None:
    """In the short last batches some processes have padding alone."""
    engine = "ddp+bands" if processes == 2 else "ddp"
    found = launch(small_scene, tmp_path, processes, engine)[engine]
    assert_same_run(found, alone)
    assert_predicts(small_scene, tmp_path / "run0")
    if "bands" in found:
        assert_restores(small_scene, tmp_path / "run0")


@needs_deepspeed
@pytest.mark.parametrize(("processes", "stages"), [(1, (0, 1, 2, 3)), (2, (0, 1, 2))])
def test_deepspeed_trains_the_same_run(
    small_scene: Scene, tmp_path: Path, alone: dict[str, list[float]], processes: int, stages: tuple[int, ...]
) -> None:
    """Stage 3 in one process: with two it aborts now and then as it ends, after its work is done."""
    engines = [f"deepspeed:{stage}{'+bands' if (processes, stage) == (2, 1) else ''}" for stage in stages]
    found = launch(small_scene, tmp_path, processes, *engines)
    for place, engine in enumerate(engines):
        assert_same_run(found[engine], alone)
        assert_predicts(small_scene, tmp_path / f"run{place}")
        if "bands" in engine:
            assert_restores(small_scene, tmp_path / f"run{place}")


@needs_deepspeed
def test_a_run_goes_on_with_other_processes_and_another_engine(
    small_scene: Scene, tmp_path: Path, alone: dict[str, list[float]]
) -> None:
    """Stopped by a signal to one process of two, then one alone, with and without DeepSpeed, then four, then two."""
    assert launch(small_scene, tmp_path, 2, "ddp@umd:7") == {"ddp": {}}
    found = launch(small_scene, tmp_path, 1, "single@umd:12", "deepspeed:2@umd:20", "deepspeed:3@flc:9")
    assert found == {"single": {}, "deepspeed:2": {}, "deepspeed:3": {}}
    assert launch(small_scene, tmp_path, 4, "ddp@flc:22") == {"ddp": {}}
    assert_same_run(launch(small_scene, tmp_path, 2, "deepspeed:1")["deepspeed:1"], alone)
    assert_predicts(small_scene, tmp_path / "run0")


@pytest.mark.parametrize(
    ("rank", "size"), [("0", ""), ("", "2"), ("2", "2"), ("-1", "2"), ("0", "0"), ("first", "2"), ("0", "1.5")]
)
def test_an_environment_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch, rank: str, size: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UsageError, match="do not go together; start several processes with torchrun or deepspeed"):
        World.from_environment()


def test_without_an_environment_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    world, value = World.from_environment(), torch.ones(2)
    assert world == World(0, 1) and world.main
    assert world.sum(value) is value and world.stack(value).shape == (1, 2) and world.text_of_main("a") == "a"
    assert world.share(7) == (0, 7)


@pytest.mark.parametrize(("batch", "size"), [(7, 2), (8, 4), (3, 4), (1, 1)])
def test_shares_cover_the_batch_once(batch: int, size: int) -> None:
    shares = [World(rank, size).share(batch) for rank in range(size)]
    rows = [row for first, count in shares for row in range(first, first + count) if row < batch]
    assert rows == list(range(batch)) and len({count for _, count in shares}) == 1


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"zero": 2}, 1, "--zero 2 is a stage of DeepSpeed; add --engine deepspeed"),
        ({"engine": "single"}, 2, "is for one process, and there are 2; use ddp or deepspeed"),
    ],
)
def test_engines_that_do_not_fit(changes: dict[str, object], size: int, message: str) -> None:
    model = torch.nn.Linear(2, 1)
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(UsageError, match=message):
        choose_engine(model, adam, 0.0, Config().model_copy(update=changes), World(0, size))
