"""Window means: over a grid as over single windows, to the last bit wherever the pixel lies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.config import Config, LogisticConfig, ModelConfig
from fastdiffclip.model.window_features import FeatureLayout, means_of_grid, means_of_windows, unit_means

SIZES = (1, 3, 5)


def windows_of(grid: torch.Tensor, valid: torch.Tensor, radius: int) -> torch.Tensor:
    """``(h * w, L, C)`` windows, an invalid neighbour replaced by the centre pixel."""
    height, width = grid.shape[0] - 2 * radius, grid.shape[1] - 2 * radius
    found = []
    for row in range(radius, radius + height):
        for col in range(radius, radius + width):
            part = (slice(row - radius, row + radius + 1), slice(col - radius, col + radius + 1))
            found.append(torch.where(valid[part][..., None], grid[part], grid[row, col]).flatten(0, 1))
    return torch.stack(found)


@given(st.integers(1, 6), st.integers(1, 7), st.integers(1, 4), st.integers(2, 3), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_a_grid_gives_what_its_windows_give(height: int, width: int, channels: int, radius: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = height + 2 * radius, width + 2 * radius
    valid = torch.rand(shape, generator=generator) > 0.3
    grid = torch.randn((*shape, channels), generator=generator) * valid[..., None]
    means = means_of_grid(grid, valid, SIZES, radius)
    expected = means_of_windows([windows_of(grid, valid, radius)], SIZES)
    torch.testing.assert_close(torch.cat([m.flatten(0, 1) for m in means], 1), expected, rtol=1e-5, atol=1e-5)
    everything = torch.ones(shape, dtype=torch.bool)
    for plain, masked in zip(
        means_of_grid(grid, None, SIZES, radius), means_of_grid(grid, everything, SIZES, radius), strict=True
    ):
        assert torch.equal(plain, masked)


def test_the_bits_of_a_mean_do_not_depend_on_its_place() -> None:
    grid = torch.randn(20, 23, 5, generator=torch.Generator().manual_seed(1))
    whole = means_of_grid(grid, None, SIZES, 2)
    for top, left, height, width in ((0, 0, 1, 1), (3, 4, 7, 2), (15, 18, 1, 1)):
        part = means_of_grid(grid[top : top + height + 4, left : left + width + 4], None, SIZES, 2)
        for one, other in zip(part, whole, strict=True):
            assert torch.equal(one, other[top : top + height, left : left + width])


def test_modalities_stand_side_by_side_and_each_size_has_length_one() -> None:
    windows = [torch.randn(4, 25, channels) for channels in (3, 2)]
    means = means_of_windows(windows, (3, 5))
    assert means.shape == (4, 10)
    torch.testing.assert_close(means[:, 5:8], windows[0].mean(1))
    torch.testing.assert_close(means[:, 3:5], windows[1].view(4, 5, 5, 2)[:, 1:4, 1:4].mean((1, 2)))
    rows = unit_means(means, 2).unflatten(1, (2, 5))
    torch.testing.assert_close(rows.norm(dim=2), torch.ones(4, 2))
    assert torch.equal(unit_means(torch.zeros(1, 10), 2), torch.zeros(1, 10))


@pytest.mark.parametrize(
    ("window", "views", "sizes"),
    [(7, ("means",), (3, 5)), (3, ("means",), (3,)), (1, ("means",), (1,)), (5, ("means", "pixel"), (1, 3, 5))],
)
def test_sizes_that_do_not_fit_are_left_out(window: int, views: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    config = Config(model=ModelConfig(window=window), logistic=LogisticConfig(views=views))  # type: ignore[arg-type]
    layout = FeatureLayout.of({"hsi": 4, "lidar": 1}, config)
    assert (layout.sizes, layout.means, layout.total) == (sizes, 5 * len(sizes), 5 * len(sizes))
    assert not layout.reads_tokens
    assert [layout.mean_of(size) for size in sizes] == [slice(5 * i, 5 * i + 5) for i in range(len(sizes))]


def test_the_encoders_part_of_the_row() -> None:
    model = ModelConfig(width=16, heads=2, depth=3)
    both = LogisticConfig(views=("tokens",), class_tokens=0.5, mean_token=0.1)
    layout = FeatureLayout.of({"hsi": 4, "lidar": 1}, Config(model=model, logistic=both))
    assert (layout.class_tokens, layout.mean_token, layout.total) == (2 * 16 * 3, 2 * 16, 10 + 128)
    none = both.model_copy(update={"class_tokens": 0.0})
    assert FeatureLayout.of({"hsi": 4}, Config(model=model, logistic=none)).class_tokens == 0
    assert np.isclose(layout.total, layout.means + layout.class_tokens + layout.mean_token)
