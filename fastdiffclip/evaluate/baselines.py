"""What a user would pick instead: classical classifiers on the same few labelled pixels.

`svm`, `extratrees` and `1nn` see per-pixel features of the `standard` front end (every band standardised with
the scene's statistics), either the centre pixel alone or the centre and the mean of its window. `linear` sees
window means of the `mnf` front end and no network: the control that shows what a network adds. Everything
runs on one thread and gives the same labels for the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastdiffclip.errors import UsageError, nearest

BASELINES = ("svm", "extratrees", "1nn")
LINEAR_WINDOWS = (3, 5)
# Of 2, 20, 200, 2000 the best on average over Houston 2013, OSBS and Salinas-A at 2, 5 and 20 shots.
LINEAR_C = 20.0
# The first of each is the setting without a search, and wins ties: a handful of pixels scores many settings
# alike.
SVM_C = (100.0, 10.0, 1000.0, 1.0)
SVM_GAMMA = (1.0, 0.25, 4.0)  # times 1 / (number of features * their variance)
SVM_FOLDS = 5
SVM_FEWEST = 3  # labelled pixels of every class from which a search is worth its noise


def centre_and_mean_features(windows: Mapping[str, np.ndarray], size: int | None = None) -> dict[str, np.ndarray]:
    """Turn windows into the two feature sets of the classical baselines.

    Parameters
    ----------
    windows : modality -> (B, P*P, C_m) prepared values, pixels row by row, one P (odd) for all modalities.
    size : side of the centred window to average (odd, at most P); None averages the whole window.

    Returns ``pixel`` (B, F), the centre pixel of all modalities with F = sum of C_m, and ``window`` (B, 2F),
    the centre and the mean, float32. Raises UsageError for windows that are not odd squares or do not go
    together.
    """
    side = _side(windows)
    size = side if size is None else size
    if size < 1 or size > side or size % 2 == 0:
        raise UsageError(f"the window to average must be odd and at most {side} pixels wide, got {size}")
    pixel = _block_mean(windows, 1)
    return {"pixel": pixel, "window": np.concatenate([pixel, _block_mean(windows, size)], axis=1)}


def predict_baseline(
    name: str,
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    *,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Fit baseline ``name`` on (N, F) features and N class values; return the class values (M,) of (M, F).

    With two classes `svm` and `extratrees` also return a ranking (M,) float64, larger where the larger class
    value is more likely (decision function, share of trees); else None.

    ``svm`` is an RBF SVM (one against one) with C = 100 and gamma = 1 / (F * variance); where every class has
    at least 3 labelled pixels, C (1 to 1000) and gamma (a quarter to four times that) are chosen by
    stratified cross-validation on them. ``extratrees`` are 500 trees, ``1nn`` is the nearest neighbour in
    Euclidean distance. A single class is predicted everywhere. Raises UsageError for an unknown name, or for
    shapes that do not go together.
    """
    if name not in BASELINES:
        raise UsageError(f"there is no baseline '{name}'{nearest(name, BASELINES)}; there are {', '.join(BASELINES)}")
    _check_fit(train_features, train_labels, test_features)
    found = np.unique(train_labels)
    if found.size == 1:
        return np.full(len(test_features), found[0], dtype=found.dtype), None
    if len(test_features) == 0:
        return np.empty(0, dtype=found.dtype), None
    make = {"svm": _svm, "extratrees": _extratrees, "1nn": _nearest_neighbour}[name]
    model = make(train_features, train_labels, seed).fit(train_features, train_labels)
    return model.predict(test_features), _ranking(name, model, test_features) if found.size == 2 else None


def predict_linear(
    train_windows: Mapping[str, np.ndarray], train_labels: np.ndarray, test_windows: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logistic regression on window means of the `mnf` front end: the control without a network.

    Windows are modality -> (B, P*P, C_m) values of the fitted `mnf` front end. For each of the 3 x 3 and 5 x
    5 means (1 x 1 or 3 x 3 alone where P is smaller) the modalities are joined to one row, the row is
    L2-normalised as a whole (a block of one band normalised by itself would keep only its sign), and a
    multinomial logistic regression is fitted whose ridge is constant relative to the mean loss: C = 20 /
    shots, shots being the mean number of labelled pixels per class. The posteriors are joined by their
    geometric mean.

    Returns labels (M,), probabilities (M, K) float64 with rows that sum to 1, and the K class values in their
    order. Raises UsageError for windows or labels that do not go together.
    """
    side, test_side = _side(train_windows), _side(test_windows)
    if side != test_side or list(train_windows) != list(test_windows):
        raise UsageError(
            f"training and test windows differ: {list(train_windows)} of side {side}, "
            f"{list(test_windows)} of side {test_side}"
        )
    sizes = [size for size in LINEAR_WINDOWS if size <= side] or [1]
    classes = np.unique(train_labels)
    log_posterior = np.zeros((_count(test_windows), classes.size))
    for size in sizes:
        train_rows, test_rows = (_unit_rows(_block_mean(w, size)) for w in (train_windows, test_windows))
        log_posterior += _log_posterior(train_rows, train_labels, test_rows) / len(sizes)
    log_posterior -= np.logaddexp.reduce(log_posterior, axis=1, keepdims=True)
    return classes[log_posterior.argmax(axis=1)], np.exp(log_posterior), classes


def _ranking(name: str, model: Any, features: np.ndarray) -> np.ndarray | None:
    if name == "svm":
        return np.asarray(model.decision_function(features), np.float64)
    return np.asarray(model.predict_proba(features)[:, 1], np.float64) if name == "extratrees" else None


def _svm(features: np.ndarray, labels: np.ndarray, seed: int) -> Any:
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.svm import SVC

    fewest = int(np.unique(labels, return_counts=True)[1].min())
    if fewest < SVM_FEWEST:
        return SVC(C=SVM_C[0], gamma="scale")
    spread = features.shape[1] * float(features.var(dtype=np.float64))
    gammas = [factor / spread for factor in SVM_GAMMA] if spread > 0 else ["scale"]
    grid = [{"C": [c], "gamma": [gamma]} for gamma in gammas for c in SVM_C]
    folds = StratifiedKFold(min(fewest, SVM_FOLDS), shuffle=True, random_state=seed)
    return GridSearchCV(SVC(), grid, cv=folds, n_jobs=1)


def _extratrees(features: np.ndarray, labels: np.ndarray, seed: int) -> Any:
    from sklearn.ensemble import ExtraTreesClassifier

    return ExtraTreesClassifier(500, random_state=seed, n_jobs=1)


def _nearest_neighbour(features: np.ndarray, labels: np.ndarray, seed: int) -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(1, n_jobs=1)


def _log_posterior(train_rows: np.ndarray, labels: np.ndarray, test_rows: np.ndarray) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression

    _check_fit(train_rows, labels, test_rows)
    classes = np.unique(labels)
    if classes.size == 1 or len(test_rows) == 0:
        return np.zeros((len(test_rows), classes.size))
    shots = len(labels) / classes.size
    model = LogisticRegression(C=LINEAR_C / shots, max_iter=1000).fit(train_rows, labels)
    return model.predict_log_proba(test_rows)


def _block_mean(windows: Mapping[str, np.ndarray], size: int) -> np.ndarray:
    """Mean of the centred size x size block of every modality, joined: (B, sum of C_m) float32."""
    side = _side(windows)
    first, last = (side - size) // 2, (side + size) // 2
    means = []
    for block in windows.values():
        grid = block.reshape(len(block), side, side, block.shape[2])
        means.append(grid[:, first:last, first:last].mean(axis=(1, 2), dtype=np.float64))
    return np.concatenate(means, axis=1).astype(np.float32)


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1)


def _side(windows: Mapping[str, np.ndarray]) -> int:
    shapes = {name: block.shape for name, block in windows.items()}
    if not shapes or any(len(shape) != 3 for shape in shapes.values()):
        raise UsageError(f"windows must be (number, pixels, channels) per modality, got {shapes}")
    if len({shape[:2] for shape in shapes.values()}) > 1:
        raise UsageError(f"the modalities' windows differ in number or size: {shapes}")
    pixels = next(iter(shapes.values()))[1]
    side = math.isqrt(pixels)
    if side * side != pixels or side % 2 == 0:
        raise UsageError(f"a window must be an odd square of pixels, got {pixels} pixels")
    return side


def _count(windows: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(windows.values())))


def _check_fit(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> None:
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1] or labels.shape != (len(train),):
        raise UsageError(
            f"features and labels do not go together: training {train.shape} with labels {labels.shape}, "
            f"test {test.shape}"
        )
    if len(labels) == 0:
        raise UsageError("there is no labelled pixel to train a baseline on")
