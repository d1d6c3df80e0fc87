"""The random numbers of the Triton kernels: published words, and the error of the normals for every word."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastdiffclip.kernels.triton.philox import mask_words, normals, philox, radius_of, turn_of

# Random123, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
TURN = 1 << 24  # steps of u and of the turn


@triton.jit
def _words(numbers, out, N: tl.constexpr):
    i = tl.arange(0, N)
    c0, c1, c2 = tl.load(numbers + 6 * i), tl.load(numbers + 6 * i + 1), tl.load(numbers + 6 * i + 2)
    c3, k0, k1 = tl.load(numbers + 6 * i + 3), tl.load(numbers + 6 * i + 4), tl.load(numbers + 6 * i + 5)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
    tl.store(out + 4 * i, w0)
    tl.store(out + 4 * i + 1, w1)
    tl.store(out + 4 * i + 2, w2)
    tl.store(out + 4 * i + 3, w3)


@triton.jit
def _box_muller(words, radius, cosine, sine, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    word = tl.load(words + i)
    tl.store(radius + i, radius_of(word))
    c, s = turn_of(word)
    tl.store(cosine + i, c)
    tl.store(sine + i, s)


@triton.jit
def _draw(tokens, mask, eps, position, k0, k1, N: tl.constexpr, WANTED: tl.constexpr):
    i = tl.arange(0, N)
    token = tl.load(tokens + i)
    position, k0, k1 = position.to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32)
    tl.store(mask + i, mask_words(token, position, k0, k1))
    drawn = normals(i.to(tl.uint32), token, position, k0, k1, WANTED)
    tl.store(eps + (4 * i)[:, None] + tl.arange(0, WANTED)[None, :], drawn)


def words(numbers: list[list[int]]) -> list[list[int]]:
    out = torch.zeros(len(numbers), 4, dtype=torch.uint32)
    _words[(1,)](torch.tensor(numbers).to(torch.uint32), out, len(numbers))
    return out.tolist()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_published_words(counter, key, expected):
    assert words([[int(word, 16) for word in (counter + " " + key).split()]]) == [
        [int(word, 16) for word in expected.split()]
    ]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6), min_size=8, max_size=8))
def test_words_of_any_counter_and_key(philox_truth, numbers):
    philox_words, _ = philox_truth
    expected = [philox_words(*n).tolist() for n in numbers]
    assert words(numbers) == expected


@pytest.mark.parametrize("wanted", [1, 2, 4])
def test_counters_of_masks_and_normals(philox_truth, wanted):
    philox_words, normals_of = philox_truth
    tokens = torch.tensor([0, 7, 65535 + (9 << 16), 12 + (65535 << 16)]).to(torch.uint32)
    mask, eps = torch.zeros(4, dtype=torch.uint32), torch.full((4, 4), float("nan"))
    seed, step, position = 2**32 - 1, 3, 2**32 - 2
    _draw[(1,)](tokens, mask, eps, position, seed, step, 4, wanted)
    assert mask.tolist() == philox_words(0, tokens.numpy(), position, 1, seed, step)[0].tolist()
    for quad, token in enumerate(tokens.tolist()):
        truth = normals_of(np.array([token]), 4 * quad + 4, position, 0, seed, step)[0, 4 * quad :]
        assert (
            np.abs(eps[quad, :wanted].numpy() - truth[:wanted]) <= 1e-6 * np.maximum(1, np.abs(truth[:wanted]))
        ).all()
        assert bool(eps[quad, wanted:].isnan().all())


def box_muller(steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Radius, cosine and sine of words whose upper 24 bits are ``steps``; a power of two of them at least 4096."""
    word = ((steps << 8) | (steps * 37 & 0xFF)).to(torch.uint32)  # the lower bits count for nothing
    radius, cosine, sine = (torch.full(word.shape, float("nan")) for _ in range(3))
    block = min(len(word), 1 << 18)
    _box_muller[(len(word) // block,)](word, radius, cosine, sine, block)
    return radius, cosine, sine


def truth(steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    angle = torch.where(steps >= TURN // 2, steps - TURN, steps).double() * (2 * torch.pi / TURN)
    return torch.sqrt(-2 * torch.log((steps + 1).double() / TURN)), angle.cos(), angle.sin()


def check(steps: torch.Tensor) -> None:
    """With rho the relative error of the radius and kappa the error of cosine and sine, a normal r c is off by
    ``|r' c' - r c| <= rho |r c| + r' kappa``, and r <= 5.77: within 1e-6 max(1, |r c|) if rho + 5.78 kappa is.
    """
    found, expected = box_muller(steps), truth(steps)
    rho = float(((found[0].double() - expected[0]).abs() / expected[0].clamp(min=1e-300)).max())
    kappa = max(float((found[i].double() - expected[i]).abs().max()) for i in (1, 2))
    rho += 2.0**-23 + 2.0**-24  # a GPU's square root, and the rounding of the product
    assert rho + 5.78 * kappa <= 1e-6


def test_normals_at_the_extremes():
    """Words 0 and 2**32 - 1, u about 1, and both sides of every eighth of a turn."""
    edges = torch.arange(0, TURN + 1, TURN // 8)[:, None] + torch.arange(-64, 64)
    ends = torch.cat([torch.arange(512), TURN - 1 - torch.arange(512)])
    steps = torch.cat([edges.flatten() % TURN, ends])
    steps = torch.cat([steps, steps[: 4096 - len(steps)]])
    check(steps)
    radius, cosine, sine = box_muller(torch.tensor([0, TURN - 1] * 2048))
    assert radius[0] == torch.sqrt(torch.tensor(2 * 24 * np.log(2))).float() and radius[1] == 0
    exact = torch.tensor([0, TURN // 4, TURN // 2, 3 * TURN // 4] * 1024)
    _, cosine, sine = box_muller(exact)
    assert cosine[:4].tolist() == [1, 0, -1, 0] and sine[:4].tolist() == [0, 1, 0, -1]


def test_normals_all_over():
    """Every 13th of the 2**24 values; all of them were tried once."""
    check((torch.arange(1 << 20) * 13) % TURN)
