"""Slow, independent truths of the kernels: numpy and plain loops, nothing shared with the code under test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fastdiffclip.kernels import FlatScene

SIZES = ((9, 14), (3, 4), (1, 17))  # of the scenes; two of them are smaller than the windows


def philox_words(c0, c1, c2, c3, k0, k1) -> np.ndarray:
    """Philox 4x32-10 from the paper, on uint64 arrays; returns ``(4, ...)`` words."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c = [x.copy() for x in np.broadcast_arrays(*(np.asarray(x, np.uint64) for x in (c0, c1, c2, c3)))]
    key = [int(k0), int(k1)]
    for _ in range(10):
        p, q = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (q >> shift) ^ c[1] ^ np.uint64(key[0]),
            q & low,
            (p >> shift) ^ c[3] ^ np.uint64(key[1]),
            p & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c)


def normals(token_ids: np.ndarray, channels: int, position: int, modality: int, seed: int, step: int) -> np.ndarray:
    """``(V, channels)`` float64 normals of one window, purpose 2 (noise)."""
    quads = np.arange((channels + 3) // 4)
    w = philox_words(quads[None, :], token_ids[:, None] + 65536 * modality, position, 2, seed, step)
    out = np.empty((len(token_ids), len(quads), 4))
    for pair in (0, 1):
        radius = np.sqrt(-2 * np.log(((w[2 * pair] >> np.uint64(8)).astype(np.float64) + 1) / 2**24))
        turn = (w[2 * pair + 1].astype(np.uint32).view(np.int32) >> 8) / 2**24
        out[..., 2 * pair] = radius * np.cos(2 * np.pi * turn)
        out[..., 2 * pair + 1] = radius * np.sin(2 * np.pi * turn)
    return out.reshape(len(token_ids), -1)[:, :channels]


@dataclass(frozen=True)
class Truth:
    """A scene of several rasters, kept as plain arrays beside the :class:`FlatScene` under test."""

    flat: FlatScene
    stored: np.ndarray  # (N, C) float64, the stored numbers
    scale: np.ndarray  # (C,) float64
    offset: np.ndarray
    valid: np.ndarray  # (N,) bool
    first: tuple[int, ...]  # first pixel of each scene

    def centres(self, rows: int, seed: int = 0) -> torch.Tensor:
        """Valid centres, corners of every scene first; ``(rows, 3)`` int64."""
        found = [(s, r, c) for s, (h, w) in enumerate(SIZES) for r in (0, h - 1) for c in (0, w - 1)]
        inner = [(s, r, c) for s, (h, w) in enumerate(SIZES) for r in range(h) for c in range(w)]
        np.random.default_rng(seed).shuffle(inner)
        usable = [p for p in found + inner if self.valid[self.index(*p)]]
        return torch.tensor(usable[:rows], dtype=torch.int64)

    def index(self, scene: int, row: int, col: int) -> int:
        return self.first[scene] + row * SIZES[scene][1] + col

    def window(self, centre: torch.Tensor, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Flat pixel index that each of the L tokens reads, and its validity."""
        scene, row, col = (int(x) for x in centre)
        height, width = SIZES[scene]
        index, valid = [], []
        for dy in range(-(window // 2), window // 2 + 1):
            for dx in range(-(window // 2), window // 2 + 1):
                r, c = min(max(row + dy, 0), height - 1), min(max(col + dx, 0), width - 1)
                ok = bool(self.valid[self.index(scene, r, c)])
                valid.append(ok)
                index.append(self.index(scene, r, c) if ok else self.index(scene, row, col))
        return np.array(index), np.array(valid)

    def values(self, index: np.ndarray) -> np.ndarray:
        return self.stored[index] * self.scale + self.offset


@pytest.fixture
def scene_truth():
    """Factory ``(dtype, channels, invalid share, seed) -> Truth``."""

    def make(dtype: torch.dtype = torch.uint16, channels: int = 5, invalid: float = 0.2, seed: int = 0) -> Truth:
        rng = np.random.default_rng(seed)
        pixels_of = [h * w for h, w in SIZES]
        n = sum(pixels_of)
        if dtype in (torch.uint16, torch.int16):
            low, high = (0, 65536) if dtype == torch.uint16 else (-32768, 32768)
            numbers = rng.integers(low, high, (n, channels))
            pixels = torch.from_numpy(numbers.astype(np.uint16 if dtype == torch.uint16 else np.int16))
            spread = 1 / 20000
        else:
            pixels = torch.from_numpy(rng.normal(size=(n, channels))).to(dtype)
            spread = 1.0
        stored = pixels.numpy() if dtype in (torch.uint16, torch.int16) else pixels.double().numpy()
        scale = torch.from_numpy(rng.uniform(0.5, 2, channels) * spread).float()
        offset = torch.from_numpy(rng.normal(size=channels)).float()
        valid = rng.random(n) >= invalid
        first = tuple(int(x) for x in np.cumsum([0, *pixels_of])[:-1])
        bitmap = None if invalid == 0 else torch.from_numpy(np.packbits(valid, bitorder="little"))
        extents = torch.tensor([(f, h, w) for f, (h, w) in zip(first, SIZES, strict=True)], dtype=torch.int64)
        flat = FlatScene(pixels, scale, offset, bitmap, extents)
        return Truth(flat, stored.astype(np.float64), scale.double().numpy(), offset.double().numpy(), valid, first)

    return make


@pytest.fixture
def philox_truth():
    """The independent Philox and its normals: ``(philox_words, normals)``."""
    return philox_words, normals
