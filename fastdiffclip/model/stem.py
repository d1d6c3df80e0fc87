"""From a pixel's channels to a token: Linear, GELU, Linear, GELU, token embedding, LayerNorm; no batch statistics.

Works pixel by pixel, so masking first, micro-batches and projecting a scene once all give the same numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastdiffclip.kernels import gelu
from fastdiffclip.model.linear import Linear


class Stem(nn.Module):
    """Projection of one modality: ``(..., C)`` to ``(..., width)``."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first, self.second = Linear(channels, width), Linear(width, width)
        self.token = Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = gelu(self.second(gelu(self.first(x))))
        return self.norm(self.token(x))


def sincos_positions(window: int, width: int) -> Tensor:
    """2-D sine-cosine positions of a window, a zero row for the class token first: ``(1 + P * P, width)``."""
    quarter = width // 4
    frequency = torch.exp(-math.log(10000.0) * torch.arange(quarter, dtype=torch.float64) / quarter)
    axis = torch.arange(window, dtype=torch.float64)[:, None] * frequency
    waves = torch.cat([axis.sin(), axis.cos()], dim=1)
    rows = waves[:, None, :].expand(window, window, -1)
    cols = waves[None, :, :].expand(window, window, -1)
    grid = torch.cat([rows, cols], dim=2).reshape(window * window, 4 * quarter)
    return torch.cat([torch.zeros(1, 4 * quarter, dtype=torch.float64), grid]).float()


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Xavier-uniform linear weights, zero biases, unit norms, drawn on the CPU from ``generator``."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            bound = math.sqrt(6.0 / (part.in_features + part.out_features))
            with torch.no_grad():
                part.weight.uniform_(-bound, bound, generator=generator)
                if part.bias is not None:
                    part.bias.zero_()
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
