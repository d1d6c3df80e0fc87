"""Mask diffusion over the bands of a spectrum: restores the mean of a window from a noised part of its channels.

    x_s = x + s eps,    a = 1 / (1 + s^2)          (in the words of DDPM: abar = a)
    net([sqrt(a) x_s v, 1 - v], log s)             v: which groups of channels are visible
    restored = a x_s + s sqrt(a) net   where visible,    net   where masked

Tokens are groups of neighbouring components of one modality. The restored mean, averaged over fixed masks, lies nearer
to what the scene's spectra have in common than the mean itself does: classes are told apart from fewer shots.

Shape suffixes: B rows, C channels of all modalities, G groups, D width, Q fixed masks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastdiffclip.kernels import gelu, philox
from fastdiffclip.model.linear import Linear
from fastdiffclip.model.residual_norm import ResidualNorm

GROUP = 5  # channels of a group, about
WIDTH, DEPTH, WAVES = 192, 3, 8
NOISE_LEVELS = (0.2, 2.5)  # of training; s = 1 is the spread of a channel of the front end
READ_LEVEL, READ_MASKS, READ_RATIO = 0.3, 16, 0.5  # noise level, masks and share of masked groups of `restored`


def channel_groups(channels: Mapping[str, int]) -> Tensor:
    """``(C,)`` int64: the group of every channel; groups stay within a modality and differ by one channel at most."""
    groups: list[int] = []
    for count in channels.values():
        first, parts = (groups[-1] + 1 if groups else 0), max(1, round(count / GROUP))
        groups += [first + place * parts // count for place in range(count)]
    return torch.tensor(groups)


def drawn_groups(rng: Tensor, purpose: int, rows: int, groups: int, masked: float) -> Tensor:
    """``(rows, groups)`` float32, 1 where a group is visible; each is masked with probability ``masked``."""
    token = torch.arange(groups, dtype=torch.int64, device=rng.device)
    zero = torch.zeros((), dtype=torch.int64, device=rng.device)
    word = philox.words(rng, purpose, philox.row_positions(rng, rows)[:, None], token, zero)[0]
    return (word >= round(masked * 2**32)).float()


class Gelu(nn.Module):
    """:func:`fastdiffclip.kernels.gelu`."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


class Block(nn.Sequential):
    """Norm and a two-layer GELU network with a residual, which the norm behind the block adds in its own pass."""

    def __init__(self, width: int) -> None:
        super().__init__(ResidualNorm(width), Linear(width, width), Gelu(), Linear(width, width))

    def forward(self, x_BD: Tensor, added_BD: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        norm, expand, bend, contract = self
        x_BD, normed_BD = norm(x_BD, added_BD)
        return x_BD, contract(bend(expand(normed_BD)))


class SpectralDenoiser(nn.Module):
    """The network: trained in float32; `restored` multiplies as autocast has it.

    Args:
        channels: name of each modality to its number of channels, in order.
        seed: of the weights, drawn on the CPU.
    """

    group: Tensor
    masks: Tensor
    frequencies: Tensor

    def __init__(self, channels: Mapping[str, int], seed: int = 0) -> None:
        super().__init__()
        group = channel_groups(channels)
        self.channels, self.groups = len(group), int(group.max()) + 1
        masks = drawn_groups(philox.rng_state(0), philox.BAND_READ, READ_MASKS, self.groups, READ_RATIO)
        self.register_buffer("group", group, persistent=False)
        self.register_buffer("masks", masks, persistent=False)
        self.register_buffer("frequencies", torch.arange(WAVES) * 0.5, persistent=False)
        self.input = Linear(self.channels + self.groups, WIDTH)
        self.level = Linear(1 + 2 * WAVES, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(DEPTH))
        self.output = nn.ModuleList([ResidualNorm(WIDTH), Linear(WIDTH, self.channels)])
        generator = torch.Generator().manual_seed(seed)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                bound = part.in_features**-0.5
                for tensor in (part.weight, part.bias):
                    nn.init.uniform_(tensor, -bound, bound, generator=generator)

    def forward(self, noisy_BC: Tensor, level_B: Tensor, visible_BG: Tensor) -> Tensor:
        """``(B, C)`` restored spectra.

        Args:
            noisy_BC: ``x + s eps``; masked channels are not looked at. level_B: s, above 0.
            visible_BG: 1 where a group is visible, else 0.
        """
        with torch.autocast(noisy_BC.device.type, enabled=False):
            return self._run(noisy_BC, level_B, visible_BG)

    def _run(self, noisy_BC: Tensor, level_B: Tensor, visible_BG: Tensor) -> Tensor:
        """The same with products as autocast has them; what is added up stays in float32."""
        seen_BC = visible_BG.index_select(1, self.group)
        logarithm_B1 = level_B.log()[:, None]
        waves = logarithm_B1 * torch.exp2(self.frequencies)
        level = self.level(torch.cat([logarithm_B1, waves.sin(), waves.cos()], dim=1))
        share_B1 = (1.0 + level_B.square()[:, None]).reciprocal()
        hidden = self.input(torch.cat([noisy_BC * share_B1.sqrt() * seen_BC, 1.0 - visible_BG], dim=1)) + level
        hidden, added = hidden.float(), None
        for block in self.blocks:
            hidden, added = block(hidden, added)
        norm, output = self.output
        found: Tensor = output(norm(hidden, added)[1]).float()
        near = share_B1 * noisy_BC + level_B[:, None] * share_B1.sqrt() * found
        return torch.where(seen_BC > 0, near, found)

    def restored(self, means_BC: Tensor) -> Tensor:
        """``(B, C)`` float32 of clean means: the mean of what every fixed mask gives, nothing random."""
        means_BC = means_BC.float()
        level_B = torch.full_like(means_BC[:, 0], READ_LEVEL)
        total = torch.zeros_like(means_BC)
        for visible_G in self.masks:
            total += self._run(means_BC, level_B, visible_G.expand(len(means_BC), -1))
        return total / len(self.masks)
