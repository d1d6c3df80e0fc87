"""Pretraining over bands, and the view `restored` that reads it."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiffclip import checkpoint
from fastdiffclip.commands.workflow import plan_umd
from fastdiffclip.config import BandsConfig, Config, LogisticConfig, load_config
from fastdiffclip.errors import InputDataError, InterruptedRunError, UsageError
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.model.spectral_denoiser import NOISE_LEVELS, SpectralDenoiser
from fastdiffclip.model.window_features import means_of_windows
from fastdiffclip.runtime import Compute, Progress
from fastdiffclip.scene.prepare import fit_front_end
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.data import unlabelled_centres
from fastdiffclip.train.flc import Shots, train_flc, window_source
from fastdiffclip.train.logistic import feature_statistics, fit_head, new_logistic, window_features
from fastdiffclip.train.loop import start_engine
from fastdiffclip.train.spectral import SpectralStep, learning_rate, pool_of_means
from fastdiffclip.train.umd import UmdResult, load_umd, train_umd
from fastdiffclip.train.world import World

CPU = Compute(torch.device("cpu"), torch.float32)
STEPS = 120


@pytest.fixture(scope="module")
def config(small_config: Config) -> Config:
    flc = small_config.flc.model_copy(update={"head": "logistic", "encoder": "frozen"})
    return small_config.model_copy(
        update={
            "flc": flc,
            "model": small_config.model.model_copy(update={"window": 5}),
            "bands": BandsConfig(steps=STEPS, batch=64),
            "logistic": LogisticConfig(views=("means", "restored"), sizes=(3, 5), samples=100),
        }
    )


@pytest.fixture(scope="module")
def pretrained(small_scene: Scene, config: Config, tmp_path_factory: pytest.TempPathFactory) -> UmdResult:
    return train_umd([small_scene], config, out=tmp_path_factory.mktemp("bands") / "run", device="cpu")


def step_of(scene: Scene, config: Config) -> SpectralStep:
    front_end = fit_front_end(config.prepare, [scene], config.components)
    pool = pool_of_means([scene], front_end, config, 0, 1 << 30)
    engine = start_engine(SpectralDenoiser(front_end.channels), {}, config, config.bands, CPU, World())
    return SpectralStep(pool, config.bands, 0, CPU, engine)


def stop_after(step: int) -> Progress:
    def progress(task: str, done: int, total: int, note: str = "") -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return progress


def test_the_pool_holds_the_means_of_every_size(small_scene: Scene, config: Config) -> None:
    front_end = fit_front_end(config.prepare, [small_scene])
    centres = unlabelled_centres([small_scene], config.bands.samples, 5, 7)
    pool = pool_of_means([small_scene], front_end, config, 7, 1 << 30)
    source = WindowSource([small_scene], front_end, 5, 1 << 30)
    means = means_of_windows([torch.from_numpy(part) for part in source.windows(centres)], (3, 5))
    assert torch.equal(pool, means.unflatten(1, (2, -1)).flatten(0, 1)) and pool.shape == (2 * len(centres), 13)
    assert torch.equal(pool_of_means([small_scene], front_end, config, 7, 0), pool)  # read from disk


def test_the_loss_is_the_weighted_square(small_scene: Scene, config: Config) -> None:
    step, number = step_of(small_scene, config), torch.tensor(5)
    chosen, rows, total = step.order(number)
    clean = step.pool[chosen]
    noisy, level, visible = step.noised(clean, number)
    assert int(rows) == int(total) == 64 and len(chosen.unique()) > 40
    low, high = NOISE_LEVELS
    assert low <= float(level.min()) < float(level.max()) <= high
    restored = step.engine.network(noisy, level, visible).detach()
    expected = 0.0
    for row in range(64):
        for channel in range(13):
            seen = visible[row, step.group[channel]] > 0
            weight = 1 + 1 / float(level[row]) ** 2 if seen else 1.0
            expected += weight * float(restored[row, channel] - clean[row, channel]) ** 2 / 13 / 64
    assert float(step(number)) == pytest.approx(expected, rel=1e-5)


def test_shares_of_a_batch_are_the_batch(small_scene: Scene, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row is, its noise and mask follow from its place in the whole batch, not from who computes it."""
    step, number = step_of(small_scene, config), torch.tensor(3)
    whole = step.noised(step.pool[step.order(number)[0]], number)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(step.order, "first", rank * 22)
        monkeypatch.setattr(step.order, "rows", 22)
        chosen, rows, total = step.order(number)
        assert (int(rows), int(total)) == (min(22, 64 - 22 * rank), 64)
        parts.append([part[: int(rows)] for part in step.noised(step.pool[chosen], number)])
    for part, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(part), expected)


def test_it_learns_to_restore(small_scene: Scene, config: Config, pretrained: UmdResult) -> None:
    """Nearer to the clean mean than the noised mean is, and than its shrinkage x_s / (1 + s^2)."""
    assert np.mean(pretrained.losses[-20:]) < 0.6 * np.mean(pretrained.losses[:5])
    step = step_of(small_scene, config)
    clean = step.pool[step.order(torch.tensor(10_000))[0]]
    level, generator = torch.full((64,), 0.7), torch.Generator().manual_seed(0)
    noisy = clean + 0.7 * torch.randn(clean.shape, generator=generator)
    with torch.no_grad():
        restored = pretrained.model(noisy, level, torch.ones(64, step.groups))
    error = (restored - clean).square().mean()
    assert error < 0.6 * (noisy - clean).square().mean() and error < 0.8 * (noisy / 1.49 - clean).square().mean()


def test_the_rate_rises_then_falls() -> None:
    rates = [learning_rate(BandsConfig(), step) for step in range(4000)]
    assert rates[0] == pytest.approx(1e-5) and max(rates) == pytest.approx(1e-3, rel=0.01) and rates[-1] < 1e-8
    assert 90 < int(np.argmax(rates)) < 101


def test_stopped_and_resumed_to_the_same_bits(
    small_scene: Scene, config: Config, pretrained: UmdResult, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(InterruptedRunError, match="after step 50 of 120"):
        train_umd([small_scene], config, out=out, device="cpu", progress=stop_after(50))
    again = train_umd([small_scene], config, out=out, device="cpu", resume=True)
    assert again.losses == pretrained.losses
    for name, tensor in pretrained.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)
    assert pretrained.folder is not None
    loaded = load_umd(pretrained.folder)
    assert isinstance(loaded.model, SpectralDenoiser) and loaded.config.tokens == "bands"
    assert torch.equal(loaded.model.input.weight, pretrained.model.input.weight)  # type: ignore[arg-type, union-attr]
    header = (pretrained.folder / checkpoint.LOG).read_text().splitlines()
    assert header[0] == "step,learning_rate,loss" and len(header) == 1 + STEPS


def test_the_head_looks_through_it(
    small_scene: Scene, small_shots: Shots, config: Config, pretrained: UmdResult, tmp_path: Path
) -> None:
    """With pretrained and with random weights; the run is read back, and taken as it is by a second one."""
    source = WindowSource([small_scene], pretrained.front_end, 5, 1 << 30)
    found = []
    for umd in (pretrained, None):
        out = tmp_path / f"{umd is None}"
        result = train_flc([small_scene], small_shots, config, umd=umd, out=out, device="cpu")
        classifier = Classifier.load(out, "cpu", "fp32")
        found.append(classifier.probabilities(source.windows(small_shots.centres)))
        assert (found[-1].argmax(1) == small_shots.indices().numpy()).mean() > 0.9
        head = checkpoint.load_run(out, "flc").manifest["head"]
        assert set(head) == {"shares", "temperature", "left_out_loss"}
        assert set(head["shares"]) == {"means", "restored"} and min(head["shares"].values()) > 0
        again = train_flc([small_scene], small_shots, config, umd=umd, out=out, device="cpu", resume=True)
        for name, tensor in result.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], tensor)
    assert not np.array_equal(found[0], found[1])


def test_restored_takes_part_where_no_shot_can_be_left_out(
    small_scene: Scene, small_shots: Shots, config: Config, pretrained: UmdResult
) -> None:
    """One shot per class: all views weigh the same."""
    rows = np.concatenate([np.flatnonzero(small_shots.labels == value)[:1] for value in (1, 2, 4)])
    single = replace(small_shots, centres=small_shots.centres[rows], labels=small_shots.labels[rows])
    source = window_source([small_scene], config, pretrained)
    model = new_logistic(source.front_end, config, pretrained.network, 0)
    where = Compute.choose("cpu", config.precision)
    statistics = feature_statistics(model, source, config, where)
    features = window_features(model, source.windows(single.centres), where)
    own = single.indices().numpy()
    head = fit_head(features, own, single.centres, single.prompts, statistics, config.logistic)
    assert head.shares == {"means": 0.5, "restored": 0.5} and head.left_out_loss is None


def test_a_head_of_other_features_is_refused(config: Config, pretrained: UmdResult) -> None:
    """As runs of earlier states are, which left the view out where its shots spoke against it."""
    model = new_logistic(pretrained.front_end, config, pretrained.network, 0)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("restorer")}
    tensors |= {"centre": tensors["centre"][:26]}
    with pytest.raises(InputDataError, match=r"fitted to 26 features and its settings ask for \d+: an earlier state"):
        model.take(tensors)


def test_a_head_without_the_view_has_no_network(small_scene: Scene, small_shots: Shots, config: Config) -> None:
    plain = config.model_copy(update={"logistic": LogisticConfig(views=("means",), sizes=(3, 5), samples=100)})
    model = train_flc([small_scene], small_shots, plain, device="cpu").model
    assert not any(name.startswith("restorer") for name in model.state_dict())


def test_what_does_not_fit_is_said(
    small_scene: Scene, small_shots: Shots, small_umd: UmdResult, config: Config, pretrained: UmdResult
) -> None:
    with pytest.raises(InputDataError, match="it restores pixels, and the head reads a network that restores bands"):
        train_flc([small_scene], small_shots, config, umd=small_umd, device="cpu")
    other = config.model_copy(update={"logistic": config.logistic.model_copy(update={"sizes": (3,)})})
    with pytest.raises(InputDataError, match=r"logistic.sizes \[3, 5\] there, \[3\] here"):
        train_flc([small_scene], small_shots, other, umd=pretrained, device="cpu")
    with pytest.raises(UsageError, match="`tokens` and `restored`"):
        load_config("best", None, ["logistic.views=[tokens,restored]"])
    with pytest.raises(UsageError, match="bands.mask_ratio"):
        load_config("best", None, ["bands.mask_ratio=1"])


def test_the_plan_is_that_of_the_bands(small_scene: Scene, config: Config) -> None:
    plan = plan_umd([small_scene], config)
    assert (plan["tokens"], plan["steps"], plan["batch"], plan["windows"]) == ("bands", STEPS, 64, 24 * 30)
