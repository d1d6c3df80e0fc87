"""The stem works pixel by pixel, positions start as 2-D sine and cosine, weights come from a seed."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastdiffclip.model.stem import Stem, initialise, sincos_positions


def test_layers_in_order() -> None:
    stem = Stem(7, 16)
    assert [(m.in_features, m.out_features) for m in stem.modules() if isinstance(m, nn.Linear)] == [
        (7, 16), (16, 16), (16, 16),
    ]  # fmt: skip
    x = torch.randn(3, 5, 7)
    gelu = nn.functional.gelu
    expected = stem.norm(stem.token(gelu(stem.second(gelu(stem.first(x))))))
    torch.testing.assert_close(stem(x), expected)
    assert expected.shape == (3, 5, 16)


def test_each_pixel_for_itself() -> None:
    stem, x = Stem(7, 16), torch.randn(4, 9, 7)
    whole = stem(x)
    for b in range(4):
        torch.testing.assert_close(stem(x[b, [2, 5]]), whole[b, [2, 5]])


def test_positions() -> None:
    window, width = 5, 16
    grid = sincos_positions(window, width)
    assert grid.shape == (26, 16) and not grid[0].any()
    for row in range(window):
        for col in range(window):
            half = []
            for place in (row, col):
                angles = [place * 10000 ** (-k / 4) for k in range(4)]
                half += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(grid[1 + row * window + col], torch.tensor(half), rtol=1e-5, atol=1e-6)
    assert torch.cdist(grid, grid).fill_diagonal_(1.0).min() > 0.1


def test_initial_weights_come_from_the_generator_alone() -> None:
    def weights(seed: int, global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        stem = Stem(7, 16)
        initialise(stem, torch.Generator().manual_seed(seed))
        return torch.cat([p.detach().flatten() for p in stem.parameters()])

    assert torch.equal(weights(0, 1), weights(0, 2))
    assert not torch.equal(weights(0, 1), weights(1, 1))
    stem = Stem(7, 16)
    initialise(stem, torch.Generator().manual_seed(0))
    bound = math.sqrt(6 / 23)
    assert 0.9 * bound < stem.first.weight.abs().max() <= bound and not stem.first.bias.any()
    assert torch.equal(stem.norm.weight, torch.ones(16))
