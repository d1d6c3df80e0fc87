"""Ctrl-C and SIGTERM during each long command: the right exit code, soon, one sentence, nothing half-written."""

from __future__ import annotations

import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from fastdiffclip.scene.writer import SceneWriter

from .console import Result, Stopped, contrastive, leftovers, tiny

SOON = 20.0  # seconds; generous, for a machine that is busy with other tests
LONG = tiny("umd.epochs=3000", "flc.epochs=3000")
LONG_FLC = contrastive("flc.epochs=3000")
Interrupt = Callable[..., Stopped]


def check(stopped: Stopped, code: int, sentence: str, folder: Path) -> None:
    assert stopped.code == code, stopped.end
    assert stopped.seconds < SOON
    assert re.search(sentence, stopped.end), stopped.end
    assert "Traceback" not in stopped.end and "ignored" not in stopped.end
    assert leftovers(folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ingest(number: int, interrupt: Interrupt, tmp_path: Path) -> None:
    np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.uint16, (1500, 1000, 100))[::7] = 3
    stopped = interrupt(["ingest", "--hsi", "large.npy", "--out", "x.zarr"], tmp_path, "ingest .*/100", number)
    check(stopped, 128 + number, "(interrupted|terminated); nothing was left half-written", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["large.npy"]


def test_an_interrupt_while_zarr_writes_metadata_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # zarr writes on threads of its own, which an interrupt does not stop: what they write must not come too late.
    create = zarr.Group.create_array
    pool = ThreadPoolExecutor(1)

    def late(*args: Any, **named: Any) -> Any:
        return pool.submit(lambda: (time.sleep(0.3), create(*args, **named))[1]).result()

    def interrupt_now(number: int, _: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(zarr.Group, "create_array", late)
    previous = signal.signal(signal.SIGALRM, interrupt_now)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt), SceneWriter(tmp_path / "x.zarr", height=4, width=4) as writer:
            writer.add_modality("hsi", np.ones((4, 4, 2), np.float32), bands=2, dtype="float32")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    pool.shutdown(wait=True)
    assert list(tmp_path.iterdir()) == []


def test_train_umd_goes_on_where_it_stopped(interrupt: Interrupt, scene: Path) -> None:
    arguments = ["train-umd", "scene.zarr", *LONG, "--out", "run"]
    said = r"interrupted after step (\d+) of 6000; continue with --resume --out run"
    first = interrupt(arguments, scene, "[2-9][0-9][0-9]/6000")
    check(first, 130, said, scene)
    assert not (scene / "run" / "manifest.json").exists()
    second = interrupt([*arguments, "--resume"], scene, "[1-9][0-9]*/6000", signal.SIGTERM)
    check(second, 143, said, scene)
    begun = [int(found[1]) for part in (first, second) if (found := re.search(said, part.end))]
    shown = [int(step) for step in re.findall(r"(\d+)/6000", second.seen) if step != "0"]
    assert begun[1] > begun[0] and min(shown) > begun[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_train_flc(interrupt: Interrupt, scene: Path, number: int) -> None:
    stopped = interrupt(["train-flc", "scene.zarr", *LONG_FLC, "--umd", "none", "--out", "run"], scene, "loss", number)
    check(stopped, 128 + number, "interrupted after step .* continue with --resume --out run", scene)


def test_predict_goes_on_where_it_stopped(interrupt: Interrupt, call: Callable[..., Result], scene: Path) -> None:
    np.save(scene / "wide.npy", np.tile(np.load(scene / "cube.npy"), (5, 6, 1)))
    model = ["train-flc", "scene.zarr", "--umd", "none", "--out", "m", *contrastive("model.window=9")]
    train = ["ingest", "--hsi", "cube.npy", "--labels", "gt.npy", "--out", "scene.zarr", "--overwrite"]
    for command in (train, model, ["ingest", "--hsi", "wide.npy", "--out", "wide.zarr"]):
        assert call(command, scene).code == 0
    predict = ["predict", "wide.zarr", "--model", "m"]
    outputs = ["--out", "map.tif", "--png", "map.png", "--probabilities", "p.tif"]
    said = r"predict was interrupted after (\d+) of 19 tiles; continue with --resume --out map.tif"
    tiles = []
    # A resumed run shows what it found first.
    begun, well_on = r"predict .*[1-9]\d*/36000", r"predict .*[23]\d{4}/36000"
    for number, more, seen in ((signal.SIGINT, [], begun), (signal.SIGTERM, ["--resume"], well_on)):
        stopped = interrupt([*predict, *outputs, *more], scene, seen, number)
        assert stopped.code == 128 + number, stopped.end
        assert stopped.seconds < SOON and "Traceback" not in stopped.end
        found = re.search(said, stopped.end)
        assert found, stopped.end
        tiles.append(int(found[1]))
        names = {path.name for path in scene.iterdir()}
        assert ".map.tif.partial" in names and not names & {"map.tif", "map.png", "p.tif", "map.tif.aux.xml"}
    assert 0 < tiles[0] < tiles[1] < 19
    ended = call([*predict, *outputs, "--resume", "--memory", "8GiB", "--json"], scene)
    assert ended.code == 0 and not (scene / ".map.tif.partial").exists()
    whole = call([*predict, "--out", "whole.tif", "--probabilities", "whole_p.tif"], scene)
    assert whole.code == 0 and leftovers(scene) == []
    for name, other in (("map.tif", "whole.tif"), ("p.tif", "whole_p.tif")):
        assert (scene / name).read_bytes() == (scene / other).read_bytes()


def test_evaluate(interrupt: Interrupt, scene: Path) -> None:
    options = ["--seeds", "200", "--baselines", "extratrees", "--umd", "none", "--out", "run", *tiny()]
    stopped = interrupt(["evaluate", "scene.zarr", *options], scene, r"evaluate .*[1-9]\d*/600")
    check(stopped, 130, "evaluate was interrupted; continue with --resume --out run", scene)
    journal = (scene / "run" / "predictions.jsonl").read_text().splitlines()
    again = interrupt(["evaluate", "scene.zarr", *options, "--resume"], scene, r"evaluate .*[1-9]\d*/600")
    check(again, 130, "--resume --out run", scene)
    assert (scene / "run" / "predictions.jsonl").read_text().splitlines()[: len(journal)] == journal


def test_demo(interrupt: Interrupt, tmp_path: Path) -> None:
    stopped = interrupt(["demo", "--out", "demo", *LONG], tmp_path, "train-umd .*loss", signal.SIGTERM)
    check(stopped, 143, "demo was terminated; what was finished lies in demo", tmp_path)
    assert (tmp_path / "demo" / "suburb.zarr" / "zarr.json").exists()
    assert not list(tmp_path.rglob("map.*"))
    shutil.rmtree(tmp_path / "demo")


LOADING = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
def watch():
    while "torch.nn" not in sys.modules:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.{name})
threading.Thread(target=watch, daemon=True).start()
from fastdiffclip.cli import main
main()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_while_libraries_load(name: str, code: int, real: Callable[..., Result], scene: Path) -> None:
    (scene / "starter.py").write_text(LOADING.format(name=name))
    result = real(["train-umd", "scene.zarr", *tiny()], scene, [sys.executable, "starter.py"])
    assert result.code == code
    assert result.out == "" and re.fullmatch("(interrupted|terminated); nothing was left half-written\n", result.err)
    assert not (scene / "runs").exists()
