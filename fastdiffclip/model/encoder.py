"""The modality-shared vision transformer of both stages.

Shape suffixes: M modalities, B windows, V tokens given (visible or all), C channels, D width, L tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdiffclip.kernels import gelu
from fastdiffclip.model.attention import Attention
from fastdiffclip.model.diffusion import TimestepEmbedding
from fastdiffclip.model.linear import Linear
from fastdiffclip.model.residual_norm import ResidualNorm
from fastdiffclip.model.stem import Stem, sincos_positions
from fastdiffclip.runtime import CPU_MICRO_BATCH

if TYPE_CHECKING:
    from fastdiffclip.config import ModelConfig


class Block(nn.Module):
    """Pre-norm transformer block: attention and a two-layer GELU network, each with a residual.

    The second residual is left to the norm behind the block, which adds it in its own pass over the tokens.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, backend: str, role: str) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1, self.norm2 = ResidualNorm(width), ResidualNorm(width)
        self.attention = Attention(width, heads, backend, role)
        self.expand, self.contract = Linear(width, hidden), Linear(hidden, width)

    def forward(
        self, x_BLD: Tensor, added_BLD: Tensor | None = None, queries: int | None = None, lean: bool = False
    ) -> tuple[Tensor, Tensor]:
        """From the stream and what is to be added to it, each ``(B, L, D)``, to the same behind the block.

        With ``queries`` only of the first that many tokens, with ``lean`` keeping less, see :func:`recomputed`.
        """
        call = recomputed if lean else _called
        x_BLD, normed_BLD = self.norm1(x_BLD, added_BLD)
        attended_BLD = self.attention(normed_BLD, queries)
        x_BLD, normed_BLD = self.norm2(x_BLD[:, :queries], attended_BLD)
        read = normed_BLD.dtype
        hidden_BLD = call(self.expand, normed_BLD, lambda: self.norm2(x_BLD, out_dtype=read)[1])
        return x_BLD, call(self.contract, gelu(hidden_BLD), lambda: gelu(hidden_BLD))


def recomputed(layer: Callable[[Tensor], Tensor], x: Tensor, again: Callable[[], Tensor]) -> Tensor:
    """``layer(x)``; on a CPU ``x`` is not kept for the gradients, which read ``again()``, equal to it, instead."""
    if not torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return layer(x)
    start, size, dtype = x.data_ptr(), x.numel(), x.dtype

    def keep(tensor: Tensor) -> Tensor | tuple[tuple[int, ...], tuple[int, ...]]:
        if (tensor.data_ptr(), tensor.numel(), tensor.dtype) == (start, size, dtype):
            return tuple(tensor.shape), tensor.stride()
        return tensor

    def find(kept: Tensor | tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return again().as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(keep, find):
        return layer(x)


def _called(layer: Callable[[Tensor], Tensor], x: Tensor, again: Callable[[], Tensor]) -> Tensor:
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
        self.norm = ResidualNorm(config.width)

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
        x, added = self.embed(x_BVC, ids_BV, timestep_B), None
        for block in self.blocks:
            x, added = block(x, added)
        return self._normed(x, added).unflatten(0, (len(self.names), -1))

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
        x, added = self.arrange(tokens_BLD, None, zero_B), None
        for block in self.blocks[:-1]:
            x, added = block(x, added, lean=True)
        x, added = self.blocks[-1](x, added, queries=1, lean=True)
        return self._side_by_side(self._normed(x, added)[:, 0])

    def layer_features_of(self, tokens_BLD: Sequence[Tensor], mean: bool = False) -> tuple[Tensor, Tensor]:
        """Class tokens of every layer and the mean of the last layer's pixel tokens, final norm applied to both.

        Args:
            tokens_BLD: as in :meth:`class_features_of`.
            mean: False leaves the mean out, and the last block then computes its class token only.

        Returns:
            ``(B, depth * M * D)``, layer by layer with the modalities side by side, and ``(B, M * D)`` or ``(B, 0)``.
        """
        zero_B = torch.zeros(len(tokens_BLD[0]), dtype=torch.int64, device=tokens_BLD[0].device)
        x, added = self.arrange(tokens_BLD, None, zero_B), None
        layers = []
        for block in self.blocks[:-1]:
            x, added = block(x, added)
            layers.append(self._side_by_side(self._normed(x[:, 0], added[:, 0])))
        x = self._normed(*self.blocks[-1](x, added, queries=None if mean else 1))
        layers.append(self._side_by_side(x[:, 0]))
        pooled = self._side_by_side(x[:, 1:].mean(dim=1)) if mean else layers[0][:, :0]
        return torch.cat(layers, dim=1), pooled

    def _normed(self, x: Tensor, added: Tensor | None) -> Tensor:
        """The final norm of ``x + added``, in the dtype of ``x``: what leaves the encoder may be kept as features."""
        normed: Tensor = self.norm(x, added, out_dtype=x.dtype)[1]
        return normed

    def _side_by_side(self, x_ND: Tensor) -> Tensor:
        """``(M * B, D)`` as ``(B, M * D)``."""
        return x_ND.unflatten(0, (len(self.names), -1)).transpose(0, 1).flatten(1)
