"""Unsupervised mask diffusion: its loss by hand, what must not change it, and taking a run up again."""

from __future__ import annotations

import csv
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiffclip import checkpoint
from fastdiffclip.config import Config
from fastdiffclip.errors import InputDataError, InterruptedRunError, UsageError
from fastdiffclip.kernels import philox
from fastdiffclip.model.diffusion import NoiseSchedule
from fastdiffclip.model.mask_diffusion import MaskDiffusion
from fastdiffclip.runtime import Compute
from fastdiffclip.scene.prepare import fit_front_end, prepare_scenes
from fastdiffclip.scene.store import Scene, open_scene
from fastdiffclip.scene.windows import gather_windows, token_valid
from fastdiffclip.scene.writer import SceneWriter
from fastdiffclip.train.data import UmdData, umd_data
from fastdiffclip.train.loop import start_engine
from fastdiffclip.train.umd import UmdResult, UmdStep, load_umd, train_umd
from fastdiffclip.train.world import World

CPU = Compute(torch.device("cpu"), torch.float32)
# Of this code at its first release, on the small scene of conftest.py; a change of these is a change of the method.
GOLDEN = [3.870821, 3.4300737, 3.1942148, 3.3010798, 2.4764397, 2.5859873, 2.7480843, 2.3868952]


def with_umd(config: Config, **changes: object) -> Config:
    return config.model_copy(update={"umd": config.umd.model_copy(update=changes)})


def data_of(scene: Scene, config: Config, budget: int = 1 << 30, seed: int = 0) -> UmdData:
    front_end = fit_front_end(config.prepare, [scene], config.components)
    return umd_data([scene], front_end, config.umd.samples, config.model.window, seed, budget, torch.device("cpu"))


def step_of(scene: Scene, config: Config, **settings: int) -> UmdStep:
    data = data_of(scene, config, **settings)
    channels = dict(zip(("hsi", "lidar"), (flat.channels for flat in data.flat), strict=True))
    engine = start_engine(MaskDiffusion(channels, config.model), {}, config, config.umd, CPU, World())
    return UmdStep(data, config, 0, CPU, engine)


def gradients(step: UmdStep, number: int) -> tuple[float, torch.Tensor]:
    step.engine.zero()
    loss = float(step(torch.tensor(number)))
    return loss, torch.cat([p.grad.flatten() for p in step.engine.model.parameters() if p.grad is not None])


def weights(result: UmdResult) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


@pytest.mark.parametrize("weights_", [(1.0, 1.0), (0.5, 2.0)])
def test_the_loss_is_equation_9(small_scene: Scene, small_config: Config, weights_: tuple[float, float]) -> None:
    config = with_umd(small_config, masked_weight=weights_[0], visible_weight=weights_[1], samples=11, batch=11)
    step = step_of(small_scene, config)
    front_end = fit_front_end("standard", [small_scene])
    prepared = prepare_scenes([small_scene], front_end)
    loss = float(step(torch.tensor(3)))

    order = philox.permutation(philox.rng_state(0, 3), philox.SHUFFLE, 11)
    centres = step.data.centres[order].numpy()
    assert step.visible == 9 - math.floor(0.7 * 9 + 0.5) == 3
    rng = philox.rng_state(0, 3)
    times = philox.uniform_integers(rng, philox.TIMESTEP, 11, 1000)
    keep, spread = NoiseSchedule().table()[times].unbind(1)
    noisy, ids, clean, valid = [], [], [], []
    for m, modality in enumerate(prepared.modalities.values()):
        clean.append(torch.from_numpy(gather_windows(modality, prepared.extents, centres, 3)))
        valid.append(token_valid(modality, prepared.extents, centres, 3))
        ids.append(philox.visible_ids(rng, 11, 9, 3, m))
        x0 = clean[m].gather(1, ids[m][:, :, None].expand(-1, -1, clean[m].shape[2]))
        noise = philox.normals(rng, ids[m], x0.shape[2], m)
        noisy.append(keep[:, None, None] * x0 + spread[:, None, None] * noise)
    restored = step.engine.network(noisy, ids, times)
    expected = 0.0
    for m in range(2):
        error = (restored[m] - clean[m]).detach().double().square().mean(2).numpy()
        for b in range(11):
            seen = np.zeros(9, bool)
            seen[ids[m][b].numpy()] = True
            for weight, share, part in ((weights_[0], 6 / 9, ~seen), (weights_[1], 3 / 9, seen)):
                counted = error[b][part & valid[m][b]]
                expected += weight * share * (counted.mean() if len(counted) else 0.0) / 11
    assert loss == pytest.approx(expected, rel=1e-5)


def test_masks_are_independent_per_modality_and_window(small_scene: Scene, small_config: Config) -> None:
    rng = philox.rng_state(0, 0)
    a, b = (philox.visible_ids(rng, 16, 9, 3, m) for m in (0, 1))
    assert not torch.equal(a, b) and len(a.unique(dim=0)) > 8


@pytest.mark.parametrize("micro", [1, 3, 5, 16])
def test_micro_batches_give_the_same_gradient(small_scene: Scene, small_config: Config, micro: int) -> None:
    whole = step_of(small_scene, with_umd(small_config, micro_batch=16))
    split = step_of(small_scene, with_umd(small_config, micro_batch=micro))
    for number in (0, 2):  # the last batch of the epoch is short: 40 windows in batches of 16
        loss, expected = gradients(whole, number)
        other, found = gradients(split, number)
        assert other == pytest.approx(loss, rel=1e-6)
        assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_padding_weighs_nothing(small_scene: Scene, small_config: Config) -> None:
    padded = step_of(small_scene, with_umd(small_config, micro_batch=16))
    short = step_of(small_scene, with_umd(small_config, micro_batch=16))
    centres = padded.data.centres[padded.order.real(2)]
    assert len(centres) == 8 and padded.batch == 16
    short.batch = 8
    short.rows = lambda step: centres  # type: ignore[method-assign]
    loss, expected = gradients(short, 2)
    found_loss, found = gradients(padded, 2)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_windows_are_drawn_once_from_valid_pixels(small_scene: Scene, small_config: Config) -> None:
    centres = data_of(small_scene, small_config).centres.numpy()
    assert len(centres) == 40 == len({tuple(c) for c in centres.tolist()})
    valid = small_scene.read_valid("hsi") & small_scene.read_valid("lidar")
    assert valid[centres[:, 1], centres[:, 2]].all() and not valid.all()
    assert not np.array_equal(centres, data_of(small_scene, small_config, seed=1).centres.numpy())
    everything = data_of(small_scene, with_umd(small_config, samples=10**6)).centres
    assert len(everything) == valid.sum()
    step = step_of(small_scene, small_config)
    epoch = torch.cat([step.data.centres[step.order.real(n)] for n in range(3)])
    assert {tuple(c) for c in epoch.tolist()} == {tuple(c) for c in centres.tolist()}
    assert not torch.equal(epoch, torch.cat([step.data.centres[step.order.real(n)] for n in range(3, 6)]))


def test_golden_losses(small_umd: UmdResult) -> None:
    assert small_umd.losses[:8] == pytest.approx(GOLDEN, rel=1e-4)


def test_the_loss_falls(small_scene: Scene, small_config: Config) -> None:
    losses = train_umd([small_scene], with_umd(small_config, epochs=40, lr=3e-3), device="cpu").losses
    assert np.mean(losses[-6:]) < 0.6 * np.mean(losses[:3])


def test_one_seed_one_result(small_scene: Scene, small_config: Config, small_umd: UmdResult) -> None:
    torch.manual_seed(123)
    again = train_umd([small_scene], small_config, device="cpu")
    assert again.losses == small_umd.losses and torch.equal(weights(again), weights(small_umd))
    assert train_umd([small_scene], small_config, seed=1, device="cpu").losses != small_umd.losses


@pytest.mark.parametrize("prepare", ["standard", "mnf"])
def test_windows_from_disk_give_the_same_bits(small_scene: Scene, small_config: Config, prepare: str) -> None:
    config = small_config.model_copy(update={"prepare": prepare, "components": 5})
    assert len(data_of(small_scene, config, budget=1).flat[0].extents) == 40
    whole = train_umd([small_scene], config, device="cpu")
    drawn = train_umd([small_scene], config.model_copy(update={"memory_gib": 12000 / 2**30}), device="cpu")
    assert drawn.losses == whole.losses and torch.equal(weights(drawn), weights(whole))


def test_several_scenes(small_scene: Scene, small_config: Config) -> None:
    data = umd_data(
        [small_scene, small_scene], fit_front_end("standard", [small_scene]), 60, 3, 0, 1 << 30, torch.device("cpu")
    )
    assert set(data.centres[:, 0].tolist()) == {0, 1}
    assert len(train_umd([small_scene, small_scene], small_config, device="cpu").losses) == 12


@pytest.mark.parametrize("at", [1, 7, 12])
def test_an_interrupted_run_ends_in_the_same_weights(
    small_scene: Scene, small_config: Config, small_umd: UmdResult, tmp_path: Path, at: int
) -> None:
    def interrupt(task: str, done: int, total: int, note: str = "") -> None:
        if done == at:
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "run"
    with pytest.raises(InterruptedRunError, match=f"train-umd was interrupted after step {at} of 12") as raised:
        train_umd([small_scene], small_config, out=out, device="cpu", progress=interrupt)
    assert raised.value.exit_code == 143 and sorted(os.listdir(out)) == ["checkpoints", "log.csv"]
    with pytest.raises(UsageError, match="not empty"):
        train_umd([small_scene], small_config, out=out, device="cpu")
    with pytest.raises(UsageError, match="other settings"):
        train_umd([small_scene], with_umd(small_config, lr=2e-3), out=out, device="cpu", resume=True)
    result = train_umd([small_scene], small_config, out=out, device="cpu", resume=True)
    assert result.losses == small_umd.losses and torch.equal(weights(result), weights(small_umd))
    assert not (out / "checkpoints").exists()


def test_a_finished_run(small_scene: Scene, small_config: Config, small_umd: UmdResult, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    train_umd([small_scene], small_config, out=out, device="cpu")
    names = ["config.yaml", "log.csv", "manifest.json", "metrics.json", "model.safetensors"]
    assert sorted(os.listdir(out)) == names
    loaded = load_umd(out)
    assert torch.equal(weights(loaded), weights(small_umd)) and loaded.config == small_config
    assert loaded.losses == small_umd.losses
    assert loaded.front_end.to_meta() == small_umd.front_end.to_meta()
    manifest = checkpoint.read_json(out / "manifest.json")
    assert manifest["scenes"] == [
        {"name": small_scene.name, "path": str(small_scene.path), "sha256": small_scene.sha256}
    ]
    with open(out / "log.csv", newline="") as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * s / 12)) for s in range(12)], rel=1e-6)

    steps: list[int] = []
    again = train_umd(
        [small_scene], small_config, out=out, device="cpu", resume=True, progress=lambda *a: steps.append(a[1])
    )
    assert steps == [] and again.losses == small_umd.losses and torch.equal(weights(again), weights(small_umd))
    with pytest.raises(UsageError, match="other settings"):
        train_umd([small_scene], small_config, seed=1, out=out, device="cpu", resume=True)


def test_no_pixel_valid_everywhere(small_config: Config, tmp_path: Path) -> None:
    left = np.arange(24).reshape(4, 6) % 6 < 3
    with SceneWriter(tmp_path / "s.zarr", height=4, width=6) as writer:
        rng = np.random.default_rng(0)
        writer.add_modality("hsi", rng.random((4, 6, 3), np.float32), bands=3, dtype="float32", valid=left)
        writer.add_modality("lidar", rng.random((4, 6, 1), np.float32), bands=1, dtype="float32", valid=~left)
    for gib in (1.0, 1e-9):
        with pytest.raises(InputDataError, match="no pixel of the scenes is valid in every modality"):
            train_umd(
                [open_scene(tmp_path / "s.zarr")], small_config.model_copy(update={"memory_gib": gib}), device="cpu"
            )


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (2, 3)])
def test_a_window_larger_than_the_scene(small_config: Config, tmp_path: Path, height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    with SceneWriter(tmp_path / "s.zarr", height=height, width=width) as writer:
        writer.add_modality("hsi", rng.random((height, width, 1), np.float32), bands=1, dtype="float32")
    config = small_config.model_copy(update={"model": small_config.model.model_copy(update={"window": 5})})
    result = train_umd([open_scene(tmp_path / "s.zarr")], config, device="cpu")
    assert np.isfinite(result.losses).all() and len(result.losses) == 4


def test_the_default_is_the_default_recipe(small_scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiffclip.train import umd

    seen: list[str] = []

    def stop(kind: str, *_: object) -> None:
        seen.append(kind)
        raise InputDataError("far enough")

    monkeypatch.setattr(umd, "fit_front_end", stop)
    with pytest.raises(InputDataError, match="far enough"):
        train_umd([small_scene])
    assert seen == ["mnf"]


def test_bf16_stays_close(small_scene: Scene, small_config: Config, small_umd: UmdResult) -> None:
    losses = train_umd([small_scene], small_config.model_copy(update={"precision": "bf16"}), device="cpu").losses
    assert losses != small_umd.losses and losses == pytest.approx(small_umd.losses, rel=0.03)
