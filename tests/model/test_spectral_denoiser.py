"""The network over bands: its groups, its equation, and what masked channels must not tell it."""

from __future__ import annotations

import pytest
import torch

from fastdiffclip.kernels import philox
from fastdiffclip.model.spectral_denoiser import READ_LEVEL, SpectralDenoiser, channel_groups, drawn_groups

CHANNELS = {"hsi": 13, "lidar": 1, "sar": 6}


@pytest.fixture(scope="module")
def network() -> SpectralDenoiser:
    return SpectralDenoiser(CHANNELS, seed=3).requires_grad_(False)


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 20, generator=torch.Generator().manual_seed(seed))


def test_groups_are_neighbours_of_one_modality() -> None:
    assert channel_groups(CHANNELS).tolist() == [0] * 5 + [1] * 4 + [2] * 4 + [3] + [4] * 6
    assert channel_groups({"hsi": 30, "chm": 1, "lidar": 21}).bincount().tolist() == [5] * 6 + [1, 6, 5, 5, 5]


def test_a_masked_channel_is_not_looked_at(network: SpectralDenoiser) -> None:
    x, level = rows(7), torch.linspace(0.2, 2.0, 7)
    visible = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]).expand(7, -1)
    hidden = (visible.index_select(1, network.group) == 0).float()
    assert torch.equal(network(x, level, visible), network(x + 100 * hidden, level, visible))
    assert not torch.equal(network(x, level, visible), network(x + 1 - hidden, level, visible))


def test_little_noise_leaves_what_is_visible(network: SpectralDenoiser) -> None:
    """The restored value is a x_s + s sqrt(a) net: it tends to x_s with s."""
    x, visible = rows(5), torch.ones(5, network.groups)
    torch.testing.assert_close(network(x, torch.full((5,), 1e-6), visible), x, atol=1e-4, rtol=0)


def test_restored_is_the_mean_over_the_fixed_masks(network: SpectralDenoiser) -> None:
    x = rows(4)
    level = torch.full((4,), READ_LEVEL)
    expected = torch.stack([network(x, level, mask.expand(4, -1)) for mask in network.masks]).mean(0)
    torch.testing.assert_close(network.restored(x), expected)
    assert torch.equal(network.masks, SpectralDenoiser(CHANNELS, seed=9).masks)


def test_rows_do_not_see_each_other(network: SpectralDenoiser) -> None:
    x = rows(6)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    torch.testing.assert_close(network.restored(x[order]), network.restored(x)[order], atol=1e-6, rtol=1e-5)


def test_training_stays_in_float32_and_reading_follows_autocast(network: SpectralDenoiser) -> None:
    """Five layers round their inputs and outputs by 2^-9 of their size, and what they add is at most that size."""
    level, visible = torch.full((3,), 0.7), torch.ones(3, network.groups)
    plain, trained = network.restored(rows(3)), network(rows(3), level, visible)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(rows(3), level, visible), trained)
        read = network.restored(rows(3))
    assert read.dtype == torch.float32 and not torch.equal(read, plain)
    torch.testing.assert_close(read, plain, rtol=0.0, atol=10 * 2.0**-9 * float(plain.abs().max()))


def test_weights_follow_the_seed_alone() -> None:
    one, same, other = (SpectralDenoiser(CHANNELS, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["input.weight"], other["input.weight"])


def test_groups_are_drawn_by_address() -> None:
    """A row's masks follow from its place in the whole batch, and their share is the probability."""
    whole = drawn_groups(philox.rng_state(5, 2), philox.BAND_MASK, 4000, 11, 0.3)
    part = drawn_groups(philox.rng_state(5, 2, 1500), philox.BAND_MASK, 500, 11, 0.3)
    assert torch.equal(part, whole[1500:2000])
    assert float(whole.mean()) == pytest.approx(0.7, abs=0.01)  # standard deviation 0.0022
    assert not drawn_groups(philox.rng_state(5, 3), philox.BAND_MASK, 4000, 11, 0.3).equal(whole)
    assert bool(drawn_groups(philox.rng_state(0), philox.BAND_MASK, 9, 3, 0.0).all())
