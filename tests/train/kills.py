"""Trains both stages while being killed: ``kills.py SCENE FOLDER KILLS SEED``.

Every run is a process forked from this one, which has the libraries and has computed nothing, so that a moment drawn
at random meets the work and not the imports. A kill is SIGKILL; each next run resumes. In the end the weights, the
losses and the rates of every step are compared, byte by byte, with those of a run that nobody disturbed. Prints one
JSON object; calls with different seeds add up.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fastdiffclip import checkpoint
from fastdiffclip.config import Config, FlcConfig, ModelConfig, UmdConfig
from fastdiffclip.scene.labelled import labelled_pixels
from fastdiffclip.scene.store import open_scene
from fastdiffclip.train import loop
from fastdiffclip.train.flc import Shots, class_prompts, train_flc
from fastdiffclip.train.umd import train_umd

MODEL = ModelConfig(
    window=3, width=16, depth=1, heads=2, decoder_width=16, decoder_depth=1, embedding=16, text_width=16,
    text_depth=1, text_heads=2,
)  # fmt: skip


def settings(precision: str) -> Config:
    """About a second a stage, short last batches included."""
    return Config(
        prepare="standard",
        precision=precision,
        memory_gib=1.0,
        model=MODEL,
        umd=UmdConfig(epochs=12, batch=16, samples=40, lr=1e-3),
        flc=FlcConfig(epochs=18, batch=8, lr=1e-3),
    )


def both_stages(scene_path: str, folder: Path, config: Config) -> None:
    """What a user does after a crash: the same two commands with ``--resume``; a checkpoint after every step."""
    loop.CHECKPOINT_SECONDS = 0.0
    scene = open_scene(Path(scene_path))
    umd = train_umd([scene], config, device="cpu", out=folder / "umd", resume=True)
    labelled = labelled_pixels([scene])
    split = labelled.split("disjoint", 4, 0, 3)
    shots = Shots(split.train, split.train_labels, labelled.classes, class_prompts([scene], labelled, "p4"))
    train_flc([scene], shots, config, umd=umd, device="cpu", out=folder / "flc", resume=True)


def forked(work: Callable[[], None]) -> int:
    """Start ``work`` in a child; returns its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:  # reported by the exit code and on stderr
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return pid


def outcome(folder: Path) -> dict[str, str]:
    """sha256 of the weights of both stages, with which the losses lie, and of the tables of steps."""
    files = [folder / stage / name for stage in ("umd", "flc") for name in (checkpoint.MODEL, checkpoint.LOG)]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def disturbed(scene: str, folder: Path, kills: int, draw: random.Random, config: Config) -> dict[str, object]:
    """One undisturbed run, and one that is killed ``kills`` times; a run that ended is begun anew elsewhere."""
    seconds = undisturbed(lambda: both_stages(scene, folder / "whole", config))
    truth, killed, finished, place = outcome(folder / "whole"), 0, 0, folder / "killed-0"
    killed_at: list[str] = []
    resumed = 0
    while killed < kills:
        resumed += progress_of(place) != "nothing"
        if survives(lambda: both_stages(scene, place, config), draw.uniform(0.0, seconds)):  # noqa: B023
            finished += 1
            judge(place, truth)
            place = folder / f"killed-{finished}"
        else:
            killed += 1
            killed_at.append(progress_of(place))
    resumed += progress_of(place) != "nothing"
    undisturbed(lambda: both_stages(scene, place, config))
    judge(place, truth)
    return {"kills": killed, "resumed": resumed, "finished_runs": finished + 1, "killed_at": killed_at}


def undisturbed(work: Callable[[], None]) -> float:
    """Seconds that a child takes."""
    began = time.monotonic()
    assert os.waitpid(forked(work), 0)[1] == 0, "a run that nobody disturbed failed"
    return time.monotonic() - began


def survives(work: Callable[[], None], seconds: float) -> bool:
    """Run a child, and kill it after ``seconds``; whether it had finished by then."""
    pid, end = forked(work), time.monotonic() + seconds
    while time.monotonic() < end:
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            assert status == 0, "a run that was resumed failed"
            return True
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def judge(folder: Path, truth: dict[str, str]) -> None:
    """A finished run has the undisturbed one's outcome, and nothing that a killed process left, temporary files too."""
    assert outcome(folder) == truth, f"the weights, losses or rates in {folder} differ"
    wanted = [checkpoint.CONFIG, checkpoint.LOG, checkpoint.MANIFEST, checkpoint.METRICS, checkpoint.MODEL]
    for stage in ("umd", "flc"):
        names = sorted(os.listdir(folder / stage))
        assert names == sorted(wanted), f"{folder / stage} holds {names}"


def progress_of(folder: Path) -> str:
    """Where a kill met the run: the newest whole checkpoint, or what is finished."""
    for stage in ("flc", "umd"):
        if (folder / stage / checkpoint.MANIFEST).is_file():
            return f"{stage} finished"
        steps = sorted((folder / stage / checkpoint.CHECKPOINTS).glob("*.json"))
        if steps:
            return f"{stage} {int(steps[-1].stem)}"
    return "nothing"


if __name__ == "__main__":
    scene_path, root, count, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    moments = random.Random(seed)
    found = {}
    for precision in ("fp32", "bf16"):
        (root / precision).mkdir(parents=True)
        found[precision] = disturbed(scene_path, root / precision, count // 2, moments, settings(precision))
    print(json.dumps(found))
