"""How the logistic head looks at window features: linear maps found from unlabelled windows, no label read.

Each view maps centred features to rows whose mean squared length over unlabelled windows is 1:

    means       window means, every size and modality as it is
    neighbours  window means, whitened by what pixels 3 to 5 apart differ in (power 1/2 of whitening)
    components  window means, whitened by their own covariance (power 1/2)
    pixel       the 1 x 1 mean alone
    restored    window means as the network over bands restores them
    tokens      window means beside the encoder's tokens, modalities of equal variance

Shape suffixes: N windows, F features, R columns of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastdiffclip.config import Config
from fastdiffclip.model.window_features import FeatureLayout
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.data import unlabelled_centres

POWER = 0.25  # of the inverse covariance; 0.5 would whiten wholly
NEIGHBOUR_FLOOR = 0.3  # added to each eigenvalue, in units of their mean
COMPONENT_FLOOR = 1e-3  # in units of the largest
NEAR, FAR = 3, 5  # distance of neighbours in rows or columns, whichever is larger
TRIES = 8  # places looked at for a valid neighbour
KEPT = 0.8  # share of the neighbour differences that counts, the largest are borders


@dataclass(frozen=True)
class View:
    """A linear map of some features: ``columns`` (f,) of them, and ``matrix`` (f, R), or (f,) where it is diagonal."""

    columns: np.ndarray
    matrix: np.ndarray

    def rows(self, centred: np.ndarray) -> np.ndarray:
        """``(N, R)`` of centred features ``(N, F)``."""
        part = centred[:, self.columns]
        return part * self.matrix if self.matrix.ndim == 1 else part @ self.matrix

    def pull(self, weight: np.ndarray, features: int) -> np.ndarray:
        """``(K, F)`` weights of centred features from ``(K, R)`` weights of the view's rows."""
        whole = np.zeros((len(weight), features))
        whole[:, self.columns] = weight * self.matrix if self.matrix.ndim == 1 else weight @ self.matrix.T
        return whole


@dataclass(frozen=True)
class FeatureStatistics:
    """What unlabelled windows say: ``centre`` (F,) and the views that the settings ask for and the scenes allow."""

    centre: np.ndarray
    views: dict[str, View]


def sampled_windows(scenes: Sequence[Scene], samples: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows ``(n, 3)`` spread over all valid pixels, and pairs ``(m, 3)``, ``(m, 3)`` of neighbouring ones.

    They are the same for every run on the same scenes.
    """
    drawn = unlabelled_centres(scenes, samples, window, seed=0)
    masks = [scene.read_valid_everywhere() & (not scene.centre_only) for scene in scenes]
    sizes = np.array([mask.shape for mask in masks])
    first = np.cumsum([0, *(mask.size for mask in masks)])
    valid = np.concatenate([mask.reshape(-1) for mask in masks])
    axis = np.arange(-FAR, FAR + 1)
    ring = np.array([(down, right) for down in axis for right in axis if max(abs(down), abs(right)) >= NEAR])
    random = np.random.Generator(np.random.PCG64(0))
    partner = np.full_like(drawn, -1)
    for _ in range(TRIES):
        alone = np.flatnonzero(partner[:, 0] < 0)
        there = drawn[alone]
        there[:, 1:] += ring[random.integers(len(ring), size=len(alone))]
        size = sizes[there[:, 0]]
        inside = ((there[:, 1:] >= 0) & (there[:, 1:] < size)).all(axis=1)
        alone, there, size = alone[inside], there[inside], size[inside]
        good = valid[first[there[:, 0]] + there[:, 1] * size[:, 1] + there[:, 2]]
        partner[alone[good]] = there[good]
    paired = partner[:, 0] >= 0
    return drawn, drawn[paired], partner[paired]


def make_views(
    features: np.ndarray, differences: np.ndarray, layout: FeatureLayout, config: Config, modalities: int
) -> FeatureStatistics:
    """Statistics of features ``(N, F)`` of unlabelled windows and of ``(M, F_means)`` differences between neighbours.

    A view that the scenes do not allow, ``neighbours`` where too few pixels have one, is left out; ``means`` stands in
    where no view is left.
    """
    settings = config.logistic
    centre = features.mean(axis=0)
    centred = features - centre
    wide = np.concatenate([np.arange(layout.total)[layout.mean_of(size)] for size in _sizes(layout, config)])
    views: dict[str, View] = {}
    for name in settings.views:
        if name == "neighbours":
            if len(differences) < 2 * len(wide):
                continue
            matrix = _whitening(_typical(differences[:, wide]), NEIGHBOUR_FLOOR, of_largest=False)
            views[name] = _scaled(View(wide, matrix), centred)
        elif name == "components":
            views[name] = _scaled(View(wide, _whitening(centred[:, wide], COMPONENT_FLOOR, of_largest=True)), centred)
        elif name == "pixel":
            columns = np.arange(layout.total)[layout.mean_of(1)]
            views[name] = _scaled(View(columns, np.ones(len(columns))), centred)
        elif name == "restored":
            columns = np.arange(layout.total - layout.restored, layout.total)
            views[name] = _scaled(View(columns, np.ones(len(columns))), centred)
        elif name == "tokens":
            views[name] = _scaled(_with_tokens(wide, centred, layout, config, modalities), centred)
    if "means" in settings.views or not views:
        views = {"means": _scaled(View(wide, np.ones(len(wide))), centred)} | views
    return FeatureStatistics(centre, views)


def _sizes(layout: FeatureLayout, config: Config) -> list[int]:
    """The sizes of ``logistic.sizes`` that fit the window; 1 stands in for none."""
    return [size for size in layout.sizes if size in config.logistic.sizes] or [1]


def _typical(differences: np.ndarray) -> np.ndarray:
    length = (differences**2).sum(axis=1)
    return differences[length <= np.quantile(length, KEPT)]


def _whitening(rows: np.ndarray, floor: float, of_largest: bool) -> np.ndarray:
    """``(f, f)`` with covariance ^ -POWER of rows ``(n, f)``, which are centred."""
    size, basis = np.linalg.eigh(rows.T @ rows / len(rows))
    size = np.maximum(size, 0.0)
    raised = size + floor * (size.max() if of_largest else size.mean())
    return basis * np.maximum(raised, np.finfo(np.float64).tiny) ** -POWER


def _with_tokens(
    means: np.ndarray, centred: np.ndarray, layout: FeatureLayout, config: Config, modalities: int
) -> View:
    """Window means of variance 1, class tokens and the mean token of the variance that the settings give them."""
    width = config.model.width
    scale = np.zeros(centred.shape[1])
    scale[means] = _variance(centred[:, means]) ** -0.5
    parts = ((layout.class_tokens, config.logistic.class_tokens), (layout.mean_token, config.logistic.mean_token))
    first = layout.means
    for count, weight in parts:
        modality = np.arange(count) // width % modalities
        for number in range(modalities if count else 0):
            columns = first + np.flatnonzero(modality == number)
            scale[columns] = (weight / modalities / _variance(centred[:, columns])) ** 0.5
        first += count
    columns = np.flatnonzero(scale)
    return View(columns, scale[columns])


def _variance(centred: np.ndarray) -> float:
    """Mean squared length of rows; 1 where they are all alike."""
    return float((centred**2).sum(axis=1).mean()) or 1.0


def _scaled(view: View, centred: np.ndarray) -> View:
    """The view with rows whose mean squared length is 1."""
    return View(view.columns, view.matrix * _variance(view.rows(centred)) ** -0.5)
