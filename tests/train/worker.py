"""Trains both stages as one of several processes: ``worker.py SCENE OUT.json ENGINE[:ZERO] ...``; see test_world.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastdiffclip.config import Config, FlcConfig, ModelConfig, UmdConfig
from fastdiffclip.scene.labelled import labelled_pixels
from fastdiffclip.scene.store import open_scene
from fastdiffclip.train.flc import Shots, class_prompts, train_flc
from fastdiffclip.train.umd import train_umd
from fastdiffclip.train.world import World

MODEL = ModelConfig(
    window=3, width=16, depth=1, heads=2, decoder_width=16, decoder_depth=1, embedding=16, text_width=16,
    text_depth=1, text_heads=2,
)  # fmt: skip


def settings(engine: str, **changes: object) -> Config:
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
    ).model_copy(update=changes)


def train(scene_path: str, engine: str, folder: Path | None = None, **changes: object) -> dict[str, list[float]]:
    """Losses of both stages."""
    scene, config = open_scene(Path(scene_path)), settings(engine, **changes)
    labelled = labelled_pixels([scene])
    split = labelled.split("disjoint", 4, 0, 3)
    shots = Shots(split.train, split.train_labels, labelled.classes, class_prompts([scene], labelled, "p4"))
    outs = (None, None) if folder is None else (folder / "umd", folder / "flc")
    umd = train_umd([scene], config, device="cpu", out=outs[0])
    flc = train_flc([scene], shots, config, umd=umd, device="cpu", out=outs[1])
    return {"umd": umd.losses, "flc": flc.losses}


if __name__ == "__main__":
    losses = {}
    for place, wanted in enumerate(sys.argv[3:]):
        folder = Path(sys.argv[2]).parent / f"run{place}"
        losses[wanted] = train(sys.argv[1], wanted, folder)
    if World.from_environment().main:
        Path(sys.argv[2]).write_text(json.dumps(losses))
