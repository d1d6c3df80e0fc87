"""Trains both stages as one of several processes: ``worker.py SCENE OUT.json ENGINE[:ZERO][+bands][@STAGE:STEP] ...``.

Each ENGINE trains into a folder of its own beside OUT.json, with ``+bands`` a network over bands as well. With
``@STAGE:STEP`` the main process alone gets a signal after that step, and the next ENGINE goes on in the same folder.
See test_world.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from fastdiffclip.config import BandsConfig, Config, FlcConfig, LogisticConfig, ModelConfig, UmdConfig
from fastdiffclip.errors import InterruptedRunError
from fastdiffclip.runtime import Progress
from fastdiffclip.scene.labelled import labelled_pixels
from fastdiffclip.scene.store import open_scene
from fastdiffclip.train.flc import Shots, class_prompts, train_flc
from fastdiffclip.train.umd import train_umd
from fastdiffclip.train.world import World

MODEL = ModelConfig(
    window=3, width=16, depth=1, heads=2, decoder_width=16, decoder_depth=1, embedding=16, text_width=16,
    text_depth=1, text_heads=2,
)  # fmt: skip


def settings(engine: str) -> Config:
    """51 steps of UMD in micro-batches with short last batches, 50 of FLC; ``engine`` as ``deepspeed:2``."""
    name, _, zero = engine.partition(":")
    return Config(
        prepare="standard",
        precision="fp32",
        memory_gib=1.0,
        model=MODEL,
        engine=name,
        zero=int(zero or 0),
        umd=UmdConfig(epochs=17, batch=16, samples=40, lr=1e-3, micro_batch=3, clip=0.5),
        flc=FlcConfig(epochs=25, batch=8, lr=1e-3),
    )


def over_bands(config: Config) -> Config:
    """50 steps over bands, batches of 16, in place of those over pixels."""
    return config.model_copy(
        update={
            "bands": BandsConfig(steps=50, batch=16),
            "flc": FlcConfig(head="logistic", encoder="frozen"),
            "logistic": LogisticConfig(views=("means", "restored")),
        }
    )


def interruption(stage: str, at: str) -> Progress:
    """Progress that stops the run after the step that ``at`` (``STAGE:STEP``) names."""
    name, _, step = at.partition(":")

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        if World.from_environment().main and task == f"train-{name}" and name == stage and done == int(step):
            os.kill(os.getpid(), signal.SIGTERM)

    return progress


def train(scene_path: str, engine: str, folder: Path, at: str) -> dict[str, list[float]]:
    """Losses of both stages, and over bands; none where the run was interrupted."""
    name, _, bands = engine.partition("+")
    scene, config = open_scene(Path(scene_path)), settings(name)
    labelled = labelled_pixels([scene])
    split = labelled.split("disjoint", 4, 0, 3)
    shots = Shots(split.train, split.train_labels, labelled.classes, class_prompts([scene], labelled, "p4"))
    try:
        umd = train_umd(
            [scene], config, device="cpu", out=folder / "umd", resume=True, progress=interruption("umd", at)
        )
        flc = train_flc(
            [scene], shots, config, umd=umd, device="cpu", out=folder / "flc", resume=True,
            progress=interruption("flc", at),
        )  # fmt: skip
        losses = {"umd": umd.losses, "flc": flc.losses}
        if bands:
            losses["bands"] = train_umd([scene], over_bands(config), device="cpu", out=folder / "bands").losses
    except InterruptedRunError:
        return {}
    return losses


if __name__ == "__main__":
    losses, place = {}, 0
    for wanted in sys.argv[3:]:
        engine, _, at = wanted.partition("@")
        losses[engine] = train(sys.argv[1], engine, Path(sys.argv[2]).parent / f"run{place}", at)
        place += not at
    if World.from_environment().main:
        Path(sys.argv[2]).write_text(json.dumps(losses))
