"""Few-shot language-driven classification: targets, shots, frozen encoders, and taking a run up again."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdiffclip import checkpoint
from fastdiffclip.config import Config
from fastdiffclip.errors import InputDataError, InterruptedRunError, UsageError
from fastdiffclip.kernels.reference import unit
from fastdiffclip.model.text import load_tokenizer
from fastdiffclip.scene.labelled import labelled_pixels
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.contrastive import frozen_features, new_classifier
from fastdiffclip.train.flc import FlcResult, Shots, check_fits, class_prompts, train_flc, window_source
from fastdiffclip.train.umd import UmdResult

from .flc_settings import CPU, with_flc

# Of this code at its first release, on the small scene of conftest.py; a change of these is a change of the method.
GOLDEN = {
    "pairwise": [2.4996462, 1.5483522, 2.2468204, 1.0695803, 1.7751944, 0.963009, 1.5319123, 0.72977227],
    "class": [1.7329289, 1.3958807, 2.2906234, 1.1899953, 1.4699787, 1.1814824, 1.338185, 0.85384309],
}


def weights(result: FlcResult) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


@pytest.mark.parametrize("targets", ["pairwise", "class"])
def test_golden_losses(
    small_scene: Scene, small_config: Config, small_shots: Shots, small_umd: UmdResult, targets: str
) -> None:
    config = with_flc(small_config, targets=targets, epochs=4)
    result = train_flc([small_scene], small_shots, config, umd=small_umd, device="cpu")
    assert result.losses == pytest.approx(GOLDEN[targets], rel=1e-4)


@pytest.mark.parametrize("targets", ["pairwise", "class"])
@pytest.mark.parametrize("encoder", ["finetune", "frozen"])
def test_it_learns(
    small_scene: Scene, small_config: Config, small_shots: Shots, small_umd: UmdResult, targets: str, encoder: str
) -> None:
    """In each epoch's mean loss, and in the classes of the shots themselves."""
    config = with_flc(small_config, targets=targets, encoder=encoder, epochs=30)
    result = train_flc([small_scene], small_shots, config, umd=small_umd, device="cpu")
    assert np.mean(result.losses[-2:]) < np.mean(result.losses[:2])
    source = WindowSource([small_scene], result.front_end, 3, 1 << 30)
    features = frozen_features(result.model, source.windows(small_shots.centres), CPU)
    with torch.no_grad():
        scores = unit(result.model.head(features)) @ result.text_embeddings.T
    assert torch.equal(scores.argmax(1), small_shots.indices())


def test_finetuning_moves_the_encoder_and_freezing_does_not(
    small_scene: Scene, small_config: Config, small_shots: Shots, small_umd: UmdResult
) -> None:
    before = small_umd.model.encoder.state_dict()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    for encoder in ("frozen", "finetune"):
        config = with_flc(small_config, encoder=encoder, epochs=2)
        result = train_flc([small_scene], small_shots, config, umd=small_umd, device="cpu")
        same = {name: torch.equal(t, kept[name]) for name, t in result.model.encoder.state_dict().items()}
        assert all(same.values()) if encoder == "frozen" else not any(v for n, v in same.items() if "norm" not in n)
        fresh = new_classifier(small_umd.front_end, config, small_umd, 0)
        assert not torch.equal(result.model.head.weight, fresh.head.weight)
        assert float(result.model.log_scale.detach()) != float(fresh.log_scale.detach())
    assert all(torch.equal(t, kept[name]) for name, t in small_umd.model.encoder.state_dict().items())


@pytest.mark.parametrize("encoder", ["finetune", "frozen"])
def test_a_shared_window_source_changes_nothing(
    small_scene: Scene, small_config: Config, small_shots: Shots, small_umd: UmdResult, encoder: str
) -> None:
    config = with_flc(small_config, encoder=encoder, epochs=4)
    source = window_source([small_scene], config, small_umd)
    given = train_flc([small_scene], small_shots, config, umd=small_umd, source=source, device="cpu")
    disk = config.model_copy(update={"memory_gib": 1e-9})
    for read in (config, disk):
        result = train_flc([small_scene], small_shots, read, umd=small_umd, device="cpu")
        assert given.losses == result.losses and torch.equal(weights(given), weights(result))
        assert torch.equal(given.text_embeddings, result.text_embeddings)


@pytest.mark.parametrize("targets", ["pairwise", "class"])
def test_a_class_without_shots_can_still_be_predicted(
    small_scene: Scene, small_config: Config, small_shots: Shots, small_umd: UmdResult, targets: str
) -> None:
    there = small_shots.labels != 2
    shots = replace(small_shots, centres=small_shots.centres[there], labels=small_shots.labels[there])
    result = train_flc([small_scene], shots, with_flc(small_config, targets=targets), umd=small_umd, device="cpu")
    assert result.text_embeddings.shape[0] == 3 and np.isfinite(result.losses).all()


def test_labels_without_a_class(
    small_scene: Scene, small_config: Config, small_shots: Shots, small_umd: UmdResult, tmp_path: Path
) -> None:
    shots = replace(small_shots, labels=np.where(small_shots.labels == 2, 7, small_shots.labels))
    with pytest.raises(InputDataError, match=r"labels \[7\] belong to no class; the class table has \[1, 2, 4\]"):
        train_flc([small_scene], shots, small_config, umd=small_umd, device="cpu")


def test_one_class_one_shot(small_scene: Scene, small_config: Config, small_shots: Shots, small_umd: UmdResult) -> None:
    shots = Shots(small_shots.centres[:1], small_shots.labels[:1], small_shots.classes[:1], small_shots.prompts[:1])
    result = train_flc([small_scene], shots, small_config, umd=small_umd, device="cpu")
    assert np.isfinite(result.losses).all() and result.text_embeddings.shape == (1, 16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.width": 32}, "model.width 16 there, 32 here"),
        ({"model.window": 5, "model.depth": 1}, "model.window 3 there, 5 here; model.depth 2 there, 1 here"),
        ({"prepare": "mnf"}, "prepare standard there, mnf here"),
    ],
)
def test_a_pretrained_model_that_does_not_fit(
    small_scene: Scene,
    small_config: Config,
    small_shots: Shots,
    small_umd: UmdResult,
    change: dict[str, Any],
    said: str,
) -> None:
    tree = small_config.model_dump()
    for key, value in change.items():
        *section, name = key.split(".")
        (tree[section[0]] if section else tree)[name] = value
    with pytest.raises(InputDataError, match=f"does not fit: {said}; give the same settings to both"):
        train_flc([small_scene], small_shots, Config.model_validate(tree), umd=small_umd, device="cpu")


def test_components_must_fit_where_they_count(small_config: Config, small_umd: UmdResult) -> None:
    check_fits(small_umd, small_config.model_copy(update={"components": 5}))
    mnf = small_config.model_copy(update={"prepare": "mnf"})
    pretrained = replace(small_umd, config=mnf)
    check_fits(pretrained, mnf)
    with pytest.raises(InputDataError, match="components 30 there, 5 here"):
        check_fits(pretrained, mnf.model_copy(update={"components": 5}))


def test_one_seed_one_result(
    small_scene: Scene, small_config: Config, small_shots: Shots, small_umd: UmdResult
) -> None:
    runs = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        runs.append(train_flc([small_scene], small_shots, small_config, umd=small_umd, seed=seed, device="cpu"))
    assert runs[0].losses == runs[1].losses and torch.equal(weights(runs[0]), weights(runs[1]))
    assert runs[0].losses != runs[2].losses


@pytest.mark.parametrize("encoder", ["finetune", "frozen"])
@pytest.mark.parametrize("at", [3, 24])
def test_an_interrupted_run_ends_in_the_same_weights(
    small_scene: Scene,
    small_config: Config,
    small_shots: Shots,
    small_umd: UmdResult,
    tmp_path: Path,
    encoder: str,
    at: int,
) -> None:
    def interrupt(task: str, done: int, total: int, note: str = "") -> None:
        if done == at:
            os.kill(os.getpid(), signal.SIGINT)

    config, out = with_flc(small_config, encoder=encoder), tmp_path / "run"
    whole = train_flc([small_scene], small_shots, config, umd=small_umd, device="cpu")
    with pytest.raises(InterruptedRunError, match=f"after step {at} of 24") as raised:
        train_flc([small_scene], small_shots, config, umd=small_umd, out=out, device="cpu", progress=interrupt)
    assert raised.value.exit_code == 130
    for other in (
        {"shots": replace(small_shots, labels=small_shots.labels[::-1].copy())},
        {"shots": replace(small_shots, prompts=("a", "b", "c"))},
        {"umd": None},
        {"seed": 1},
    ):
        settings: dict[str, Any] = {"shots": small_shots, "umd": small_umd, "seed": 0} | other
        with pytest.raises(UsageError, match="other settings"):
            train_flc([small_scene], config=config, out=out, device="cpu", resume=True, **settings)
    resumed = train_flc([small_scene], small_shots, config, umd=small_umd, out=out, device="cpu", resume=True)
    assert resumed.losses == whole.losses and torch.equal(weights(resumed), weights(whole))
    assert torch.equal(resumed.text_embeddings, whole.text_embeddings)


def test_a_finished_run(flc_run: FlcResult, small_shots: Shots, small_scene: Scene) -> None:
    assert flc_run.folder is not None
    run = checkpoint.load_run(flc_run.folder, "flc")
    assert [entry["value"] for entry in run.manifest["classes"]] == [1, 2, 4]
    assert run.manifest["classes"][1] == {
        "value": 2, "name": "roof", "description": "a red tile roof", "colour": [200, 60, 40],
    }  # fmt: skip
    assert run.manifest["prompts"] == list(small_shots.prompts) and len(run.manifest["tokenizer_sha256"]) == 64
    shots = np.array(run.manifest["shots"])
    assert np.array_equal(shots[:, :3], small_shots.centres) and np.array_equal(shots[:, 3], small_shots.labels)
    assert run.manifest["scenes"][0]["sha256"] == small_scene.sha256
    assert torch.equal(run.tensors["text_embeddings"], flc_run.text_embeddings)


def test_prompts_name_the_classes(small_scene: Scene) -> None:
    labelled = labelled_pixels([small_scene])
    for choice in (None, "p1", "p5"):
        prompts = class_prompts([small_scene], labelled, choice)
        assert len(prompts) == 3 and all(
            item.name in text for item, text in zip(labelled.classes, prompts, strict=True)
        )
    assert class_prompts([small_scene], labelled, None) == class_prompts([small_scene], labelled, "p5")
    with pytest.raises(UsageError):
        class_prompts([small_scene], labelled, "p9")


def test_temperature_reaches_the_model(small_config: Config, small_umd: UmdResult) -> None:
    model = new_classifier(small_umd.front_end, with_flc(small_config, temperature=0.5, max_logit_scale=1.5), None, 0)
    assert float(model.logit_scale.detach()) == pytest.approx(1.5)
    assert float(model.log_scale.detach()) == pytest.approx(math.log(2.0))
    assert model.text.token_embedding.num_embeddings == load_tokenizer().vocab_size
