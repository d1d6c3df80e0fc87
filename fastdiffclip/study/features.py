"""Features of pixels before and after each stage, and their picture in two dimensions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastdiffclip.errors import InputDataError
from fastdiffclip.evaluate.contest import Contest, as_classifier, classical_features
from fastdiffclip.model.mask_diffusion import MaskDiffusion
from fastdiffclip.runtime import Compute
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.splits import Split

PRINCIPAL = 50  # components that t-SNE sees
PERPLEXITY = 30.0
BATCH = 64
FEWEST = 5  # pixels that a picture needs


def features_of(stage: str, contest: Contest, split: Split, seed: int) -> np.ndarray:
    """Features (n + m, F) float32 of the n shots of a split and then of its m test pixels.

    ``pixel``: the centre pixel of all modalities behind the front end. ``encoder``: the class tokens of the image
    encoder, pretrained or random. ``classifier``: what the classifier, trained on the split's shots, compares with
    the texts.
    """
    source, config = contest.windows(), contest.config
    centres = np.concatenate([split.train, split.test])
    if stage == "pixel":
        return classical_features(source, centres, "pixel")
    if stage == "encoder":
        umd = contest.umd
        model = MaskDiffusion(source.front_end.channels, config.model, seed) if umd is None else umd.model
        assert isinstance(model, MaskDiffusion)
        where = Compute.choose(contest.device, config.precision)
        encoder = model.to(where.device).eval().encoder
        return _in_batches(encoder.class_features, source, centres, where)
    classifier = as_classifier(contest.train(split, seed), contest.device)
    seen = classifier.model
    return _in_batches(lambda x: seen.embed_features(seen.features(x)), source, centres, classifier.where)


@torch.inference_mode()
def _in_batches(
    look: Callable[[list[Tensor]], Tensor], source: WindowSource, centres: np.ndarray, where: Compute
) -> np.ndarray:
    """What ``look`` makes of windows, (n, F) float32; every batch has one size."""
    found = []
    for first in range(0, len(centres), BATCH):
        block = [torch.from_numpy(part).to(where.device) for part in source.windows(centres[first : first + BATCH])]
        rows = len(block[0])
        block = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, BATCH - rows)) for part in block]
        with where.autocast():
            found.append(look(block)[:rows].float().cpu().numpy())
    return np.concatenate(found)


def nearest_shot_agrees(features: np.ndarray, labels: np.ndarray, shots: int) -> float:
    """Percent of the test pixels whose nearest shot (rows of unit length, Euclidean) has their label.

    ``features`` (n, F) and ``labels`` (n,) are of ``shots`` shots and then of test pixels. Test pixels are not compared
    with each other: neighbours share most of their windows.

    Raises :class:`InputDataError` for fewer than five test pixels.
    """
    from sklearn.neighbors import NearestNeighbors

    if len(features) - shots < FEWEST:
        raise InputDataError(
            f"a picture of features needs at least {FEWEST} test pixels, and the split left {len(features) - shots}; "
            "ask for fewer --shots, or label more"
        )
    rows = _unit(features)
    near = NearestNeighbors(n_neighbors=1).fit(rows[:shots]).kneighbors(rows[shots:], return_distance=False)[:, 0]
    return float(100.0 * (labels[:shots][near] == labels[shots:]).mean())


def plane_of(features: np.ndarray, seed: int) -> np.ndarray:
    """Features (n, F) in two dimensions (n, 2) float32: t-SNE of the first principal components."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows = _unit(features)
    rows = PCA(min(PRINCIPAL, *rows.shape), svd_solver="full").fit_transform(rows)
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(rows)
    return np.asarray(plane, np.float32)


def _unit(features: np.ndarray) -> np.ndarray:
    rows = np.asarray(features, np.float64)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1)
