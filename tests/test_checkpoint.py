"""What lies on disk: whole or not there, verified when read, and the right one taken up again."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiffclip import checkpoint
from fastdiffclip.config import load_config
from fastdiffclip.errors import InputDataError, ResourceError, UsageError
from fastdiffclip.files import open_folder, replacing


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((3, 2), value), "model.b": torch.tensor(value, dtype=torch.float64)}


def save(folder: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "stage": "umd", "seed": 3, "scenes": [{"name": "s", "path": "s.zarr", "sha256": "ab"}], "losses": [2.0, 1.0],
        "identity": "id", "extra": {"front_end": {}},
    } | changes  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    return checkpoint.save_run(folder, tensors(1.0), load_config("paper"), **settings)


def test_write_replaces_and_leaves_only_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    checkpoint.write_atomic(path, b"old")
    checkpoint.write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    path = tmp_path / "a.json"
    checkpoint.write_atomic(path, b"old")

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    expected = ResourceError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        checkpoint.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]


def test_a_name_with_brackets_leaves_nothing_either(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing(tmp_path / "map[1].tif") as temporary:
            temporary.write_bytes(b"half")
            raise ResourceError("far enough")

    with pytest.raises(ResourceError, match="far enough"):
        fail()
    assert os.listdir(tmp_path) == []


def test_the_name_is_on_the_disk_before_anything_else_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def replaced(source: Path, target: Path) -> None:
        done.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    checkpoint.write_atomic(tmp_path / "a.json", b"new")
    assert done == ["file", "name", "folder"]


def test_run_round_trip(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "manifest.json", "metrics.json", "model.safetensors"]
    run = checkpoint.load_run(tmp_path, "umd")
    assert run.config == load_config("paper") and run.manifest["seed"] == 3
    assert {"torch", "python", "numba"} <= set(run.manifest["versions"]) and run.manifest["machine"]["cores"] >= 1
    for name, tensor in run.part("model").items():
        assert (
            torch.equal(tensor, tensors(1.0)[f"model.{name}"]) and tensor.dtype == tensors(1.0)[f"model.{name}"].dtype
        )
    metrics = {"loss_first": 2.0, "loss_last": 1.0, "steps": 2, "seconds_to_first_step": None}
    assert checkpoint.read_json(tmp_path / "metrics.json") == metrics


def test_an_unfinished_or_foreign_folder_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputDataError, match=r"not a finished run: it has no manifest\.json"):
        checkpoint.load_run(tmp_path, "umd")
    save(tmp_path)
    with pytest.raises(InputDataError, match="stage 'umd'.*expected stage 'flc'"):
        checkpoint.load_run(tmp_path, "flc")


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputDataError, match=r"model\.safetensors does not match the checksum"):
        checkpoint.load_run(tmp_path, "umd")
    path.unlink()
    with pytest.raises(InputDataError, match=r"model\.safetensors is missing"):
        checkpoint.load_run(tmp_path, "umd")
    path.mkdir()
    with pytest.raises(InputDataError, match=r"model\.safetensors cannot be read"):
        checkpoint.load_run(tmp_path, "umd")


def test_a_truncated_file_without_checksum_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(checkpoint.pack_tensors(tensors(1.0))[:-4])
    with pytest.raises(InputDataError, match="not a whole safetensors file"):
        checkpoint.unpack_tensors(path, None)


@pytest.mark.parametrize("text", ["", "umd: [", "- 3", "umd: {epoch: 3}", "\x00"])
def test_a_damaged_config_is_bad_data_not_wrong_usage(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the checksum of other settings, and with its own, as a newer version's may be."""
    save(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputDataError, match=r"config\.yaml does not match the checksum in its manifest"):
        checkpoint.load_run(tmp_path, "umd")
    monkeypatch.setattr(checkpoint, "dump_config", lambda config: text)
    save(tmp_path)
    if text == "":  # nothing set: the defaults
        assert checkpoint.load_run(tmp_path, "umd").config.recipe == "custom"
        return
    with pytest.raises(InputDataError, match=r"config\.yaml cannot be read"):
        checkpoint.load_run(tmp_path, "umd")


def flipped(path: Path, place: int) -> None:
    """Change one bit of the byte at ``place``."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("part", range(40))
def test_a_flipped_byte_anywhere_is_found_and_named(tmp_path: Path, part: int) -> None:
    """Step, fingerprint, names of classes, checksums: nothing of it is believed."""
    manifest = tmp_path / "manifest.json"
    save(tmp_path)
    flipped(manifest, part * manifest.stat().st_size // 40)
    with pytest.raises(InputDataError, match=r"manifest\.json (does not match its own checksum|cannot be read)"):
        checkpoint.load_run(tmp_path, "umd")
    with pytest.raises(InputDataError, match=r"manifest\.json"):
        checkpoint.finished_run(tmp_path, "id")
    assert checkpoint.find_runs("ab", "umd", tmp_path) == []
    for step in (5, 10):
        checkpoint.save_checkpoint(tmp_path, step, tensors(step), "id")
    for suffix in ("json", "safetensors"):
        path = tmp_path / "checkpoints" / f"000000010.{suffix}"
        whole = path.read_bytes()
        flipped(path, part * len(whole) // 40)
        found = checkpoint.latest_checkpoint(tmp_path, "id")
        assert found is not None and found[0] == 5
        path.write_bytes(whole)


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors have room and what stands beside them has none."""
    for step in (5, 10):
        checkpoint.save_checkpoint(tmp_path, step, tensors(step), "id")
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}

    def full(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            raise ResourceError(f"cannot write {path}: No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(checkpoint, "write_atomic", full)
    with pytest.raises(ResourceError, match="No space left"):
        checkpoint.save_checkpoint(tmp_path, 15, tensors(15), "id")
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


def test_what_a_kill_or_damage_left_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (5, 10):
        checkpoint.save_checkpoint(tmp_path, step, tensors(step), "id")
    flipped(root / "000000010.safetensors", 20)
    (root / "000000008.safetensors").write_bytes(b"killed before it was entered")
    found = checkpoint.latest_checkpoint(tmp_path, "id")
    assert found is not None and found[0] == 5
    checkpoint.save_checkpoint(tmp_path, 7, tensors(7), "id")
    assert sorted({path.stem for path in root.iterdir()}) == ["000000005", "000000007"]
    assert len(list(root.iterdir())) == 4


def test_newest_two_checkpoints_stay(tmp_path: Path) -> None:
    for step in (5, 10, 15, 1000):
        checkpoint.save_checkpoint(tmp_path, step, tensors(step), "id")
    names = sorted(os.listdir(tmp_path / "checkpoints"))
    assert names == [f"{step:09d}.{end}" for step in (15, 1000) for end in ("json", "safetensors")]
    found = checkpoint.latest_checkpoint(tmp_path, "id")
    assert found is not None and found[0] == 1000 and torch.equal(found[1]["model.a"], tensors(1000)["model.a"])


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, suffix: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (5, 10):
        checkpoint.save_checkpoint(tmp_path, step, tensors(step), "id")
    path = tmp_path / "checkpoints" / f"000000010.{suffix}"
    path.write_bytes(path.read_bytes()[:-7]) if damage == "cut" else path.unlink()
    found = checkpoint.latest_checkpoint(tmp_path, "id")
    assert found is not None and found[0] == 5
    if (suffix, damage) != ("json", "gone"):  # then nothing says that it ever was
        assert "passed over" in caplog.text and "000000010" in caplog.text


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoint.latest_checkpoint(tmp_path, "id") is None
    assert checkpoint.finished_run(tmp_path, "id") is None


def test_another_run_is_not_taken_up(tmp_path: Path) -> None:
    checkpoint.save_checkpoint(tmp_path, 5, tensors(5), "id")
    with pytest.raises(UsageError, match="other settings, scenes or seed"):
        checkpoint.latest_checkpoint(tmp_path, "other")
    save(tmp_path)
    with pytest.raises(UsageError, match="other settings, scenes or seed"):
        checkpoint.finished_run(tmp_path, "other")
    assert checkpoint.finished_run(tmp_path, "id") is not None


def test_optimiser_state_survives() -> None:
    def build() -> tuple[torch.nn.Linear, torch.optim.Adam]:
        layer = torch.nn.Linear(3, 2)
        torch.nn.init.ones_(layer.weight), torch.nn.init.zeros_(layer.bias)
        return layer, torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)

    def step(layer: torch.nn.Linear, optimiser: torch.optim.Adam, scale: float) -> None:
        optimiser.zero_grad()
        (layer(torch.ones(1, 3)) * scale).square().sum().backward()
        optimiser.step()

    whole, whole_adam = build()
    for scale in (1.0, 2.0, 3.0):
        step(whole, whole_adam, scale)
    first, first_adam = build()
    for scale in (1.0, 2.0):
        step(first, first_adam, scale)
    second, second_adam = build()
    second.load_state_dict(first.state_dict())
    checkpoint.restore_optimiser(second_adam, checkpoint.optimiser_tensors(first_adam))
    step(second, second_adam, 3.0)
    assert torch.equal(second.weight, whole.weight) and torch.equal(second.bias, whole.bias)


def test_find_runs_newest_first_and_past_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, finished, stage, sha in (
        ("old", "2025-01-01T00:00:00+0000", "umd", "ab"),
        ("new", "2025-06-01T00:00:00+0000", "umd", "ab"),
        ("flc", "2025-07-01T00:00:00+0000", "flc", "ab"),
        ("other", "2025-08-01T00:00:00+0000", "umd", "cd"),
    ):
        save(tmp_path / "s" / name, stage=stage, scenes=[{"sha256": sha}], extra={"finished": finished})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    assert [path.name for path in checkpoint.find_runs("ab", "umd", tmp_path)] == ["new", "old"]
    assert [path.name for path in checkpoint.find_runs(None, "umd", tmp_path)] == ["other", "new", "old"]
    assert "broken" in caplog.text
    assert checkpoint.find_runs("ab", "umd", tmp_path / "nowhere") == []


def test_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a"
    assert open_folder(out, resume=False) == out and out.is_dir()
    open_folder(out, resume=False)
    (out / "x").write_text("")
    with pytest.raises(UsageError, match="not empty"):
        open_folder(out, resume=False)
    open_folder(out, resume=True)
    with pytest.raises(UsageError, match="give another --out, or --resume to continue the run in it$"):
        open_folder(out, resume=False)
    with pytest.raises(UsageError, match="give another --out$"):
        open_folder(out, resume=None)
    with pytest.raises(UsageError, match="not empty"):
        open_folder(out / "x", resume=False)
    with pytest.raises(ResourceError, match="cannot create"):
        open_folder(out / "x" / "below", resume=False)


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        checkpoint.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []
    (tmp_path / "list.json").write_text(json.dumps([1]))
    with pytest.raises(InputDataError, match="JSON object"):
        checkpoint.read_json(tmp_path / "list.json")
