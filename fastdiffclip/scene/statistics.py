"""Per-band mean and standard deviation of a stream of pixels."""

from __future__ import annotations

import numpy as np

_VALUES_AT_ONCE = 2**22


class BandStatistics:
    """Mean and population standard deviation per band, in one pass over blocks, in float64.

    Blocks are merged by the pairwise update of Chan, Golub & LeVeque (1983). Non-finite values are left
    out, per band.
    """

    def __init__(self, bands: int) -> None:
        self.pixels = 0
        self._count = np.zeros(bands)
        self._mean = np.zeros(bands)
        self._squares = np.zeros(bands)
        self._low = np.full(bands, np.inf)
        self._high = np.full(bands, -np.inf)

    def add(self, pixels: np.ndarray) -> None:
        """Add pixels (n, bands) of any real dtype."""
        self.pixels += len(pixels)
        step = max(1, _VALUES_AT_ONCE // max(1, pixels.shape[1]))
        for start in range(0, len(pixels), step):
            self._add_block(pixels[start : start + step])

    def _add_block(self, values: np.ndarray) -> None:
        count = np.full(values.shape[1], float(len(values)))
        low = high = filled = values
        finite = np.isfinite(values) if values.dtype.kind == "f" else np.True_
        if not finite.all():
            count = finite.sum(axis=0).astype(np.float64)
            filled, low, high = (np.where(finite, values, fill) for fill in (0.0, np.inf, -np.inf))
        self._low = np.minimum(self._low, low.min(axis=0))
        self._high = np.maximum(self._high, high.max(axis=0))
        mean = filled.sum(axis=0, dtype=np.float64) / np.maximum(count, 1.0)
        deviation = filled - mean
        if not finite.all():
            deviation[~finite] = 0.0
        total = np.maximum(self._count + count, 1.0)
        delta = mean - self._mean
        self._squares += np.einsum("nb,nb->b", deviation, deviation) + delta**2 * self._count * count / total
        self._mean += delta * count / total
        self._count += count

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (mean, std), each (bands,) float64; 0, 0 for a band without values; std 0 if constant."""
        std = np.sqrt(self._squares / np.maximum(self._count, 1.0))
        constant = self._low == self._high
        return np.where(constant, self._low, self._mean), np.where(constant, 0.0, std)
