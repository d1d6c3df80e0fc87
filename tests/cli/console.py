"""What the tests of the command line share: a tiny model, how a command ended, how its terminal is read."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEIGHT, WIDTH, BANDS = 30, 40, 8
TINY = [
    "model.window=3", "model.width=16", "model.depth=1", "model.heads=2", "model.decoder_width=16",
    "model.decoder_depth=1", "model.embedding=16", "model.text_width=16", "model.text_depth=1", "model.text_heads=2",
    "umd.epochs=2", "umd.samples=64", "umd.batch=32", "flc.epochs=2", "components=4", "precision=fp32",
    "logistic.views=[means,neighbours,components,pixel]",
]  # fmt: skip
WORDS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def tiny(*more: str) -> list[str]:
    """Options of a model that trains in a second."""
    return [part for text in (*TINY, *more) for part in ("--set", text)]


def contrastive(*more: str) -> list[str]:
    """Those of a model whose second stage takes optimiser steps, too."""
    return tiny("flc.head=contrastive", "flc.encoder=finetune", *more)


def encoded(*more: str) -> list[str]:
    """Those of a model whose second stage looks through the pretrained encoder."""
    return tiny("logistic.views=[means,tokens]", *more)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        def refuse(text: str) -> None:
            raise AssertionError(f"{text} is no JSON")

        value = json.loads(self.out.splitlines()[-1], parse_constant=refuse)
        assert isinstance(value, dict)
        return value

    def one_sentence(self, code: int, *words: str) -> None:
        """The exit code, and one line on stderr that holds the words."""
        assert self.code == code, self.err
        assert len(self.err.strip().splitlines()) == 1, self.err
        assert "Traceback" not in self.err and self.err.startswith("error: ")
        for word in words:
            assert word in self.err, f"{word!r} is not in {self.err}"


def program() -> list[str]:
    """The installed command, or the module where there is no script beside this Python."""
    script = Path(sys.executable).with_name("fastdiffclip")
    return [str(script)] if script.exists() else [sys.executable, "-m", "fastdiffclip"]


def default_signals() -> None:
    # A test run in the background has SIGINT ignored, and a child would inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


FULL = [
    "ingest", "--hsi", "cube.mat:HSI", "--modality", "lidar=dsm.tif", "--labels", "gt.mat:gt",
    "--classes", "classes.csv", "--out", "scene.zarr",
]  # fmt: skip


@dataclass(frozen=True)
class Stopped:
    """How a command ended that a signal met; ``seen`` is what its terminal showed before."""

    code: int
    seen: str
    end: str
    seconds: float


def read_terminal(descriptor: int) -> str:
    """What a terminal shows next; empty once nobody holds its other end."""
    if not select.select([descriptor], [], [], 120)[0]:
        raise AssertionError("the command shows nothing any more")
    try:
        return os.read(descriptor, 65536).decode(errors="replace")
    except OSError:  # Linux says EIO where others say end of file
        return ""


def leftovers(folder: Path) -> list[str]:
    """Temporary files and half-written folders, anywhere below."""
    return [str(path) for path in folder.rglob("*") if path.name.endswith((".tmp", ".partial", ".old"))]
