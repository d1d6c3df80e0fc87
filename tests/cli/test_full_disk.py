"""A disk that runs full at the worst moment: exit code 4, one sentence, and what was there stays as it was."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdiffclip import checkpoint
from fastdiffclip.scene.store import verify_scene
from fastdiffclip.scene.writer import SceneWriter

from .console import FULL, Result, contrastive, leftovers, tiny
from .disks import FILLER, filling, small_disk

Call = Callable[..., Result]
TRAINING = {
    "train-umd": ["train-umd", "scene.zarr", *tiny()],
    "train-flc": ["train-flc", "scene.zarr", "--umd", "none", *contrastive("flc.batch=4")],
}
EVERY_STEP = "from fastdiffclip.train import loop\nloop.CHECKPOINT_SECONDS = 0.0\n"
CHECKPOINT = EVERY_STEP + "full_at(loop.Loop, 'save', 3)"
END = EVERY_STEP + "from fastdiffclip import checkpoint\nfull_at(checkpoint, 'save_run', 1)"
TILE = """
from fastdiffclip.infer import pipeline
from fastdiffclip.infer.rawfile import RawFile
pipeline.COMMIT_SECONDS = 0.0
full_at(RawFile, 'write', {})
"""
OUTPUT = "from fastdiffclip.infer import finish\nfull_at(finish, '{}', 1)"
LABELS = "from fastdiffclip.scene.writer import SceneWriter\nfull_at(SceneWriter, 'add_labels', 1)"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def filled(moment: str, disk: Path, command: list[str]) -> list[str]:
    """The command, on whose way the disk fills up."""
    return [sys.executable, "-c", filling(moment), str(disk), *command]


@pytest.mark.parametrize(
    ("stage", "moment", "file", "kept"),
    [
        ("train-umd", CHECKPOINT, "000000003.safetensors", 2),
        ("train-flc", CHECKPOINT, "000000003.safetensors", 2),
        ("train-flc", END, "model.safetensors", 1),
    ],
    ids=["umd-checkpoint", "flc-checkpoint", "flc-end"],
)
def test_training(call: Call, scene: Path, stage: str, moment: str, file: str, kept: int) -> None:
    command = TRAINING[stage]
    with small_disk(scene / "disk", "size=40m") as disk:
        ended = disk.run(filled(moment, disk.place, [*command, "--out", "disk/run"]), scene)
        ended.one_sentence(4, "disk/run", file, "No space left on device")
        saved = disk.root / "run" / checkpoint.CHECKPOINTS
        steps = sorted(path.stem for path in saved.glob("*.json"))
        assert steps == sorted(path.stem for path in saved.glob("*.safetensors")) and len(steps) >= kept
        assert leftovers(disk.root) == [] and not (disk.root / "run" / checkpoint.MANIFEST).exists()
        assert set(os.listdir(disk.root / "run")) <= {checkpoint.CHECKPOINTS, checkpoint.LOG, checkpoint.CONFIG}
        shutil.copytree(disk.root / "run", scene / "run")
    for more in (["--out", "run", "--resume"], ["--out", "whole"]):
        again = call([*command, *more], scene)
        assert again.code == 0 and "passed over" not in again.err, again.err
    for name in (checkpoint.MODEL, checkpoint.LOG):
        assert (scene / "run" / name).read_bytes() == (scene / "whole" / name).read_bytes()


@pytest.fixture(scope="module")
def mapped(ingested: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model m, a scene wide.zarr of several tiles, and map.tif and p.tif of it; not to be changed."""
    from fastdiffclip.cli import app
    from fastdiffclip.commands import process

    folder = tmp_path_factory.mktemp("mapped")
    cube, heights = np.load(ingested / "cube.npy"), np.ones((30, 480), np.float32)
    with SceneWriter(folder / "wide.zarr", height=30, width=480) as writer:
        writer.add_modality("hsi", np.tile(cube, (1, 12, 1)), bands=cube.shape[2], dtype="uint16")
        writer.add_modality("lidar", heights[:, :, None], bands=1, dtype="float32")
    model = ["train-flc", str(ingested / "scene.zarr"), "--umd", "none", "--out", str(folder / "m"), *tiny()]
    outputs = ["--out", str(folder / "map.tif"), "--probabilities", str(folder / "p.tif")]
    for command in (model, ["predict", str(folder / "wide.zarr"), "--model", str(folder / "m"), *outputs]):
        assert process.run(app, command) == 0
    return folder


@pytest.mark.parametrize(
    ("moment", "said", "goes_on"),
    [
        (TILE.format(2), "cannot write disk/map.tif: No space left on device", False),
        (TILE.format(4), "cannot write disk/map.tif: No space left on device", True),
        (OUTPUT.format("write_probabilities"), "disk/p.tif", True),
        (OUTPUT.format("write_class_map"), "disk/map.tif", True),
        ("fill()", "No space left on device", False),
    ],
    ids=["first tile", "tile", "probabilities", "map", "from the start"],
)
def test_predict(call: Call, mapped: Path, tmp_path: Path, moment: str, said: str, goes_on: bool) -> None:
    """On a disk where an older map lies."""
    predict = ["predict", str(mapped / "wide.zarr"), "--model", str(mapped / "m")]
    outputs = ["--out", "disk/map.tif", "--probabilities", "disk/p.tif"]
    older = {"map.tif", "map.tif.aux.xml", "p.tif"}
    with small_disk(tmp_path / "disk", "size=2m") as disk:
        for name in older:
            (disk.root / name).write_bytes(b"what was there")
        disk.run(filled(moment, disk.place, [*predict, *outputs]), tmp_path).one_sentence(4, said)
        assert set(os.listdir(disk.root)) - {FILLER} == older | ({".map.tif.partial"} if goes_on else set())
        assert (disk.root / "map.tif").read_bytes() == (disk.root / "map.tif.aux.xml").read_bytes() == b"what was there"
        (disk.root / FILLER).unlink()
        shutil.copytree(disk.root, tmp_path / "disk", dirs_exist_ok=True)
    if goes_on:
        assert call([*predict, *outputs, "--resume"], tmp_path).code == 0
        for name in ("map.tif", "p.tif"):
            assert (tmp_path / "disk" / name).read_bytes() == (mapped / name).read_bytes()


@pytest.mark.parametrize(
    ("moment", "options", "words"),
    [
        (LABELS, "size=8m", ["the disk of disk/x.zarr is full", "make room or choose another --out"]),
        ("", "size=8m,nr_inodes=60", ["the disk of disk/x.zarr is full"]),
        ("fill()", "size=8m", ["disk/x.zarr"]),
    ],
    ids=["labels", "no more files", "from the start"],
)
def test_ingest_over_an_older_scene(ingested: Path, files: Path, moment: str, options: str, words: list[str]) -> None:
    ingest = [part.replace("scene.zarr", "disk/x.zarr") for part in FULL] + ["--overwrite"]
    np.save(files / "cube.npy", np.load(files / "cube.npy") + 1)
    with small_disk(files / "disk", options) as disk:
        shutil.copytree(ingested / "scene.zarr", disk.root / "x.zarr")
        before: dict[str, Any] = contents(disk.root / "x.zarr")
        disk.run(filled(moment, disk.place, ingest), files).one_sentence(4, *words)
        assert set(os.listdir(disk.root)) - {FILLER} == {"x.zarr"}
        assert contents(disk.root / "x.zarr") == before and verify_scene(disk.root / "x.zarr").ok
