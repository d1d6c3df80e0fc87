"""The random numbers that every implementation shares: Philox 4x32-10 (Salmon et al., SC 2011).

A number is addressed, never drawn in sequence::

    counter = (channel // 4, token + 2**16 * modality, position of the window in the global batch, purpose)
    key     = (seed, optimiser step)

so it does not depend on device, tile size, thread count, micro-batching or number of ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiffclip.errors import UsageError

# Purposes: the last counter word. A number, once given out, keeps its meaning.
MASK, NOISE, TIMESTEP, CENTRE, SHUFFLE, SAMPLER, AUGMENT = 1, 2, 3, 4, 5, 6, 7
BAND_DRAW, BAND_MASK, BAND_LEVEL, BAND_NOISE, BAND_READ = 8, 9, 10, 11, 12  # of spectral mask diffusion

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
PART = 1 << 16  # positions of a permutation whose words are drawn together


def rng_state(seed: int, step: int = 0, first_position: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Return the ``(3,)`` int64 tensor (seed, optimiser step, position of row 0 in the global batch) of the ops.

    Raises:
        UsageError: ``seed`` or ``step`` does not fit 32 bits.
    """
    if not (0 <= seed <= _LOW and 0 <= step <= _LOW):
        raise UsageError(f"seed and step must lie in 0..{_LOW}; got seed {seed}, step {step}")
    return torch.tensor([seed, step, first_position], dtype=torch.int64, device=device)


def philox(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 on int64 tensors that hold 32-bit words; arguments broadcast. Returns four words alike."""
    for _ in range(10):
        # int64 products wrap modulo 2**64: the shifted-down sign bits are cut off by the mask.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + WEYL[0]) & _LOW, (k1 + WEYL[1]) & _LOW
    return c0, c1, c2, c3


def words(rng: Tensor, purpose: int, positions: Tensor, tokens: Tensor, channels4: Tensor) -> tuple[Tensor, ...]:
    """Four 32-bit words (int64) for broadcast absolute ``positions``, ``tokens`` with modality and ``channels4``."""
    purpose_word = torch.full((), purpose, dtype=torch.int64, device=rng.device)
    return philox(channels4, tokens, positions & _LOW, purpose_word, rng[0], rng[1])


def row_positions(rng: Tensor, rows: int) -> Tensor:
    """Positions in the global batch of ``rows`` consecutive windows: ``(rows,)`` int64."""
    return rng[2] + torch.arange(rows, dtype=torch.int64, device=rng.device)


def uniform_integers(rng: Tensor, purpose: int, rows: int, bound: int) -> Tensor:
    """``(rows,)`` int64 uniform in [0, bound): ``(word * bound) >> 32``, exact on every device (bound < 2**31)."""
    zero = torch.zeros((), dtype=torch.int64, device=rng.device)
    word = words(rng, purpose, row_positions(rng, rows), zero, zero)[0]
    return (word * bound) >> 32


def permutation(rng: Tensor, purpose: int, n: int) -> Tensor:
    """A permutation of ``n``: the positions sorted by their words, ties by position."""
    zero = torch.zeros((), dtype=torch.int64, device=rng.device)
    return torch.argsort(words(rng, purpose, row_positions(rng, n), zero, zero)[0], stable=True)


def first_of_permutation(rng: Tensor, purpose: int, n: int, count: int) -> Tensor:
    """``permutation(rng, purpose, n)[:count]`` by parts, whose words stay in the caches: a few of many millions."""
    zero = torch.zeros((), dtype=torch.int64, device=rng.device)
    kept, word = [rng.new_empty(0)], [rng.new_empty(0)]
    held, limit = 0, _LOW  # what is kept so far, and the largest word that may still count
    for first in range(0, n, PART):
        position = torch.arange(first, min(first + PART, n), dtype=torch.int64, device=rng.device)
        new = words(rng, purpose, rng[2] + position, zero, zero)[0]
        near = new <= limit
        kept.append(position[near])
        word.append(new[near])
        held += len(kept[-1])
        if held > 2 * count + PART or first + PART >= n:
            everything = torch.cat(word)
            order = torch.argsort(everything, stable=True)[:count]  # ties by position: parts come in its order
            kept, word, held = [torch.cat(kept)[order]], [everything[order]], len(order)
            limit = int(word[0][-1]) if held == count > 0 else _LOW
    return kept[0]


def visible_ids(rng: Tensor, rows: int, tokens: int, visible: int, modality: int) -> Tensor:
    """Ids of the visible tokens, ascending: the ``visible`` smallest mask words of each window, ties by id.

    Returns:
        ``(rows, visible)`` int64.
    """
    token = torch.arange(tokens, dtype=torch.int64, device=rng.device)
    zero = torch.zeros((), dtype=torch.int64, device=rng.device)
    word = words(rng, MASK, row_positions(rng, rows)[:, None], token + (modality << 16), zero)[0]
    chosen = torch.topk((word << 16) | token, visible, dim=1, largest=False, sorted=False).values & 0xFFFF
    return torch.sort(chosen, dim=1).values


def normals(rng: Tensor, ids: Tensor, channels: int, modality: int, purpose: int = NOISE) -> Tensor:
    """Standard normals of the given tokens by Box-Muller, computed in float64 and rounded once.

    ``u1 = ((w0 >> 8) + 1) / 2**24``, ``turn = (int32(w1) >> 8) / 2**24``, ``r = sqrt(-2 ln u1)``; channels 4j, 4j + 1
    are ``r cos(2 pi turn)``, ``r sin(2 pi turn)``, channels 4j + 2, 4j + 3 the same of words 2 and 3.

    Args:
        rng: state of :func:`rng_state`.
        ids: ``(B, V)`` token ids.

    Returns:
        ``(B, V, channels)`` float32.
    """
    quads = torch.arange((channels + 3) // 4, dtype=torch.int64, device=ids.device)
    position = row_positions(rng, ids.shape[0])[:, None, None]
    w = words(rng, purpose, position, ids.long()[:, :, None] + (modality << 16), quads)
    pairs = []
    for a, b in ((w[0], w[1]), (w[2], w[3])):
        radius = torch.sqrt(-2.0 * torch.log(((a >> 8) + 1).double() * 2.0**-24))
        signed = torch.where(b >= 2**31, b - 2**32, b) >> 8
        angle = signed.double() * (2.0 * math.pi * 2.0**-24)
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, dim=-1).flatten(2)[:, :, :channels].float()
