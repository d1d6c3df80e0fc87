"""A second signal while the first one's work is done: the command is gone at once, and what was there is enough."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdiffclip import checkpoint

from .console import Result, contrastive, leftovers, tiny

Call = Callable[..., Result]

# The first signal comes in a step, the second while the command saves because of it.
STARTER = """
import os, signal, sys, time
first, second = (getattr(signal, name) for name in sys.argv[1:3])
del sys.argv[1:3]
{heavy}

def on(owner, name, calls):
    plain, seen = getattr(owner, name), [0]
    def wrapped(*given, **named):
        seen[0] += 1
        if seen[0] in calls:
            os.kill(os.getpid(), calls[seen[0]])
            time.sleep(0.2)
        return plain(*given, **named)
    setattr(owner, name, wrapped)

{moments}
from fastdiffclip.cli import main
main()
"""
TRAINING = STARTER.format(
    heavy="from fastdiffclip import checkpoint\nfrom fastdiffclip.train import loop\nloop.CHECKPOINT_SECONDS = 0.0",
    moments="on(loop.Loop, '_last_loss', {2: first})\non(checkpoint, 'pack_tensors', {2: second})",
)
PREDICTION = STARTER.format(
    heavy="from fastdiffclip.infer import stream, unfinished",
    moments="on(stream.Task, '_tile', {1: first})\non(unfinished.Unfinished, 'commit', {1: second})",
)
FLC = ["train-flc", "scene.zarr", "--umd", "none", *contrastive("flc.batch=4")]


def interrupted(real: Call, folder: Path, starter: str, first: str, second: str, command: list[str]) -> None:
    """Run the command between the two signals; it says nothing and ends with the second's code."""
    done = real([first, second, *command], folder, [sys.executable, "-c", starter])
    assert done.code == {"SIGINT": 130, "SIGTERM": 143}[second], done.err
    assert done.err == ""


@pytest.mark.parametrize(
    ("first", "second", "command"),
    [("SIGINT", "SIGTERM", ["train-umd", "scene.zarr", *tiny()]), ("SIGTERM", "SIGINT", FLC)],
    ids=["umd", "flc"],
)
def test_training(real: Call, call: Call, scene: Path, first: str, second: str, command: list[str]) -> None:
    interrupted(real, scene, TRAINING, first, second, [*command, "--out", "run"])
    saved = scene / "run" / checkpoint.CHECKPOINTS
    assert sorted(path.name for path in saved.iterdir()) == ["000000001.json", "000000001.safetensors"]
    for more in (["--out", "run", "--resume"], ["--out", "whole"]):
        assert call([*command, *more], scene).code == 0
    assert (scene / "run" / checkpoint.MODEL).read_bytes() == (scene / "whole" / checkpoint.MODEL).read_bytes()


def test_predict(real: Call, call: Call, scene: Path) -> None:
    assert call([*FLC, "--out", "m"], scene).code == 0
    predict = ["predict", "scene.zarr", "--model", "m", "--out"]
    assert call([*predict, "whole.tif"], scene).code == 0
    interrupted(real, scene, PREDICTION, "SIGINT", "SIGINT", [*predict, "map.tif"])
    assert not (scene / "map.tif").exists() and (scene / ".map.tif.partial").exists()
    assert call([*predict, "map.tif", "--resume"], scene).code == 0
    assert (scene / "map.tif").read_bytes() == (scene / "whole.tif").read_bytes() and leftovers(scene) == []
