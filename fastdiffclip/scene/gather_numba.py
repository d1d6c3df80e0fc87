"""The window gather for numba; imported only by ``windows`` and only when the first gather runs."""

from __future__ import annotations

import numpy as np
from numba import prange


def gather(
    pixels: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray,
    valid: np.ndarray,
    extents: np.ndarray,
    centres: np.ndarray,
    radius: int,
    out: np.ndarray,
) -> None:
    """Fill ``out`` (B, L, C) float32 with ``pixels * scale + offset`` of every window's pixels."""
    side = 2 * radius + 1
    channels = pixels.shape[1]
    for b in prange(centres.shape[0]):
        scene = centres[b, 0]
        first = extents[scene, 0]
        height = extents[scene, 1]
        width = extents[scene, 2]
        centre = first + centres[b, 1] * width + centres[b, 2]
        for i in range(side):
            row = min(max(centres[b, 1] + i - radius, 0), height - 1)
            for j in range(side):
                col = min(max(centres[b, 2] + j - radius, 0), width - 1)
                n = first + row * width + col
                if (valid[n >> 3] >> (n & 7)) & 1 == 0:
                    n = centre
                for c in range(channels):
                    out[b, i * side + j, c] = np.float32(pixels[n, c]) * scale[c] + offset[c]
