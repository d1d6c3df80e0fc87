"""Stage two, few-shot language-driven classification: image and text aligned on a few labels (eqs. 10 to 16)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiffclip import checkpoint
from fastdiffclip.config import Config, load_config
from fastdiffclip.errors import InputDataError
from fastdiffclip.model.encoder import ImageEncoder
from fastdiffclip.model.language_classifier import LanguageClassifier
from fastdiffclip.model.logistic_classifier import LogisticClassifier
from fastdiffclip.model.prompts import ClassText, resolve_prompts
from fastdiffclip.model.spectral_denoiser import SpectralDenoiser
from fastdiffclip.model.text import load_tokenizer
from fastdiffclip.runtime import Compute, Progress, memory_budget, silent
from fastdiffclip.scene.labelled import Labelled
from fastdiffclip.scene.prepare import FrontEnd, fit_front_end
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import ClassInfo, Scene
from fastdiffclip.scene.windows import require_whole_windows
from fastdiffclip.train.contrastive import FlcStep, images_of, learning_rate, new_classifier, text_embeddings
from fastdiffclip.train.data import scene_records
from fastdiffclip.train.logistic import Head, feature_statistics, fit_head, new_logistic, window_features
from fastdiffclip.train.loop import (
    Loop,
    fingerprint,
    run_folder,
    settings_of,
    start_engine,
    weights_digest,
    weights_of,
)
from fastdiffclip.train.new_class import KnownClasses, NewClass, require_text_space, unlabelled_features
from fastdiffclip.train.umd import UmdResult
from fastdiffclip.train.world import World


@dataclass(frozen=True)
class Shots:
    """The labelled windows of a run, and what they are called.

    Attributes:
        centres: ``(n, 3)`` int64 (scene, row, column). labels: ``(n,)`` int64 class values.
        classes: every class that is trained, in the order of the text embeddings.
        prompts: one text per class.
        added: classes that join from their texts once the others are trained.
    """

    centres: np.ndarray
    labels: np.ndarray
    classes: tuple[ClassInfo, ...]
    prompts: tuple[str, ...]
    added: tuple[NewClass, ...] = ()

    def indices(self) -> Tensor:
        """``(n,)`` int64 position of each label in ``classes``."""
        position = {item.value: index for index, item in enumerate(self.classes)}
        missing = sorted({int(value) for value in self.labels} - set(position))
        if missing:
            raise InputDataError(f"labels {missing} belong to no class; the class table has {sorted(position)}")
        return torch.tensor([position[int(value)] for value in self.labels], dtype=torch.int64)


@dataclass(frozen=True)
class FlcResult:
    """A trained classifier; ``text_embeddings`` are ``(K, E)`` float32, one row per class, of length 1.

    Under ``flc.head=logistic`` the row of a class without shots is shorter. ``added``: what the manifest says of the
    last ones, which joined from their texts.
    """

    model: LanguageClassifier | LogisticClassifier
    front_end: FrontEnd
    config: Config
    classes: tuple[ClassInfo, ...]
    prompts: tuple[str, ...]
    text_embeddings: Tensor
    losses: list[float]
    folder: Path | None
    added: tuple[dict[str, Any], ...] = ()


def class_prompts(scenes: Sequence[Scene], labelled: Labelled, choice: str | None) -> tuple[str, ...]:
    """One text per class that occurs; ``choice`` as ``--prompts`` takes it."""
    texts = [ClassText(item.value, item.name, item.description) for item in labelled.classes]
    return tuple(resolve_prompts(choice, texts, tuple(scenes[0].modalities)))


def check_fits(umd: UmdResult, config: Config) -> None:
    """Raise :class:`InputDataError` when a pretrained network is of another kind, other sizes or another front end."""
    ours, theirs = config.model, umd.config.model
    names = ("window", "width", "depth", "heads", "mlp_ratio") if config.tokens == "pixels" else ("window",)
    different = []
    if umd.config.tokens != config.tokens:
        different.append(f"it restores {umd.config.tokens}, and the head reads a network that restores {config.tokens}")
    elif config.tokens == "bands" and umd.config.mean_sizes != config.mean_sizes:
        different.append(f"logistic.sizes {list(umd.config.mean_sizes)} there, {list(config.mean_sizes)} here")
    different += [
        f"model.{name} {getattr(theirs, name)} there, {getattr(ours, name)} here"
        for name in names
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if umd.config.prepare != config.prepare:
        different.append(f"prepare {umd.config.prepare} there, {config.prepare} here")
    elif config.prepare == "mnf" and umd.config.components != config.components:
        different.append(f"components {umd.config.components} there, {config.components} here")
    if different:
        raise InputDataError(
            f"the UMD run {umd.folder or ''} does not fit: {'; '.join(different)}; give the same settings to both"
        )


def train_flc(
    scenes: Sequence[Scene],
    shots: Shots,
    config: Config | None = None,
    *,
    umd: UmdResult | None = None,
    source: WindowSource | None = None,
    seed: int = 0,
    out: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    tensorboard: bool = False,
    extra: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> FlcResult:
    """Train the classifier on a few labelled windows.

    Args:
        scenes: opened scenes.
        shots: labelled windows, classes and prompts.
        config: settings; None for the default recipe.
        umd: pretrained encoder and its front end; None starts from random weights.
        source: windows of the scenes through the front end of ``umd`` (or of the settings), when there is one already.
        seed: of weights and order.
        out: folder of the run; None leaves nothing on disk.
        device, resume, tensorboard, progress: as in :func:`fastdiffclip.train.umd.train_umd`.
        extra: more entries for the manifest.

    Raises:
        UsageError, InputDataError, ResourceError: see their messages.
    """
    config = config or load_config()
    world, where = World.from_environment(), Compute.choose(device, config.precision, config.compile)
    if umd is not None:
        check_fits(umd, config)
    if shots.added:
        require_text_space(config, "the settings have")
    world.start(where.device)
    with run_folder(out, resume, world) as folder:
        source = source or window_source(scenes, config, umd)
        front_end = source.front_end
        network = None if umd is None else umd.network
        identity = fingerprint(
            "flc",
            settings_of(config),
            seed,
            [s.sha256 for s in scenes],
            shots.centres.tolist(),
            shots.labels.tolist(),
            [item.value for item in shots.classes],
            shots.prompts,
            None if network is None else weights_digest(network),
            *((item.info.value, item.prompt, item.share) for item in shots.added),
        )
        if config.flc.head == "logistic":
            loop = Loop("train-flc", 0, lambda step: 1.0, folder, identity, progress)
            result, head = _fit_logistic(loop, source, shots, config, network, seed, resume, where)
            if folder is not None and world.main and head is not None:
                _save(result, scenes, shots, seed, umd, loop, {**(extra or {}), "head": head.summary()})
            return result
        steps_per_epoch = math.ceil(len(shots.labels) / min(config.flc.batch, len(shots.labels)))
        loop = Loop(
            "train-flc",
            config.flc.epochs * steps_per_epoch,
            lambda step: learning_rate(config.flc, step // steps_per_epoch),
            folder,
            identity,
            progress,
            tensorboard,
        )
        first, found = loop.resume() if resume else (0, {})
        model = new_classifier(front_end, config, umd, seed).to(where.device)
        images = images_of(model, source.windows(shots.centres), config, where)
        if config.flc.encoder == "frozen":
            model.encoder.requires_grad_(False)
        engine = start_engine(model, found, config, config.flc, where, world)
        step = FlcStep(images, shots.indices(), shots.prompts, config, seed, where, engine)
        losses = loop.run(step, engine, step.batch, first, step.order)
        trained = new_classifier(front_end, config, None, seed)
        trained.load_state_dict(weights_of(engine.state()))
        trained.to(where.device).eval()
        texts = text_embeddings(trained, shots.prompts, where)
        result = FlcResult(trained, front_end, config, shots.classes, shots.prompts, texts, losses, folder)
        if folder is not None and world.main:
            _save(result, scenes, shots, seed, umd, loop, extra or {})
        return result


def _fit_logistic(
    loop: Loop,
    source: WindowSource,
    shots: Shots,
    config: Config,
    network: ImageEncoder | SpectralDenoiser | None,
    seed: int,
    resume: bool,
    where: Compute,
) -> tuple[FlcResult, Head | None]:
    """The run of ``flc.head=logistic``; its head is None where the finished run in the folder was taken."""
    model = new_logistic(source.front_end, config, network, seed).to(where.device)
    found = loop.resume()[1] if resume else {}
    head = None
    about: tuple[dict[str, Any], ...] = ()
    if found and loop.folder is not None:
        model.take(weights_of(found))
        texts = found["text_embeddings"]
        about = tuple(checkpoint.read_checked(loop.folder / checkpoint.MANIFEST).get("added", ()))
    else:
        loop.progress(loop.stage, 0, 2, "features")
        statistics = feature_statistics(model, source, config, where)
        features = window_features(model, source.windows(shots.centres), where)
        loop.progress(loop.stage, 1, 2, "fit")
        own = shots.indices().numpy()
        head = fit_head(features, own, shots.centres, shots.prompts, statistics, config.logistic)
        texts = head.put_into(model)
        if shots.added:
            known = KnownClasses.of(model, texts, shots.classes, shots.prompts)
            known = known.with_described(shots.added, unlabelled_features(model, source, config, where), config)
            texts, about = known.put_into(model), known.added
        loop.losses = head.losses
        loop.write_log()
        loop.progress(loop.stage, 2, 2, f"loss {head.losses[-1]:.4f}")
    classes = (*shots.classes, *(item.info for item in shots.added))
    prompts = (*shots.prompts, *(item.prompt for item in shots.added))
    result = FlcResult(model, source.front_end, config, classes, prompts, texts, loop.losses, loop.folder, about)
    return result, head


def window_source(scenes: Sequence[Scene], config: Config, umd: UmdResult | None) -> WindowSource:
    """Windows of the scenes as the classifier sees them: through the front end of ``umd``, or a newly fitted one."""
    require_whole_windows(scenes, config.model.window)
    front_end = umd.front_end if umd is not None else fit_front_end(config.prepare, scenes, config.components)
    return WindowSource(scenes, front_end, config.model.window, memory_budget(config.memory_gib))


def _save(
    result: FlcResult,
    scenes: Sequence[Scene],
    shots: Shots,
    seed: int,
    umd: UmdResult | None,
    loop: Loop,
    extra: dict[str, Any],
) -> None:
    assert result.folder is not None
    tensors = {f"model.{name}": tensor for name, tensor in result.model.state_dict().items()}
    tensors |= {f"front_end.{name}": torch.from_numpy(array) for name, array in result.front_end.to_arrays().items()}
    tensors["text_embeddings"] = result.text_embeddings
    manifest = {
        "front_end": result.front_end.to_meta(),
        "classes": [
            {"value": c.value, "name": c.name, "description": c.description, "colour": c.colour} for c in result.classes
        ],
        "prompts": list(result.prompts),
        "tokenizer_sha256": hashlib.sha256(load_tokenizer().text.encode()).hexdigest(),
        "umd": None if umd is None else str(umd.folder),
        "shots": [[*map(int, centre), int(label)] for centre, label in zip(shots.centres, shots.labels, strict=True)],
        **({"added": list(result.added)} if result.added else {}),
        **extra,
    }
    checkpoint.save_run(
        result.folder, tensors, result.config, stage="flc", seed=seed, scenes=scene_records(scenes),
        losses=result.losses, identity=loop.identity, first_step=loop.seconds_to_first_step, extra=manifest,
    )  # fmt: skip
