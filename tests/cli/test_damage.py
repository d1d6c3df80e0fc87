"""A flipped byte and a file that is gone, in a scene, a model and a checkpoint: named, whichever command meets them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastdiffclip import checkpoint
from fastdiffclip.errors import ResourceError
from fastdiffclip.train import loop

from .console import Result, contrastive, leftovers, tiny

Call = Callable[..., Result]
FLC = ["train-flc", "scene.zarr", "--umd", "none", "--out", "run", *contrastive("flc.batch=4")]
UMD = ["train-umd", "scene.zarr", "--out", "run", *tiny()]


def damage(path: Path, how: str) -> None:
    """Flip one bit in the middle, or remove the file."""
    if how == "gone":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def model(ingested: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ``train-flc``; not to be changed."""
    from fastdiffclip.cli import app
    from fastdiffclip.commands import process

    out = tmp_path_factory.mktemp("model") / "m"
    command = ["train-flc", str(ingested / "scene.zarr"), "--umd", "none", "--out", str(out), *tiny()]
    assert process.run(app, command) == 0
    return out


@pytest.mark.parametrize("how", ["flipped", "gone"])
@pytest.mark.parametrize("array", ["hsi", "lidar", "hsi_valid", "labels"])
def test_a_scene(call: Call, scene: Path, model: Path, array: str, how: str) -> None:
    chunk = next(path for path in sorted((scene / "scene.zarr" / array).rglob("*")) if path.parent.name != array)
    chunk = chunk if chunk.is_file() else next(path for path in sorted(chunk.rglob("*")) if path.is_file())
    damage(chunk, how)
    commands = [["scene", "verify", "scene.zarr"], FLC]
    if array != "labels" or how == "gone":  # what is not read is not checked
        commands += [UMD, ["predict", "scene.zarr", "--model", str(model), "--out", "map.tif"]]
    for command in commands:
        call(command, scene).one_sentence(3, f"'{array}'", str(chunk.relative_to(scene / "scene.zarr" / array)))
        assert not (scene / "run").exists() and not (scene / "map.tif").exists() and leftovers(scene) == []


@pytest.mark.parametrize("how", ["flipped", "gone"])
@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.MANIFEST, checkpoint.CONFIG])
def test_a_model(call: Call, scene: Path, model: Path, name: str, how: str) -> None:
    run = scene / "m"
    run.mkdir()
    for path in model.iterdir():
        (run / path.name).write_bytes(path.read_bytes())
    damage(run / name, how)
    call(["predict", "scene.zarr", "--model", "m", "--out", "map.tif"], scene).one_sentence(3, name)
    assert not (scene / "map.tif").exists() and leftovers(scene) == []


@pytest.mark.parametrize("command", [UMD, FLC], ids=["umd", "flc"])
@pytest.mark.parametrize(("suffix", "how"), [("safetensors", "flipped"), ("safetensors", "gone"), ("json", "flipped")])
def test_a_checkpoint(
    call: Call, real: Call, scene: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    command: list[str], suffix: str, how: str,
) -> None:  # fmt: skip
    """The one before it is taken, and with none left the run starts afresh; both is said, and the end is the same."""

    def stop(*_: object, **__: object) -> None:
        raise ResourceError("far enough")

    first: list[int] = []
    run = loop.Loop._run
    monkeypatch.setattr(loop.Loop, "_run", lambda self, *given: (first.append(given[3]), run(self, *given))[1])
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_run", stop)
        call(command, scene).one_sentence(4, "far enough")
        saved = sorted((scene / "run" / checkpoint.CHECKPOINTS).glob(f"*.{suffix}"))
        assert [int(path.stem) for path in saved] == [2, 3]
        patch.setattr(checkpoint, "save_checkpoint", lambda *_: None)
        for damaged, goes_on in ((saved[1], 2), (saved[0], 0)):
            damage(damaged, how)
            caplog.clear()
            call([*command, "--resume"], scene).one_sentence(4, "far enough")
            assert first[-1] == goes_on
            said = [entry.getMessage() for entry in caplog.records if "a checkpoint is passed over" in entry.message]
            assert len(said) == (1 if goes_on else 2) and damaged.name in said[-1]
    alone = command is UMD and (suffix, how) == ("safetensors", "flipped")
    again = (real if alone else call)([*command, "--resume"], scene)
    assert again.code == 0, again.err
    if alone:  # here the log is what the user sees
        assert len(again.err.splitlines()) == 2 and all(path.name in again.err for path in saved)
    assert call([*command, "--out", "whole"], scene).code == 0
    assert (scene / "run" / checkpoint.MODEL).read_bytes() == (scene / "whole" / checkpoint.MODEL).read_bytes()
