"""The modality-shared vision transformer of both stages.

Shape suffixes: M modalities, B windows, V tokens given (visible or all), C channels, D width, L tokens of a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdiffclip.model.attention import Attention
from fastdiffclip.model.diffusion import TimestepEmbedding
from fastdiffclip.model.stem import Stem, sincos_positions

if TYPE_CHECKING:
    from fastdiffclip.config import ModelConfig


class Block(nn.Module):
    """Pre-norm transformer block: attention and a two-layer GELU network, each with a residual."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, backend: str, role: str) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, backend, role)
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_BLD: Tensor, queries: int | None = None) -> Tensor:
        attended = self.attention(self.norm1(x_BLD), queries)
        x_BLD = x_BLD[:, :queries] + attended
        return x_BLD + self.contract(nn.functional.gelu(self.expand(self.norm2(x_BLD))))


class ImageEncoder(nn.Module):
    """Stems, one class token per modality, positions, timestep, shared blocks and final norm (eq. 7).

    Args:
        channels: name of each modality to its number of channels, in order.
        config: sizes.
    """

    def __init__(self, channels: Mapping[str, int], config: ModelConfig) -> None:
        super().__init__()
        self.names, self.width = tuple(channels), config.width
        self.stems = nn.ModuleDict({name: Stem(count, config.width) for name, count in channels.items()})
        self.class_tokens = nn.Parameter(torch.zeros(len(self.names), config.width))
        self.positions = nn.Parameter(sincos_positions(config.window, config.width))
        self.timestep = TimestepEmbedding(config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_ratio, config.attention, "encoder")
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)

    def embed(self, x_BVC: Sequence[Tensor], ids_BV: Sequence[Tensor] | None, timestep_B: Tensor) -> Tensor:
        """Tokens of all modalities before the blocks: ``(M * B, 1 + V, D)``."""
        return self.arrange(
            [self.stems[name](x) for name, x in zip(self.names, x_BVC, strict=True)], ids_BV, timestep_B
        )

    def arrange(self, tokens_BVD: Sequence[Tensor], ids_BV: Sequence[Tensor] | None, timestep_B: Tensor) -> Tensor:
        """:meth:`embed` from tokens that the stems made, ``(B, V, D)`` per modality: class tokens and positions."""
        time_BD = self.timestep(timestep_B)
        parts = []
        for m, tokens in enumerate(tokens_BVD):
            place = self.positions[1:] if ids_BV is None else self.positions[1:][ids_BV[m].long()]
            head_BD = self.class_tokens[m] + time_BD + self.positions[0]
            parts.append(torch.cat([head_BD[:, None].to(tokens.dtype), tokens + place], dim=1))
        return torch.cat(parts)

    def forward(self, x_BVC: Sequence[Tensor], ids_BV: Sequence[Tensor] | None, timestep_B: Tensor) -> Tensor:
        """Encoded class token and tokens: ``(M, B, 1 + V, D)``.

        Args:
            x_BVC: per modality ``(B, V, C_m)``.
            ids_BV: per modality ``(B, V)`` token ids; None when all L tokens are given in order.
            timestep_B: ``(B,)`` int64.
        """
        x = self.embed(x_BVC, ids_BV, timestep_B)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).unflatten(0, (len(self.names), -1))

    def class_features(self, x_BLC: Sequence[Tensor]) -> Tensor:
        """Class tokens of clean, complete windows, modalities side by side: ``(B, M * D)``."""
        return self.class_features_of([self.stems[name](x) for name, x in zip(self.names, x_BLC, strict=True)])

    def class_features_of(self, tokens_BLD: Sequence[Tensor]) -> Tensor:
        """:meth:`class_features` of windows whose pixels went through the stems already, ``(B, L, D)`` per modality.

        The last block computes its class token only.
        """
        zero_B = torch.zeros(len(tokens_BLD[0]), dtype=torch.int64, device=tokens_BLD[0].device)
        x = self.arrange(tokens_BLD, None, zero_B)
        for block in self.blocks[:-1]:
            x = block(x)
        class_MBD = self.norm(self.blocks[-1](x, queries=1))[:, 0].unflatten(0, (len(self.names), -1))
        return class_MBD.transpose(0, 1).flatten(1)
