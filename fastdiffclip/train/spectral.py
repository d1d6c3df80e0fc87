"""Spectral mask diffusion, pretraining over bands: window means are restored from a noised part of their channels.

The pool holds the means over every size that the head reads, of windows drawn from all unlabelled pixels. A step takes
rows of it at random, masks groups of channels, adds noise of a random level, and weighs the squared error by
1 + 1 / s^2 where a channel is visible, so that all levels teach alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiffclip.config import BandsConfig, Config
from fastdiffclip.kernels import philox
from fastdiffclip.model.spectral_denoiser import NOISE_LEVELS, SpectralDenoiser, drawn_groups
from fastdiffclip.model.window_features import means_of_windows
from fastdiffclip.runtime import Compute
from fastdiffclip.scene.prepare import FrontEnd
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.data import unlabelled_centres
from fastdiffclip.train.engine import Engine
from fastdiffclip.train.loop import EpochOrder

READ = 4096  # windows that are read at once
WARM_UP = 100  # steps over which the learning rate rises


class RandomOrder(EpochOrder):
    """Every step draws its samples anew, each independently; no sample is padding but those of a short share."""

    def __call__(self, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        drawn = philox.uniform_integers(self.rng(step), philox.BAND_DRAW, self.rows, self.samples)
        return drawn, *self.counts(step)

    def counts(self, step: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.full_like(step, self.batch)
        return (total - self.first).clamp(min=0, max=self.rows), total


def pool_of_means(scenes: Sequence[Scene], front_end: FrontEnd, config: Config, seed: int, budget: int) -> Tensor:
    """``(S * n, C)`` float32: means over each of the S sizes around n unlabelled pixels, all modalities side by side.

    Raises:
        InputDataError: no pixel is valid in all modalities.
    """
    centres = unlabelled_centres(scenes, config.bands.samples, config.model.window, seed)
    source, sizes = WindowSource(scenes, front_end, config.model.window, budget), config.mean_sizes
    parts = []
    for first in range(0, len(centres), READ):
        windows = [torch.from_numpy(part) for part in source.windows(centres[first : first + READ])]
        parts.append(means_of_windows(windows, sizes).unflatten(1, (len(sizes), -1)).flatten(0, 1))
    return torch.cat(parts)


def learning_rate(settings: BandsConfig, step: int) -> float:
    """Rate of a step: it rises over the first ones, and falls along a cosine to 0."""
    return settings.lr * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1.0 + math.cos(math.pi * step / settings.steps))


class SpectralStep:
    """Loss and gradients of one optimiser step, as far as they are this process's.

    The random numbers are addressed by (seed, step, place in the batch), as those of pixels are.

    Args:
        pool: ``(n, C)`` float32 clean means, on any device.
    """

    def __init__(self, pool: Tensor, settings: BandsConfig, seed: int, where: Compute, engine: Engine) -> None:
        self.pool, self.settings, self.engine = pool.to(where.device), settings, engine
        self.batch = min(settings.batch, len(pool))
        self.order = RandomOrder(seed, len(pool), self.batch, where.device, engine.world)
        model = engine.model
        assert isinstance(model, SpectralDenoiser)
        self.group, self.groups = model.group, model.groups

    def __call__(self, step: Tensor) -> Tensor:
        """This process's part of the loss of ``step``, a scalar int64 tensor on the device; gradients are added up."""
        chosen, rows, total = self.order(step)
        clean_BC = self.pool[chosen]
        noisy_BC, level_B, visible_BG = self.noised(clean_BC, step)
        with self.engine.micro(last=True):
            restored_BC = self.engine.network(noisy_BC, level_B, visible_BG)
            weight_BC = torch.where(visible_BG.index_select(1, self.group) > 0, 1.0 + level_B[:, None] ** -2, 1.0)
            loss_B = (weight_BC * (restored_BC - clean_BC).square()).mean(dim=1)
            real = torch.arange(len(loss_B), device=loss_B.device) < rows
            loss = torch.where(real, loss_B, 0.0).sum() / total
            self.engine.backward(loss, last=True)
        return loss.detach()

    def noised(self, clean_BC: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x + s eps`` (B, C), the levels s (B,), log-uniform, and the visible groups (B, G) of a step."""
        rng, (rows, channels) = self.order.rng(step), clean_BC.shape
        visible_BG = drawn_groups(rng, philox.BAND_MASK, rows, self.groups, self.settings.mask_ratio)
        zero = torch.zeros((), dtype=torch.int64, device=clean_BC.device)
        word_B = philox.words(rng, philox.BAND_LEVEL, philox.row_positions(rng, rows), zero, zero)[0]
        low, high = np.log(NOISE_LEVELS)
        level_B = torch.exp(low + (high - low) * word_B.double() * 2.0**-32).float()
        eps_BC = philox.normals(rng, zero.expand(rows, 1), channels, 0, philox.BAND_NOISE).squeeze(1)
        return clean_BC + level_B[:, None] * eps_BC, level_B, visible_BG
