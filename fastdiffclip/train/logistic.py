"""Training of the logistic head: features of the shots once, then convex fits that take milliseconds.

For every view of the features (``views``) a regression is fitted, and judged by leaving shots out, from hundreds on in
groups by place. Their logits are averaged with weights exp(-n (loss - best loss)), n shots, and since all of them are
linear in the features, the average is one linear map. Its temperature is that of the shots left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdiffclip.config import Config, LogisticConfig
from fastdiffclip.model.encoder import ImageEncoder
from fastdiffclip.model.logistic_classifier import LogisticClassifier
from fastdiffclip.model.spectral_denoiser import SpectralDenoiser
from fastdiffclip.model.text_similarity import text_similarity
from fastdiffclip.model.window_features import means_of_windows, unit_means
from fastdiffclip.runtime import Compute
from fastdiffclip.scene.prepare import FrontEnd
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.train.logistic_regression import (
    fit,
    folds_of,
    left_out,
    mean_loss,
    prior_root,
    span,
    temperature_of,
)
from fastdiffclip.train.loop import weights_digest
from fastdiffclip.train.views import FeatureStatistics, make_views, sampled_windows

BATCH = 64
STATISTICS = {"views", "sizes", "class_tokens", "mean_token", "samples"}  # the settings that statistics depend on
LEAVE_ONE_OUT = 40  # shots up to which they are left out one by one
# Shots above which groups by place weigh the views: a shot left out alone lies beside some that stay, and a view that
# knows neighbours again takes all the weight. Up to 150 shots groups gained nothing or lost (docs/accuracy.md).
WEIGHED_BY_PLACE = 150
PLACE_GROUPS = 5


@dataclass(frozen=True)
class Head:
    """A fitted head.

    Attributes:
        centre: ``(F,)``. weight: ``(E, F)``. bias: ``(K,)``. texts: ``(K, E)``, one row per class; shorter than 1 for a
            class without shots. temperature: of the probabilities.
        losses: the objective after every iteration of the fit that weighs most.
        shares: weight of every view in the average. left_out_loss: of the shots left out, None where no shot could be.
    """

    centre: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    texts: np.ndarray
    temperature: float
    losses: list[float]
    shares: dict[str, float]
    left_out_loss: float | None

    def summary(self) -> dict[str, Any]:
        """JSON-able: how the head came about."""
        return {name: getattr(self, name) for name in ("shares", "temperature", "left_out_loss")}

    def put_into(self, model: LogisticClassifier) -> torch.Tensor:
        """Give the numbers to a model; returns the text embeddings ``(K, E)`` float32."""
        named = {"centre": self.centre, "weight": self.weight, "bias": self.bias, "temperature": [self.temperature]}
        model.take({name: torch.tensor(np.asarray(value), dtype=torch.float32) for name, value in named.items()})
        return torch.from_numpy(self.texts.astype(np.float32))


@dataclass(frozen=True)
class Candidate:
    """The fit of one view.

    Attributes:
        view: its name. weight: ``(K, F)`` in the text space, of centred features. bias: ``(K,)``.
        losses: the objective after every iteration. left_out: logits ``(N, K)`` of the shots left out, NaN rows where
            that is impossible. weighed_by: those of the shots left out whose loss gives the view its weight.
    """

    view: str
    weight: np.ndarray
    bias: np.ndarray
    losses: list[float]
    left_out: np.ndarray
    weighed_by: np.ndarray


def new_logistic(
    front_end: FrontEnd, config: Config, network: ImageEncoder | SpectralDenoiser | None, seed: int
) -> LogisticClassifier:
    """A head that is not fitted yet, what it looks through with the weights of ``network`` where one is given."""
    model = LogisticClassifier(front_end.channels, config, seed)
    read = model.restorer if isinstance(network, SpectralDenoiser) else model.encoder
    if network is not None and read is not None:
        read.load_state_dict(network.state_dict())
    return model.eval()


@torch.no_grad()
def window_features(model: LogisticClassifier, windows: Sequence[np.ndarray], where: Compute) -> np.ndarray:
    """Features ``(n, F)`` float64 of windows ``(n, L, C_m)``, in batches of one constant size."""
    parts = [np.empty((0, model.layout.total))]
    for first in range(0, len(windows[0]), BATCH):
        block = [torch.from_numpy(part[first : first + BATCH]).to(where.device) for part in windows]
        rows = len(block[0])
        block = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, BATCH - rows)) for part in block]
        with where.autocast():
            features = model.features(block)
        parts.append(features[:rows].double().cpu().numpy())
    return np.concatenate(parts)


def feature_statistics(
    model: LogisticClassifier, source: WindowSource, config: Config, where: Compute
) -> FeatureStatistics:
    """Centre and views of the features over unlabelled windows; found once for a source, network and settings."""
    networks = [weights_digest(part) for part in (model.encoder, model.restorer) if part is not None]
    settings = config.logistic.model_dump(include=STATISTICS), config.model.model_dump()
    key = f"logistic {settings} {where.device} {where.precision} {networks}"
    if key not in source.memo:
        drawn, ours, theirs = sampled_windows(source.scenes, config.logistic.samples, source.window)
        features = window_features(model, source.windows(drawn), where)
        differences = _means(model, source, ours) - _means(model, source, theirs)
        source.memo[key] = make_views(features, differences, model.layout, config, len(source.front_end.channels))
    found: FeatureStatistics = source.memo[key]
    return found


def _means(model: LogisticClassifier, source: WindowSource, centres: np.ndarray) -> np.ndarray:
    """The window means ``(n, F_means)`` float64 of the features alone."""
    sizes = model.layout.sizes
    windows = [torch.from_numpy(part) for part in source.windows(centres)]
    return unit_means(means_of_windows(windows, sizes), len(sizes)).double().numpy()


def fit_head(
    features: np.ndarray, labels: np.ndarray, places: np.ndarray, prompts: Sequence[str],
    statistics: FeatureStatistics, settings: LogisticConfig,
) -> Head:  # fmt: skip
    """Fit the head to features ``(N, F)`` of shots with ``labels`` (N,), positions in ``prompts``.

    ``places`` (N, 3) are the shots' scene, row and column; they count from hundreds of shots on (``fit_candidates``).
    A class without shots takes its place in the text space from its prompt: what the prior expects of it, given the
    classes that have some. Its bias is the mean of theirs.
    """
    similarity = text_similarity(prompts)
    present, own = np.unique(labels, return_inverse=True)
    root = prior_root(similarity[np.ix_(present, present)], settings.text)
    candidates = fit_candidates(features, own, places, root, statistics, settings.ridge)
    shares = shares_of(candidates, own)
    weight, bias, held = average(candidates, shares)
    temperature = temperature_of(held, own) if settings.calibrate and len(present) > 1 else 1.0
    loss = mean_loss(held / temperature, own)
    texts = np.zeros((len(prompts), len(present)))
    texts[present] = root
    unseen = np.setdiff1d(np.arange(len(prompts)), present)
    texts[unseen] = expected_texts(root, settings.text * similarity[np.ix_(unseen, present)])
    biases = np.full(len(prompts), bias.mean())
    biases[present] = bias
    return Head(
        statistics.centre,
        weight,
        biases,
        texts,
        temperature,
        candidates[int(shares.argmax())].losses,
        {c.view: float(share) for c, share in zip(candidates, shares, strict=True)},
        None if np.isnan(loss) else loss,
    )


def fit_candidates(
    features: np.ndarray, labels: np.ndarray, places: np.ndarray, root: np.ndarray, statistics: FeatureStatistics,
    ridge: float,
) -> list[Candidate]:  # fmt: skip
    """One fit per view to shots whose ``labels`` (N,) are positions in ``root`` (K, K), and one without each fold.

    Above ``WEIGHED_BY_PLACE`` shots there is also one without each group by place (``place_groups``), where there are
    any. The ridge falls with the square root of the mean number of shots per class, ``ridge`` is its value at one.
    """
    folds = folds_of(labels, LEAVE_ONE_OUT)
    groups = place_groups(labels, places) if len(labels) > WEIGHED_BY_PLACE else None
    centred, found = features - statistics.centre, []
    constant = ridge / (len(labels) / len(root)) ** 0.5
    for name, view in statistics.views.items():
        rows, basis = span(view.rows(centred))
        whole = fit(rows, labels, root, constant)
        held = left_out(rows, labels, root, constant, whole, folds)
        apart = held if groups is None else left_out(rows, labels, root, constant, whole, groups)
        weight = view.pull(whole.weight @ basis, centred.shape[1])
        found.append(Candidate(name, weight, whole.bias, whole.losses, held, apart))
    return found


def place_groups(labels: np.ndarray, places: np.ndarray) -> np.ndarray | None:
    """Which shots are left out together by place: ``(N,)`` numbers below ``PLACE_GROUPS``.

    Spatial cross-validation (Roberts et al. 2017, Ecography 40, 913-929). The shots of a class are ordered by scene and
    then along the main axis of their rows and columns, and cut into groups of equal number: every group has shots of
    every class, no seed and no block size is to be chosen. None where a class has fewer places than there are groups.

    The axis has no direction: which end of one class goes with which end of another is left to the decomposition. One
    direction for all classes was no better (docs/accuracy.md).
    """
    groups = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        own = places[rows]
        if len(np.unique(own, axis=0)) < PLACE_GROUPS:
            return None
        along = np.linalg.svd(own[:, 1:] - own[:, 1:].mean(axis=0), full_matrices=False)[0][:, 0]
        groups[rows[np.lexsort((along, own[:, 0]))]] = np.arange(len(rows)) * PLACE_GROUPS // len(rows)
    return groups


def shares_of(candidates: Sequence[Candidate], labels: np.ndarray) -> np.ndarray:
    """Weights of the candidates, which sum to 1; equal where no shot could be left out."""
    held = [c.weighed_by / temperature_of(c.weighed_by, labels) for c in candidates]
    losses = np.nan_to_num(np.array([mean_loss(part, labels) for part in held]))
    shares = np.exp(-len(labels) * (losses - losses.min()))
    return shares / shares.sum()


def average(candidates: Sequence[Candidate], shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight, bias and left-out logits of the weighted mean of the candidates."""
    parts = ([c.weight for c in candidates], [c.bias for c in candidates], [c.left_out for c in candidates])
    weight, bias, held = (np.einsum("c,c...->...", shares, np.stack(part)) for part in parts)
    return weight, bias, held


def offset_for_share(others: np.ndarray, new: np.ndarray, share: float) -> float:
    """What to add to the logits ``new`` (n,) of a class so that it wins ``share`` of the windows against ``(n, K)``."""
    return float(np.quantile(others.max(axis=1) - new, share))


def expected_texts(root: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Rows ``(U, K)`` in the text space of classes whose prior covariance with the K known ones is ``(U, K)``.

    The prior's expectation of a class's weights, given those of the known classes (Gaussian conditioning).
    """
    from scipy.linalg import solve_triangular

    return solve_triangular(root, covariance.T, lower=True).T
