"""A run that is stopped and resumed is the run that was not: every tensor, every moment, every rate, to the bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdiffclip import checkpoint
from fastdiffclip.config import Config
from fastdiffclip.errors import InterruptedRunError
from fastdiffclip.runtime import Progress
from fastdiffclip.scene.store import Scene
from fastdiffclip.train import loop
from fastdiffclip.train.flc import Shots, train_flc
from fastdiffclip.train.umd import UmdResult, train_umd

Run = Callable[[Path, int | None], None]
# Steps of an epoch: 40 windows in batches of 16; 12 shots in batches of 8. Both have a short last batch.
STEPS = {"umd": (3, 12), "flc": (2, 24)}


def stop_after(step: int | None) -> Progress:
    """Progress that sends a signal once ``step`` steps are taken."""

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return progress


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def runs(
    small_scene: Scene, small_config: Config, small_shots: Shots, small_umd: UmdResult, precision: str
) -> dict[str, Run]:
    """By stage: train into a folder, or go on in it, until the run is stopped after a step or ends."""
    config = small_config.model_copy(update={"precision": precision})

    def umd(out: Path, stop: int | None) -> None:
        train_umd([small_scene], config, out=out, device="cpu", resume=True, progress=stop_after(stop))

    def flc(out: Path, stop: int | None) -> None:
        train_flc(
            [small_scene], small_shots, config, umd=small_umd, out=out, device="cpu", resume=True,
            progress=stop_after(stop),
        )  # fmt: skip

    return {"umd": umd, "flc": flc}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a run that is no word about when and where it was made."""
    files = [
        path for path in folder.rglob("*") if path.is_file() and path.name not in ("manifest.json", "metrics.json")
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("stage", ["umd", "flc"])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    runs: dict[str, Run], tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first step, before, at and after the edge of an epoch, and at the end; each time by a signal.

    What it is compared with is a run that nobody stopped, which left a checkpoint after every step.
    """
    run, (epoch, total) = runs[stage], STEPS[stage]
    monkeypatch.setattr(checkpoint, "KEEP", total)
    one, whole = tmp_path / "one", tmp_path / "whole"
    ended: list[Path] = []
    with monkeypatch.context() as patch:  # what is kept of it before its checkpoints go
        patch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
        patch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: ended.append(path))
        run(whole, None)
    assert ended == [whole / checkpoint.CHECKPOINTS]
    expected = tree(whole)
    for step in (1, 2 * epoch - 1, 2 * epoch, 2 * epoch + 1, total):
        with pytest.raises(InterruptedRunError, match=f"after step {step} of {total}"):
            run(one, step)
        if step == total:
            break
        place = f"{checkpoint.CHECKPOINTS}/{step:09d}"
        found = tree(one)
        for suffix in ("safetensors", "json"):
            assert found[f"{place}.{suffix}"] == expected[f"{place}.{suffix}"]
        assert expected[checkpoint.LOG].startswith(found[checkpoint.LOG])
        tensors = checkpoint.unpack_tensors(one / f"{place}.safetensors", None)
        counts = [float(tensor) for name, tensor in tensors.items() if name.endswith(".step")]
        assert counts and set(counts) == {step} and len(tensors[checkpoint.LOSSES]) == step
        assert sum(name.endswith((".exp_avg", ".exp_avg_sq")) for name in tensors) == 2 * len(counts)
    run(one, None)
    assert tree(one) == {name: data for name, data in expected.items() if not name.startswith(checkpoint.CHECKPOINTS)}
