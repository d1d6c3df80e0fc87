"""Stage one, unsupervised mask diffusion: restore masked, noised windows of the unlabelled scenes (eqs. 1 to 9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiffclip import checkpoint
from fastdiffclip.config import Config, load_config
from fastdiffclip.kernels import masked_mse, philox, visible_noise
from fastdiffclip.kernels.visible_noise import visible_count
from fastdiffclip.model.diffusion import NoiseSchedule
from fastdiffclip.model.encoder import ImageEncoder
from fastdiffclip.model.mask_diffusion import MaskDiffusion
from fastdiffclip.model.spectral_denoiser import SpectralDenoiser
from fastdiffclip.runtime import Compute, Progress, memory_budget, silent
from fastdiffclip.scene.prepare import FrontEnd, fit_front_end
from fastdiffclip.scene.store import Scene
from fastdiffclip.train import spectral
from fastdiffclip.train.data import UmdData, device_room, scene_records
from fastdiffclip.train.engine import Engine
from fastdiffclip.train.loop import (
    EpochOrder,
    Loop,
    fingerprint,
    run_folder,
    settings_of,
    slices,
    start_engine,
    weights_of,
)
from fastdiffclip.train.prefetch import fitting_data
from fastdiffclip.train.world import World


@dataclass(frozen=True)
class UmdResult:
    """A pretrained model.

    Attributes:
        model: encoder and decoders, or the network over bands where ``config.tokens`` says so.
        front_end: the spectral front end it was trained behind.
        losses: loss of each step. folder: the run's folder, or None.
        seconds_to_first_step: from the start of the process; None where this process took no step.
    """

    model: MaskDiffusion | SpectralDenoiser
    front_end: FrontEnd
    config: Config
    losses: list[float]
    folder: Path | None
    seconds_to_first_step: float | None = None

    @property
    def network(self) -> ImageEncoder | SpectralDenoiser:
        """The part that a classifier takes over."""
        return self.model.encoder if isinstance(self.model, MaskDiffusion) else self.model


class UmdStep:
    """Loss and gradients of one optimiser step, as far as they are this process's.

    The random numbers are addressed by (seed, step, place in the batch), so micro-batches and processes change nothing
    but the order in which gradients are added.
    """

    def __init__(self, data: UmdData, config: Config, seed: int, where: Compute, engine: Engine) -> None:
        self.data, self.config, self.where, self.engine = data, config, where, engine
        umd = config.umd
        schedule = NoiseSchedule(umd.timesteps, umd.beta_start, umd.beta_end).table()
        if not umd.noise:  # a single timestep, at which tokens are what they were
            schedule = torch.tensor([[1.0, 0.0]])
        self.schedule = schedule.to(where.device)
        self.visible = visible_count(config.model.tokens, config.umd.mask_ratio)
        self.batch = min(config.umd.batch, len(data.centres))
        self.order = EpochOrder(seed, len(data.centres), self.batch, where.device, engine.world)
        self.micro = where.micro_batch(config.umd.micro_batch, self.order.rows)

    def __call__(self, step: Tensor) -> Tensor:
        """This process's part of the loss of ``step``, a scalar int64 tensor on the device; gradients are added up."""
        centres, rows, total = self.data.batch(self.order, step)
        device = self.where.device
        times = philox.uniform_integers(self.order.rng(step), philox.TIMESTEP, self.order.rows, len(self.schedule))
        loss = torch.zeros((), device=device)
        # Padding alone is not worth a pass, but only a CPU knows without waiting, and processes go in step.
        alone = device.type == "cpu" and self.engine.world.size == 1
        parts = list(slices(self.order.rows, self.micro, int(rows) if alone else self.order.rows))
        for part in parts:
            last = part is parts[-1]
            real = (rows - part.start).clamp(min=0, max=part.stop - part.start)
            with self.engine.micro(last):
                share = self._loss(centres[part], times[part], self.order.rng(step, part.start), real, total)
                self.engine.backward(share, last)
            loss += share.detach()
        return loss

    def _loss(self, centres: Tensor, times: Tensor, rng: Tensor, real: Tensor, total: Tensor) -> Tensor:
        umd, window = self.config.umd, self.config.model.window
        noisy, ids = [], []
        for m, scene in enumerate(self.data.flat):
            x, chosen = visible_noise(
                scene,
                centres,
                times,
                self.schedule,
                rng,
                window=window,
                visible=self.visible,
                modality=m,
                valid_rows=real,
            )
            noisy.append(x)
            ids.append(chosen)
        with self.where.autocast():
            restored = self.engine.network(noisy, ids, times)
        shares = [
            masked_mse(
                restored[m], scene, centres, ids[m], window=window, masked_weight=umd.masked_weight,
                visible_weight=umd.visible_weight, valid_rows=real, total_rows=total,
            )
            for m, scene in enumerate(self.data.flat)
        ]  # fmt: skip
        return torch.stack(shares).sum()


def train_umd(
    scenes: Sequence[Scene],
    config: Config | None = None,
    *,
    seed: int = 0,
    out: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    tensorboard: bool = False,
    progress: Progress = silent,
) -> UmdResult:
    """Pretrain on scenes without labels.

    Args:
        scenes: opened scenes with the same modalities; all their pixels may be seen, labels are not read.
        config: settings; None for the default recipe.
        seed: of weights, windows, masks, noise and order.
        out: folder of the run, written there; None leaves nothing on disk.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        tensorboard: write event files into the folder, beside log.csv.
        resume: go on from the newest checkpoint in ``out``; a finished run there is taken as it is.
        progress: see :data:`fastdiffclip.runtime.Progress`.

    Raises:
        UsageError, InputDataError, ResourceError: see their messages.
    """
    config = config or load_config()
    world, where = World.from_environment(), Compute.choose(device, config.precision, config.compile)
    world.start(where.device)
    with run_folder(out, resume, world) as folder:
        front_end = fit_front_end(config.prepare, scenes, config.components)
        budget = memory_budget(config.memory_gib)
        if config.tokens == "bands":
            pool = spectral.pool_of_means(scenes, front_end, config, seed, budget)
            total, rate = config.bands.steps, partial(spectral.learning_rate, config.bands)
        else:
            data = fitting_data(scenes, front_end, config, seed, where.device, world, budget, device_room(where.device))
            total = config.umd.epochs * math.ceil(len(data.centres) / min(config.umd.batch, len(data.centres)))
            rate = partial(_learning_rate, config.umd.lr, total)
        identity = fingerprint("umd", settings_of(config), seed, [scene.sha256 for scene in scenes])
        loop = Loop("train-umd", total, rate, folder, identity, progress, tensorboard)
        first, found = loop.resume() if resume else (0, {})
        model = new_model(front_end, config, seed)
        if config.tokens == "bands":
            engine = start_engine(model, found, config, config.bands, where, world)
            bands = spectral.SpectralStep(pool, config.bands, seed, where, engine)
            losses = loop.run(bands, engine, bands.batch, first, bands.order)
        else:
            engine = start_engine(model, found, config, config.umd, where, world)
            step = UmdStep(data, config, seed, where, engine)
            with data.feed(first, total) as feed:
                losses = loop.run(step, engine, step.batch, first, step.order, feed)
        trained = new_model(front_end, config, seed)
        trained.load_state_dict(weights_of(engine.state()))
        result = UmdResult(trained.to(where.device), front_end, config, losses, folder, loop.seconds_to_first_step)
        if folder is not None and world.main:
            save(result, scenes, seed, loop.identity)
        return result


def new_model(front_end: FrontEnd, config: Config, seed: int = 0) -> MaskDiffusion | SpectralDenoiser:
    """The model that the settings pretrain, with fresh weights."""
    if config.tokens == "bands":
        return SpectralDenoiser(front_end.channels, seed)
    return MaskDiffusion(front_end.channels, config.model, seed)


def _learning_rate(highest: float, total: int, step: int) -> float:
    return highest * 0.5 * (1.0 + math.cos(math.pi * step / total))


def save(result: UmdResult, scenes: Sequence[Scene], seed: int, identity: str) -> None:
    """Write the finished run into its folder."""
    assert result.folder is not None
    tensors = {f"model.{name}": tensor for name, tensor in result.model.state_dict().items()}
    tensors |= {f"front_end.{name}": torch.from_numpy(array) for name, array in result.front_end.to_arrays().items()}
    extra: dict[str, Any] = {"front_end": result.front_end.to_meta()}
    checkpoint.save_run(
        result.folder, tensors, result.config, stage="umd", seed=seed, scenes=scene_records(scenes),
        losses=result.losses, identity=identity, first_step=result.seconds_to_first_step, extra=extra,
    )  # fmt: skip


def load_umd(folder: Path) -> UmdResult:
    """Read a finished UMD run back. Raises :class:`InputDataError`."""
    run = checkpoint.load_run(Path(folder), "umd")
    front_end = FrontEnd.from_parts(*run.front_end_parts())
    model = new_model(front_end, run.config)
    model.load_state_dict(run.part("model"))
    return UmdResult(model, front_end, run.config, run.tensors[checkpoint.LOSSES].tolist(), Path(folder))
