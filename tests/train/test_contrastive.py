"""A step of the contrastive head: eq. 16 and class targets, padding, the rate, and what an encoder gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastdiffclip.config import Config, FlcConfig
from fastdiffclip.kernels import philox
from fastdiffclip.kernels.reference import unit
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.contrastive import FlcStep, frozen_features, learning_rate, new_classifier
from fastdiffclip.train.flc import FlcResult, Shots, window_source
from fastdiffclip.train.loop import start_engine
from fastdiffclip.train.umd import UmdResult
from fastdiffclip.train.world import World

from .flc_settings import CPU, with_flc


def step_of(scene: Scene, config: Config, shots: Shots, umd: UmdResult) -> FlcStep:
    model = new_classifier(umd.front_end, config, umd, 0)
    windows = WindowSource([scene], umd.front_end, 3, 1 << 30).windows(shots.centres)
    images = [torch.from_numpy(part) for part in windows]
    engine = start_engine(model, {}, config, config.flc, CPU, World())
    return FlcStep(images, shots.indices(), shots.prompts, config, 0, CPU, engine)


def embeddings(step: FlcStep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z (n, E), t (K, E) normalised and s (n, K) of all shots, float64."""
    with torch.no_grad():
        z = unit(step.engine.model.embed_image(step.images).double())  # type: ignore[arg-type]
        t = unit(step.engine.model.embed_text(step.tokens, step.end).double())
    return z, t, (step.engine.model.logit_scale.detach().double() * z @ t.T)


@pytest.mark.parametrize("counts", [(4, 4, 4), (4, 1, 2), (3, 0, 2)])
def test_the_loss_of_a_batch_is_equation_16(
    small_scene: Scene, small_config: Config, small_shots: Shots, small_umd: UmdResult, counts: tuple[int, ...]
) -> None:
    """Written over N image-text pairs, every text standing as often as its class."""
    take = np.concatenate([np.flatnonzero(small_shots.labels == v)[:n] for v, n in zip((1, 2, 4), counts, strict=True)])
    shots = replace(small_shots, centres=small_shots.centres[take], labels=small_shots.labels[take])
    step = step_of(small_scene, with_flc(small_config, batch=len(take)), shots, small_umd)
    _, _, s = embeddings(step)
    k = shots.indices()
    pairs = s[:, k]  # (N, N): image i, text of pair j
    expected = 0.5 * (-(pairs.log_softmax(1).diagonal().mean()) - pairs.log_softmax(0).diagonal().mean())
    assert float(step(torch.tensor(0))) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("counts", [(4, 4, 4), (4, 1, 2), (3, 0, 2)])
def test_the_loss_with_class_targets(
    small_scene: Scene, small_config: Config, small_shots: Shots, small_umd: UmdResult, counts: tuple[int, ...]
) -> None:
    take = np.concatenate([np.flatnonzero(small_shots.labels == v)[:n] for v, n in zip((1, 2, 4), counts, strict=True)])
    shots = replace(small_shots, centres=small_shots.centres[take], labels=small_shots.labels[take])
    step = step_of(small_scene, with_flc(small_config, batch=len(take), targets="class"), shots, small_umd)
    _, _, s = embeddings(step)
    k = shots.indices()
    to_text = -s.log_softmax(1)[torch.arange(len(k)), k].mean()
    to_image = torch.stack([-s.log_softmax(0)[k == c, c].mean() for c in k.unique()]).mean()
    assert float(step(torch.tensor(0))) == pytest.approx(float(0.5 * (to_text + to_image)), rel=1e-5)


def test_padding_weighs_nothing(
    small_scene: Scene, small_config: Config, small_shots: Shots, small_umd: UmdResult
) -> None:
    """12 shots in batches of 8: the second batch is padded from 4; alone, unpadded, it gives the same."""
    step = step_of(small_scene, small_config, small_shots, small_umd)
    loss = float(step(torch.tensor(1)))
    found = torch.cat([p.grad.flatten() for p in step.engine.model.parameters() if p.grad is not None])
    order = philox.permutation(philox.rng_state(0, 0), philox.SHUFFLE, 12)[8:].numpy()
    shots = replace(small_shots, centres=small_shots.centres[order], labels=small_shots.labels[order])
    alone = step_of(small_scene, small_config, shots, small_umd)
    assert alone.batch == 4
    assert float(alone(torch.tensor(0))) == pytest.approx(loss, rel=1e-6)
    expected = torch.cat([p.grad.flatten() for p in alone.engine.model.parameters() if p.grad is not None])
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_rate_drops_at_the_milestones() -> None:
    rates = [learning_rate(FlcConfig(epochs=24, lr=1.0), epoch) for epoch in range(24)]
    assert rates == pytest.approx([1.0] * 16 + [0.1] * 5 + [0.01] * 3)
    paper = FlcConfig(epochs=150, lr=1e-4)
    drops = [e for e in range(1, 150) if learning_rate(paper, e) < learning_rate(paper, e - 1)]
    assert drops == [100, 132]  # the first epochs at or past 100 and 131.25


def test_frozen_features_do_not_depend_on_the_batch(
    small_scene: Scene, small_config: Config, small_umd: UmdResult
) -> None:
    model = new_classifier(small_umd.front_end, small_config, small_umd, 0)
    centres = np.stack([np.zeros(100, np.int64), np.arange(100) % 24, np.arange(100) % 30], axis=1)
    windows = window_source([small_scene], small_config, small_umd).windows(centres)
    whole = frozen_features(model, windows, CPU)
    assert whole.shape == (100, 32) and not whole.requires_grad
    for rows in (1, 64, 65):
        assert torch.equal(frozen_features(model, [part[:rows] for part in windows], CPU), whole[:rows])


def test_text_embeddings_are_normalised_and_of_every_class(flc_run: FlcResult) -> None:
    assert flc_run.text_embeddings.shape == (3, 16) and flc_run.text_embeddings.dtype == torch.float32
    torch.testing.assert_close(flc_run.text_embeddings.norm(dim=1), torch.ones(3))
    assert [item.value for item in flc_run.classes] == [1, 2, 4]
