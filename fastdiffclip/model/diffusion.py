"""The diffusion process of UMD: linear beta schedule, q(x_t | x_0), posterior, reverse sampler.

Equations follow DDPM (Ho et al. 2020) as DiffCLIP uses it; the network predicts x_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class NoiseSchedule:
    """Linear beta schedule over T steps, tables in float64 on the CPU.

    Attributes:
        betas: ``(T,)``; abar: ``(T,)``, cumulative products of ``1 - beta``.
    """

    def __init__(self, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> None:
        self.betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
        self.abar = torch.cumprod(1.0 - self.betas, 0)

    def __len__(self) -> int:
        return len(self.betas)

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """``(T, 2)`` float32: sqrt(abar) and sqrt(1 - abar), as the kernels read it."""
        return torch.stack([self.abar.sqrt(), (1.0 - self.abar).sqrt()], dim=1).float().to(device)

    def posterior(self, timestep: int, previous: int) -> tuple[float, float, float]:
        """Coefficients of ``q(x_previous | x_t, x_0)``: factor of x_0, factor of x_t, standard deviation.

        ``previous`` is any earlier step (respacing), or -1 for x_0 itself.
        """
        abar_t = float(self.abar[timestep])
        abar_p = float(self.abar[previous]) if previous >= 0 else 1.0
        beta = 1.0 - abar_t / abar_p
        of_x0 = math.sqrt(abar_p) * beta / (1.0 - abar_t)
        of_xt = math.sqrt(abar_t / abar_p) * (1.0 - abar_p) / (1.0 - abar_t)
        return of_x0, of_xt, math.sqrt(max(0.0, beta * (1.0 - abar_p) / (1.0 - abar_t)))


def respaced(start: int, steps: int) -> list[int]:
    """At most ``steps`` timesteps from ``start`` down to 0, evenly spaced, each once; a single one is ``start``."""
    if start <= 0 or steps <= 1:
        return [max(0, start)]
    grid = torch.linspace(start, 0, min(steps, start + 1), dtype=torch.float64).round().long().tolist()
    return sorted(set(grid), reverse=True)


def sample_reverse(
    predict_x0: Callable[[list[Tensor], int], list[Tensor]],
    x_start: list[Tensor],
    ids: list[Tensor],
    schedule: NoiseSchedule,
    start: int,
    steps: int = 50,
    noise: Callable[[int, int], Tensor] | None = None,
) -> list[Tensor]:
    """Restore masked, noised windows by the reverse process (eqs. 3 to 6).

    Args:
        predict_x0: from the visible tokens per modality ``(B, V, C)`` at a timestep to clean windows ``(B, L, C)``.
        x_start: visible tokens at timestep ``start``, per modality.
        ids: ``(B, V)`` visible ids per modality.
        schedule: the noise schedule.
        start: timestep of ``x_start``.
        steps: number of network calls at most.
        noise: ``noise(step, modality)`` gives normals like ``x_start[modality]``; None for the deterministic mean.

    Returns:
        Clean windows ``(B, L, C)`` per modality, float32.
    """
    times = respaced(start, steps)
    x = [part.float() for part in x_start]
    clean: list[Tensor] = []
    for number, timestep in enumerate(times):
        clean = [part.float() for part in predict_x0(x, timestep)]
        previous = times[number + 1] if number + 1 < len(times) else -1
        of_x0, of_xt, deviation = schedule.posterior(timestep, previous)
        for m, part in enumerate(x):
            index = ids[m].long()[:, :, None].expand(-1, -1, part.shape[2])
            x[m] = of_x0 * clean[m].gather(1, index) + of_xt * part
            if noise is not None and previous >= 0:
                x[m] = x[m] + deviation * noise(timestep, m)
    return clean


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep, then Linear, SiLU, Linear: ``(B,)`` int64 to ``(B, width)``."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.register_buffer("frequencies", torch.exp(-math.log(10000.0) * torch.arange(half) / half), persistent=False)
        self.inner, self.outer = nn.Linear(2 * half, width), nn.Linear(width, width)

    def forward(self, timestep_B: Tensor) -> Tensor:
        angle = timestep_B.float()[:, None] * self.frequencies
        return self.outer(nn.functional.silu(self.inner(torch.cat([angle.cos(), angle.sin()], dim=1))))
