"""The model of unsupervised mask diffusion: the shared encoder and one light decoder per modality (eqs. 7 and 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastdiffclip.model.encoder import Block, ImageEncoder
from fastdiffclip.model.linear import Linear
from fastdiffclip.model.residual_norm import ResidualNorm
from fastdiffclip.model.stem import initialise, sincos_positions

if TYPE_CHECKING:
    from fastdiffclip.config import ModelConfig


class Decoder(nn.Module):
    """Class token, visible tokens at their places and mask tokens elsewhere to clean windows ``(B, L, C)``."""

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.embed = Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(sincos_positions(config.window, width))
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, config.attention, "decoder")
            for _ in range(config.decoder_depth)
        )
        self.norm = ResidualNorm(width)
        self.restore = Linear(width, channels)

    def forward(self, encoded_BVD: Tensor, ids_BV: Tensor) -> Tensor:
        """Restore windows from ``(B, 1 + V, D)`` encoded tokens (class token first)."""
        tokens_BVD = self.embed(encoded_BVD)
        batch, _, width = tokens_BVD.shape
        full_BLD = self.mask_token.to(tokens_BVD.dtype).expand(batch, len(self.positions) - 1, width)
        index = ids_BV.long()[:, :, None].expand(-1, -1, width)
        full_BLD = full_BLD.scatter(1, index, tokens_BVD[:, 1:])
        x, added = torch.cat([tokens_BVD[:, :1], full_BLD], dim=1) + self.positions, None
        for block in self.blocks:
            x, added = block(x, added)
        restored: Tensor = self.restore(self.norm(x, added)[1][:, 1:].contiguous())
        return restored


class MaskDiffusion(nn.Module):
    """Encoder and decoders of UMD.

    Args:
        channels: name of each modality to its number of channels, in order.
        config: sizes.
        seed: of the initial weights, drawn on the CPU.
    """

    def __init__(self, channels: Mapping[str, int], config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.encoder = ImageEncoder(channels, config)
        self.decoders = nn.ModuleDict({name: Decoder(count, config) for name, count in channels.items()})
        generator = torch.Generator().manual_seed(seed)
        initialise(self, generator)
        with torch.no_grad():
            self.encoder.class_tokens.normal_(0.0, 0.02, generator=generator)

    def forward(self, x_BVC: Sequence[Tensor], ids_BV: Sequence[Tensor], timestep_B: Tensor) -> list[Tensor]:
        """Clean windows ``(B, L, C_m)`` per modality from noised visible tokens ``(B, V, C_m)``."""
        encoded_MBVD = self.encoder(x_BVC, ids_BV, timestep_B)
        return [self.decoders[name](encoded_MBVD[m], ids_BV[m]) for m, name in enumerate(self.encoder.names)]
