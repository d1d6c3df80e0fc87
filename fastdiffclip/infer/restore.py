"""Restore masked, noised windows with a pretrained model by the reverse process: a test of it, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiffclip.config import Config
from fastdiffclip.kernels import FlatScene, philox, visible_noise
from fastdiffclip.kernels.visible_noise import visible_count
from fastdiffclip.model.diffusion import NoiseSchedule, sample_reverse
from fastdiffclip.model.mask_diffusion import MaskDiffusion


@dataclass(frozen=True)
class Restored:
    """Windows per modality, ``(B, L, C)`` float32.

    Attributes:
        noised: what the model saw, NaN where a token was masked.
        restored: the end of the reverse process. clean: the truth.
    """

    noised: list[Tensor]
    restored: list[Tensor]
    clean: list[Tensor]


@torch.no_grad()
def restore_windows(
    model: MaskDiffusion,
    flat: Sequence[FlatScene],
    centres: Tensor,
    config: Config,
    *,
    seed: int = 0,
    start: int = 400,
    steps: int = 50,
) -> Restored:
    """Mask and noise windows up to timestep ``start``, then walk back in at most ``steps`` network calls.

    Args:
        flat: the scenes, one per modality. centres: ``(B, 3)`` int64.
        start: in [0, T). seed: of masks and noise (purpose ``SAMPLER`` on the way back).
    """
    window, tokens = config.model.window, config.model.tokens
    schedule = NoiseSchedule(config.umd.timesteps, config.umd.beta_start, config.umd.beta_end)
    times = torch.full((len(centres),), start, dtype=torch.int64, device=centres.device)
    rng = philox.rng_state(seed, 0, 0, centres.device)
    visible = visible_count(tokens, config.umd.mask_ratio)
    noised, ids, clean = [], [], []
    for m, scene in enumerate(flat):
        x, chosen = visible_noise(
            scene,
            centres,
            times,
            schedule.table(centres.device),
            rng,
            window=window,
            visible=visible,
            modality=m,
        )
        noised.append(x)
        ids.append(chosen)
        clean.append(visible_noise(scene, centres, None, None, rng, window=window, visible=tokens, modality=m)[0])

    def predict_x0(x: list[Tensor], timestep: int) -> list[Tensor]:
        return model(x, ids, torch.full_like(times, timestep))

    def noise(timestep: int, m: int) -> Tensor:
        at = philox.rng_state(seed, timestep, 0, centres.device)
        return philox.normals(at, ids[m], flat[m].channels, m, philox.SAMPLER)

    restored = sample_reverse(predict_x0, noised, ids, schedule, start, steps, noise)
    shown = []
    for m, x in enumerate(noised):
        picture = torch.full_like(clean[m], float("nan"))
        shown.append(picture.scatter(1, ids[m].long()[:, :, None].expand_as(x), x))
    return Restored(shown, restored, clean)
