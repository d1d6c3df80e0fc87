"""The modality-shared vision transformer of both stages.

Shape suffixes: M modalities, B windows, V tokens given (visible or all), C channels, D width, L tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdiffclip.model.attention import Attention
from fastdiffclip.model.diffusion import TimestepEmbedding
from fastdiffclip.model.linear import Linear
from fastdiffclip.model.stem import Stem, sincos_positions
from fastdiffclip.runtime import CPU_MICRO_BATCH

if TYPE_CHECKING:
    from fastdiffclip.config import ModelConfig


class Block(nn.Module):
    """Pre-norm transformer block: attention and a two-layer GELU network, each with a residual."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, backend: str, role: str) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, backend, role)
        self.expand, self.contract = Linear(width, hidden), Linear(hidden, width)

    def forward(self, x_BLD: Tensor, queries: int | None = None, lean: bool = False) -> Tensor:
        """``(B, L, D)``; with ``queries`` only the first that many tokens, with ``lean`` as :func:`recomputed` does."""
        call = recomputed if lean else _called
        attended = self.attention(self.norm1(x_BLD), queries)
        x_BLD = x_BLD[:, :queries] + attended
        hidden_BLD = call(lambda x: self.expand(self.norm2(x)), x_BLD)
        return x_BLD + call(lambda x: self.contract(nn.functional.gelu(x)), hidden_BLD)


def recomputed(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``layer(x)``; on a CPU what its last linear layer reads is computed again for the gradients instead of kept."""
    if not torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return layer(x)
    from torch.utils.checkpoint import checkpoint

    # It stops once everything is there that the backward pass reads: the last product is not taken twice.
    result: Tensor = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
    return result


def _called(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return layer(x)


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
        """Class tokens of clean, complete windows, modalities side by side: ``(B, M * D)``.

        On a CPU the windows go through in parts, which halves what is held besides what the gradients need.
        """
        if x_BLC[0].device.type != "cpu" or torch.compiler.is_compiling() or len(x_BLC[0]) <= CPU_MICRO_BATCH:
            return self.class_features_of([self.stems[name](x) for name, x in zip(self.names, x_BLC, strict=True)])
        parts = zip(*(x.split(CPU_MICRO_BATCH) for x in x_BLC), strict=True)
        return torch.cat([self.class_features(part) for part in parts])

    def class_features_of(self, tokens_BLD: Sequence[Tensor]) -> Tensor:
        """:meth:`class_features` of windows whose pixels went through the stems already, ``(B, L, D)`` per modality.

        The last block computes its class token only.
        """
        zero_B = torch.zeros(len(tokens_BLD[0]), dtype=torch.int64, device=tokens_BLD[0].device)
        x = self.arrange(tokens_BLD, None, zero_B)
        for block in self.blocks[:-1]:
            x = block(x, lean=True)
        class_MBD = self.norm(self.blocks[-1](x, queries=1, lean=True))[:, 0].unflatten(0, (len(self.names), -1))
        return class_MBD.transpose(0, 1).flatten(1)

    def layer_features_of(self, tokens_BLD: Sequence[Tensor], mean: bool = False) -> tuple[Tensor, Tensor]:
        """Class tokens of every layer and the mean of the last layer's pixel tokens, final norm applied to both.

        Args:
            tokens_BLD: as in :meth:`class_features_of`.
            mean: False leaves the mean out, and the last block then computes its class token only.

        Returns:
            ``(B, depth * M * D)``, layer by layer with the modalities side by side, and ``(B, M * D)`` or ``(B, 0)``.
        """
        zero_B = torch.zeros(len(tokens_BLD[0]), dtype=torch.int64, device=tokens_BLD[0].device)
        x = self.arrange(tokens_BLD, None, zero_B)
        layers = []
        for block in self.blocks[:-1]:
            x = block(x)
            layers.append(self._side_by_side(self.norm(x[:, 0])))
        x = self.norm(self.blocks[-1](x, queries=None if mean else 1))
        layers.append(self._side_by_side(x[:, 0]))
        pooled = self._side_by_side(x[:, 1:].mean(dim=1)) if mean else layers[0][:, :0]
        return torch.cat(layers, dim=1), pooled

    def _side_by_side(self, x_ND: Tensor) -> Tensor:
        """``(M * B, D)`` as ``(B, M * D)``."""
        return x_ND.unflatten(0, (len(self.names), -1)).transpose(0, 1).flatten(1)
