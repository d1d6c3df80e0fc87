"""The projections of the `mnf` front end: minimum noise fraction and half-whitened principal components.

Legend: n features, K components. All fitting is in float64 and streams over row blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastdiffclip.scene.blocks import RowReader

if TYPE_CHECKING:
    from fastdiffclip.scene.store import Scene

TILE = 1024
_BLOCK_PIXELS = 32_768
_FIT_PIXELS = 2_000_000
_KEPT_DIFFERENCES = 0.8
_LEAST_SHRINKAGE = 1e-6

FeatureBlock = tuple[np.ndarray, np.ndarray, int]


@dataclass(frozen=True)
class Projection:
    """``(features(x) - mean) @ matrix`` per pixel, in float32.

    ``mean`` (n,) float32, ``matrix`` (n, K) float32. With a ``rms_floor`` (the `mnf` of spectra) the features
    of a spectrum x of n - 1 bands are x / rms and log(rms), rms = max(sqrt(mean(x^2)), rms_floor); with None
    they are x itself.
    """

    mean: np.ndarray
    matrix: np.ndarray
    rms_floor: float | None

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Return (pixels, K) float32 for ``x`` (pixels, bands) float32 in physical units.

        Works in tiles of 1024 pixels, all in one layout, by operations that treat every pixel alike. So a
        pixel gets the same bits whatever pixels come with it, and at any number of threads.
        """
        tile = np.zeros((x.shape[1], TILE), np.float32)
        out = np.empty((len(x), self.matrix.shape[1]), np.float32)
        for begin in range(0, len(x), TILE):
            part = x[begin : begin + TILE]
            tile[:, : len(part)] = part.T
            centred = self._centred(features_of(tile, self.rms_floor))
            # Not a BLAS product: OpenBLAS rounds a row differently at other places of the same matrix.
            projected = np.einsum("nt,nk->kt", centred, self.matrix)
            out[begin : begin + TILE] = projected[:, : len(part)].T
        return out

    def _centred(self, features: np.ndarray) -> np.ndarray:
        """``features - mean``; bands as they are, without a limit of their own, stay where the product is finite."""
        if self.rms_floor is not None:
            return features - self.mean[:, None]
        largest = np.float32(min(1e38, 1e30 / float(np.abs(self.matrix).max())))
        with np.errstate(over="ignore"):
            return np.clip(features - self.mean[:, None], -largest, largest)


def features_of(x: np.ndarray, rms_floor: float | None) -> np.ndarray:
    """Return (n, pixels) float32 features of ``x`` (bands, pixels) float32: see Projection."""
    if rms_floor is None:
        return x
    floor = np.maximum(np.float32(rms_floor), np.finfo(np.float32).tiny)
    rms = np.maximum(_root_mean_square(x, floor), floor)
    return np.concatenate([x / rms, np.log(rms)[None]])


def _root_mean_square(x: np.ndarray, floor: np.float32) -> np.ndarray:
    """Per pixel; where squares leave the range of float32, of numbers that are scaled to the largest one."""
    with np.errstate(over="ignore", under="ignore"):
        rms = np.sqrt(np.mean(x * x, axis=0))
    odd = ~(rms < 1e15) | ((rms < 1e-15) & (floor < 1e-15))
    if odd.any():
        peak = np.maximum(np.abs(x[:, odd]).max(axis=0), floor)
        rms[odd] = peak * np.sqrt(np.mean((x[:, odd] / peak) ** 2, axis=0))
    return rms


def fit_projection(
    scenes: Sequence[Scene],
    modality: str,
    physical: Callable[[np.ndarray], np.ndarray],
    rms_floor: float | None,
    components: int,
) -> Projection | None:
    """Fit the `mnf` (``rms_floor`` given) or the half-whitened PCA (None) of one modality on all scenes.

    ``physical`` turns raw (pixels, bands) into the float32 bands that are used. Let z be the standardised
    features, S their covariance, N the noise covariance, ``N = sum d d' / (2 pairs)`` over the differences d
    of horizontally and vertically neighbouring valid pixels of a scene, without the fifth that is longest;
    for the PCA, N = I. With the generalised eigenvectors ``S w_k = lambda_k N w_k``, ``w_k' N w_k = 1``
    (lambda_k is the component's variance in units of noise), component k is

        y_k = g lambda_k^(-1/4) w_k' z,      g = (mean_k lambda_k^(1/2))^(-1/2)

    so its variance is g^2 lambda_k^(1/2) and the mean variance is 1. Components come by falling lambda; the
    largest loading of each is positive. N is shrunk towards ``trace(N)/n I`` by the weight n / (n + pairs),
    at least 1e-6, which is also what stands in where hardly any valid pixel has a valid neighbour. Green et
    al., "A transformation for ordering multispectral data in terms of image quality", 1988.

    Beyond 2 million pixels, evenly spaced row blocks that add up to about 2 million are used. Returns None
    where nothing varies.
    """

    def blocks() -> Iterator[FeatureBlock]:
        return _feature_blocks(scenes, modality, physical, rms_floor)

    moments = _mean_and_covariance(blocks())
    if moments is None:
        return None
    mean, covariance = moments
    sd = np.sqrt(np.diag(covariance))
    # What varies less than float32 resolves carries nothing.
    weight = np.divide(1.0, sd, out=np.zeros_like(sd), where=sd > 1e-6 * np.maximum(1.0, np.abs(mean)))
    signal = covariance * weight[:, None] * weight
    noise = np.eye(len(mean)) if rms_floor is None else _noise_covariance(blocks, weight)
    loadings = _scaled_components(signal, noise, components)
    if loadings is None:
        return None
    # Contiguous: safetensors stores the memory of an array, whatever its strides.
    matrix = np.ascontiguousarray(weight[:, None] * loadings, np.float32)
    return Projection(mean=mean.astype(np.float32), matrix=matrix, rms_floor=rms_floor)


def _scaled_components(signal: np.ndarray, noise: np.ndarray, components: int) -> np.ndarray | None:
    """Return (n, K): the columns g lambda_k^(-1/4) w_k of fit_projection, or None."""
    import scipy.linalg

    eigenvalues, vectors = scipy.linalg.eigh(signal, noise)
    order = np.argsort(eigenvalues)[::-1][:components]
    kept = order[eigenvalues[order] > 1e-7 * eigenvalues.max(initial=0.0)]
    if len(kept) == 0:
        return None
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    size = np.abs(vectors)
    # The first of nearly equal loadings decides the sign, so that rounding cannot turn a component over.
    largest = np.argmax(size >= size.max(axis=0) * (1 - 1e-6), axis=0)
    signs = np.sign(vectors[largest, np.arange(len(kept))])
    return vectors * signs * eigenvalues**-0.25 / np.sqrt(np.mean(np.sqrt(eigenvalues)))


def _mean_and_covariance(blocks: Iterable[FeatureBlock]) -> tuple[np.ndarray, np.ndarray] | None:
    shift: np.ndarray | None = None
    total = products = np.zeros(())
    count = 0
    for features, valid, halo in blocks:
        x = features[halo:][valid[halo:]].astype(np.float64)
        if len(x) == 0:
            continue
        if shift is None:
            shift = x.mean(axis=0)
        x -= shift
        total = total + x.sum(axis=0)
        products = products + x.T @ x
        count += len(x)
    if shift is None:
        return None
    mean = total / count
    return shift + mean, products / count - np.outer(mean, mean)


def _noise_covariance(blocks: Callable[[], Iterable[FeatureBlock]], weight: np.ndarray) -> np.ndarray:
    """Return the shrunk noise covariance (n, n) of the standardised features."""
    n = len(weight)
    norms = [np.linalg.norm(d, axis=1).astype(np.float32) for d in _differences(blocks(), weight)]
    lengths = np.concatenate([np.zeros(0, np.float32), *norms])
    if len(lengths) == 0 or not lengths.any():
        return np.eye(n)
    longest = np.quantile(lengths, _KEPT_DIFFERENCES, method="higher")
    noise, pairs = np.zeros((n, n)), 0
    for differences, size in zip(_differences(blocks(), weight), norms, strict=True):
        kept = differences[size <= longest]
        noise += kept.T @ kept
        pairs += len(kept)
    noise /= 2 * pairs
    level = np.trace(noise) / n
    if level <= 0:
        return np.eye(n)
    shrinkage = max(_LEAST_SHRINKAGE, n / (n + pairs))
    return (1 - shrinkage) * noise + shrinkage * level * np.eye(n)


def _differences(blocks: Iterable[FeatureBlock], weight: np.ndarray) -> Iterator[np.ndarray]:
    """Yield (pairs, n) float64: differences of neighbouring valid pixels, two arrays a block."""
    for features, valid, halo in blocks:
        z = features * weight
        both = valid[halo:, 1:] & valid[halo:, :-1]
        yield (z[halo:, 1:] - z[halo:, :-1])[both]
        both = valid[1:] & valid[:-1]
        yield (z[1:] - z[:-1])[both]


def _feature_blocks(
    scenes: Sequence[Scene],
    modality: str,
    physical: Callable[[np.ndarray], np.ndarray],
    rms_floor: float | None,
) -> Iterator[FeatureBlock]:
    """Yield ``(features (h, w, n) float32, valid (h, w), halo)``; the first ``halo`` rows, 0 or 1, repeat."""
    stride = -(-sum(s.height * s.width for s in scenes) // _FIT_PIXELS)
    number = 0
    for scene in scenes:
        reader = RowReader(scene, modality)
        step = max(1, _BLOCK_PIXELS // scene.width)
        follows = 0
        for top in range(0, scene.height, step):
            if number % max(1, stride) == 0:
                raw, valid = reader.rows(top - follows, min(scene.height, top + step))
                x = physical(np.where(valid[..., None], raw, 0).reshape(-1, raw.shape[2]))
                finite = np.isfinite(x).all(axis=1)
                x[~finite] = 0
                features = features_of(np.ascontiguousarray(x.T), rms_floor).T.reshape(*valid.shape, -1)
                yield features, valid & finite.reshape(valid.shape), follows
            follows = int(number % max(1, stride) == 0)
            number += 1
