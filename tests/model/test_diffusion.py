"""The diffusion process against its closed forms (Ho et al. 2020)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiffclip.model.diffusion import NoiseSchedule, TimestepEmbedding, respaced, sample_reverse

SCHEDULE = NoiseSchedule()


def test_abar_is_the_product() -> None:
    assert len(SCHEDULE) == 1000 and SCHEDULE.betas[0] == 1e-4 and SCHEDULE.betas[-1] == 0.02
    product = 1.0
    for t in range(1000):
        product *= 1.0 - (1e-4 + t * (0.02 - 1e-4) / 999)
        assert float(SCHEDULE.abar[t]) == pytest.approx(product, rel=1e-12)


def test_table_is_the_forward_process() -> None:
    table = SCHEDULE.table()
    assert table.shape == (1000, 2) and table.dtype == torch.float32
    torch.testing.assert_close(table.double().square().sum(1), torch.ones(1000, dtype=torch.float64))
    torch.testing.assert_close(table[:, 0].double(), SCHEDULE.abar.sqrt(), rtol=1e-6, atol=0)
    # One step at a time gives the same mean and variance as the closed form.
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(SCHEDULE.betas.tolist()):
        mean, variance = mean * math.sqrt(1.0 - beta), variance * (1.0 - beta) + beta
        assert float(table[t, 0]) == pytest.approx(mean, rel=1e-5)
        assert float(table[t, 1]) == pytest.approx(math.sqrt(variance), rel=1e-5)


@given(st.integers(1, 999))
def test_posterior_of_neighbouring_steps(t: int) -> None:
    """Equations 6 and 7 of the DDPM paper."""
    abar, before, beta = float(SCHEDULE.abar[t]), float(SCHEDULE.abar[t - 1]), float(SCHEDULE.betas[t])
    of_x0, of_xt, deviation = SCHEDULE.posterior(t, t - 1)
    assert of_x0 == pytest.approx(math.sqrt(before) * beta / (1 - abar), rel=1e-9)
    assert of_xt == pytest.approx(math.sqrt(1 - beta) * (1 - before) / (1 - abar), rel=1e-9)
    assert deviation**2 == pytest.approx((1 - before) / (1 - abar) * beta, rel=1e-9)


@given(st.integers(1, 999), st.data())
def test_posterior_of_respaced_steps(t: int, data: st.DataObject) -> None:
    """q(x_p | x_t, x_0) from the joint Gaussian of x_p and x_t given x_0, for any p < t."""
    p = data.draw(st.integers(0, t - 1))
    abar_p, abar_t = float(SCHEDULE.abar[p]), float(SCHEDULE.abar[t])
    step = abar_t / abar_p
    covariance, variance_t = math.sqrt(step) * (1 - abar_p), 1 - abar_t
    gain = covariance / variance_t
    of_x0, of_xt, deviation = SCHEDULE.posterior(t, p)
    assert of_xt == pytest.approx(gain, rel=1e-9)
    assert of_x0 == pytest.approx(math.sqrt(abar_p) - gain * math.sqrt(abar_t), rel=1e-6)
    assert deviation**2 == pytest.approx((1 - abar_p) - gain * covariance, rel=1e-6)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_posterior_at_the_end_is_x0(t: int) -> None:
    assert SCHEDULE.posterior(t, -1) == pytest.approx((1.0, 0.0, 0.0), abs=1e-12)


@given(st.integers(0, 999), st.integers(1, 1200))
def test_respaced_steps(start: int, steps: int) -> None:
    times = respaced(start, steps)
    assert len(times) == min(steps, start + 1) and times[0] == start
    assert all(a > b for a, b in zip(times, times[1:], strict=False))
    if len(times) > 1:
        gaps = [a - b for a, b in zip(times, times[1:], strict=False)]
        assert times[-1] == 0 and max(gaps) - min(gaps) <= 1


def windows(seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Clean windows of two modalities, ids of visible tokens, their noise."""
    generator = torch.Generator().manual_seed(seed)
    clean = [torch.randn(5, 9, c, generator=generator) for c in (4, 1)]
    ids = [torch.rand(5, 9, generator=generator).argsort(1)[:, :3].sort(1).values.int() for _ in clean]
    noise = [torch.randn(5, 3, c, generator=generator) for c in (4, 1)]
    return clean, ids, noise


def take(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return x.gather(1, ids.long()[:, :, None].expand(-1, -1, x.shape[2]))


@pytest.mark.parametrize(("start", "steps"), [(0, 50), (1, 1), (400, 50), (999, 7), (30, 1000)])
@pytest.mark.parametrize("noisy", [True, False])
def test_an_oracle_restores_the_window(start: int, steps: int, noisy: bool) -> None:
    clean, ids, eps = windows()
    keep, spread = SCHEDULE.table()[start].tolist()
    begin = [keep * take(x, i) + spread * e for x, i, e in zip(clean, ids, eps, strict=True)]
    kept = [x.clone() for x in begin]
    calls: list[int] = []

    def oracle(x: list[torch.Tensor], timestep: int) -> list[torch.Tensor]:
        assert [part.shape for part in x] == [part.shape for part in begin]
        calls.append(timestep)
        return clean

    restored = sample_reverse(
        oracle, begin, ids, SCHEDULE, start, steps, (lambda t, m: torch.randn_like(begin[m])) if noisy else None
    )
    assert calls == respaced(start, steps) and len(calls) <= steps
    for out, truth, before, given_ in zip(restored, clean, kept, begin, strict=True):
        assert torch.equal(out, truth) and torch.equal(before, given_)


@pytest.mark.parametrize("steps", [1000, 25])
def test_the_chain_keeps_the_forward_distribution(steps: int) -> None:
    """With the true x_0 at every step, x at each timestep has the moments of q(x_t | x_0)."""
    generator = torch.Generator().manual_seed(1)
    x0, start = 1.5, 200
    clean = [torch.full((20000, 1, 1), x0)]
    keep, spread = SCHEDULE.table()[start].tolist()
    begin = [keep * clean[0] + spread * torch.randn(20000, 1, 1, generator=generator)]
    seen: dict[int, tuple[float, float]] = {}

    def oracle(x: list[torch.Tensor], timestep: int) -> list[torch.Tensor]:
        seen[timestep] = float(x[0].mean()), float(x[0].std())
        return clean

    ids = [torch.zeros(20000, 1, dtype=torch.int32)]
    sample_reverse(
        oracle, begin, ids, SCHEDULE, start, steps, lambda t, m: torch.randn(20000, 1, 1, generator=generator)
    )
    for t in (150, 100, 50):
        mean, deviation = SCHEDULE.table()[t].tolist()
        t = min(seen, key=lambda k, t=t: abs(k - t))
        mean, deviation = SCHEDULE.table()[t].tolist()
        assert seen[t][0] == pytest.approx(mean * x0, abs=0.02)
        assert seen[t][1] == pytest.approx(deviation, rel=0.03)


def test_timestep_embedding_tells_steps_apart() -> None:
    torch.manual_seed(0)
    embed = TimestepEmbedding(16)
    out = embed(torch.arange(1000))
    assert out.shape == (1000, 16)
    assert torch.cdist(out[:50], out[:50]).fill_diagonal_(1.0).min() > 1e-4
    assert not list(embed.buffers(recurse=False)) or "frequencies" not in embed.state_dict()
