"""Training commands as users start several of them, and the options that go with it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdiffclip import checkpoint

from .console import Result, encoded, tiny


def torchrun(arguments: list[str], folder: Path, processes: int = 2) -> Result:
    """Several processes of the command, as ``torchrun`` starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    done = subprocess.run(
        [*command, "fastdiffclip", *arguments], cwd=folder, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


def test_two_processes_leave_one_run_and_speak_with_one_voice(ingested: Path, tmp_path: Path) -> None:
    scene = str(ingested / "scene.zarr")
    done = torchrun(["train-flc", scene, "--shots", "2", *encoded(), "--json"], tmp_path)
    assert done.code == 0, done.err
    assert len([line for line in done.out.splitlines() if line.startswith("OA ")]) == 1
    assert done.json["held_out"]["oa"] >= 0
    runs = sorted(path.name.split("-")[0] for path in (tmp_path / "runs").glob("*/*") if path.is_dir())
    assert runs == ["flc", "umd"]


def test_the_same_bytes_every_time(ingested: Path, tmp_path: Path, real: Callable[..., Result]) -> None:
    scene, weights = str(ingested / "scene.zarr"), []
    for name in ("a", "b"):
        done = real(["train-umd", scene, "--deterministic", "--out", name, *tiny()], tmp_path)
        assert done.code == 0, done.err
        weights.append((tmp_path / name / checkpoint.MODEL).read_bytes())
    assert weights[0] == weights[1]


def test_events_of_tensorboard(ingested: Path, tmp_path: Path, call: Callable[..., Result]) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    done = call(["train-umd", ingested / "scene.zarr", "--tensorboard", "--out", "run", *tiny()], tmp_path)
    assert done.code == 0, done.err
    events = accumulators.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    logged = (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]
    assert losses == pytest.approx([float(line.split(",")[2]) for line in logged], rel=1e-6)
    assert [event.step for event in events.Scalars("learning_rate")] == list(range(len(losses)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "horovod"], ["engine", "horovod"]),
        (["--zero", "4"], ["zero", "4"]),
        (["--zero", "1"], ["--zero 1 is a stage of DeepSpeed", "--engine deepspeed"]),
    ],
)
def test_wrong_engines(
    ingested: Path, tmp_path: Path, call: Callable[..., Result], options: list[str], words: list[str]
) -> None:
    done = call(["train-umd", ingested / "scene.zarr", *options, *tiny()], tmp_path)
    done.one_sentence(2, *words)
    assert not (tmp_path / "runs").exists()


def test_first_step_is_reported(ingested: Path, tmp_path: Path, real: Callable[..., Result]) -> None:
    done = real(["train-umd", str(ingested / "scene.zarr"), "--out", "run", *tiny(), "--json"], tmp_path)
    seconds = checkpoint.read_json(tmp_path / "run" / checkpoint.METRICS)["seconds_to_first_step"]
    assert 0.1 < seconds == done.json["seconds_to_first_step"]
    assert f"First step {seconds:.1f} s after the start of the command" in done.out
