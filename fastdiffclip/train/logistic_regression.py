"""Multinomial logistic regression with a Gaussian prior that ties the classes; fitted to convergence, float64, CPU.

The objective is convex. It is minimised over A (K x R) and b (K) with logits = L (A z) + b:

    sum_i w_i [ log sum_k exp(logit_ik) - logit_i,y(i) ] + ridge / (2 K) ||A||^2

where the weights w sum to 1, so that one ridge constant fits any number of shots, and every class weighs the same
however many shots it has. z are the features in a basis
of the shots' span: the optimum lies in it, and has then at most as many columns as there are shots.

Shape suffixes: N shots, F features, R rank, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_ITERATIONS = 2000
GRADIENT = 1e-6  # largest component of the gradient at which a fit counts as converged
TEMPERATURES = (0.02, 20.0)  # that are looked at
TYPICAL, SPREAD = 0.35, 0.5  # median of the prior of temperatures, standard deviation of its logarithm


@dataclass(frozen=True)
class Fit:
    """The optimum: ``weight`` (K, R), ``bias`` (K,), and the objective after every iteration."""

    weight: np.ndarray
    bias: np.ndarray
    losses: list[float]

    def logits(self, rows: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """``(N, K)`` of features ``(N, R)``."""
        return rows @ self.weight.T @ texts.T + self.bias


def span(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates ``(N, R)`` of rows ``(N, F)`` in an orthonormal basis ``(R, F)`` of what they span."""
    left, size, basis = np.linalg.svd(features, full_matrices=False)
    rank = int((size > size[:1].max(initial=0.0) * 1e-12).sum())
    return left[:, :rank] * size[:rank], basis[:rank]


def prior_root(similarity: np.ndarray, text: float) -> np.ndarray:
    """Lower triangular L (K, K) with L L^T = (1 - text) I + text * similarity."""
    return np.linalg.cholesky((1.0 - text) * np.eye(len(similarity)) + text * similarity)


def fit(
    rows: np.ndarray, labels: np.ndarray, texts: np.ndarray, ridge: float, start: Fit | None = None,
    gradient: float = GRADIENT,
) -> Fit:  # fmt: skip
    """Minimise the objective by L-BFGS.

    Args:
        rows: ``(N, R)``. labels: ``(N,)`` positions in ``texts``. texts: L, ``(K, K)``.
        ridge: the constant of the prior.
        start: where to start from, zeros without one; the optimum does not depend on it.
    """
    from scipy.optimize import minimize

    (count, rank), classes = rows.shape, len(texts)
    target = np.zeros((count, classes))
    target[np.arange(count), labels] = 1.0
    shots = target.sum(axis=0)
    share = (1.0 / shots[labels] / (shots > 0).sum())[:, None]
    losses: list[float] = []

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = point[: classes * rank].reshape(classes, rank), point[classes * rank :]
        logits = rows @ weight.T @ texts.T + bias
        top = logits.max(axis=1, keepdims=True)
        raised = np.exp(logits - top)
        total = raised.sum(axis=1, keepdims=True)
        loss = float((share * (np.log(total) + top - (logits * target).sum(axis=1, keepdims=True))).sum())
        slope = share * (raised / total - target)
        down = (slope @ texts).T @ rows + ridge / classes * weight
        return loss + 0.5 * ridge / classes * float((weight**2).sum()), np.append(down, slope.sum(axis=0))

    begin = np.zeros(classes * rank + classes) if start is None else np.append(start.weight, start.bias)
    found = minimize(
        objective, begin, jac=True, method="L-BFGS-B", callback=lambda intermediate_result: losses.append(
            float(intermediate_result.fun)),
        options={"maxiter": MAX_ITERATIONS, "maxfun": 4 * MAX_ITERATIONS, "gtol": gradient, "ftol": 0.0, "maxcor": 20},
    )  # fmt: skip
    weight, bias = found.x[: classes * rank].reshape(classes, rank), found.x[classes * rank :]
    return Fit(weight, bias, losses or [float(found.fun)])


def folds_of(labels: np.ndarray, most: int) -> np.ndarray:
    """Which shots are left out together, ``(N,)`` numbers from 0: each by itself, up to ``most`` shots.

    More are dealt out to ``most // 2`` folds, class by class.
    """
    folds = np.arange(len(labels))
    if len(labels) > most:
        folds[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % (most // 2)
    return folds


def left_out(
    rows: np.ndarray, labels: np.ndarray, texts: np.ndarray, ridge: float, whole: Fit, folds: np.ndarray
) -> np.ndarray:
    """Logits ``(N, K)`` of every shot from a fit without its fold, NaN where that leaves a class without a shot."""
    logits = np.full((len(labels), len(texts)), np.nan)
    present = np.unique(labels).size
    for number in range(int(folds.max()) + 1):
        out = folds == number
        if np.unique(labels[~out]).size == present:
            logits[out] = fit(rows[~out], labels[~out], texts, ridge, whole, 1e-4).logits(rows[out], texts)
    return logits


def mean_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy of ``(N, K)`` logits over the rows that are known; NaN where none is."""
    known = ~np.isnan(logits).any(axis=1)
    if not known.any():
        return float("nan")
    return float(-log_softmax(logits[known])[np.arange(int(known.sum())), labels[known]].mean())


def temperature_of(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature (Guo et al. 2017) that is likeliest given held-out logits and what is typical.

    Its logarithm has a normal prior, for a handful of shots says little. 1 where no shot is held out.
    """
    from scipy.optimize import minimize_scalar

    known = int((~np.isnan(logits).any(axis=1)).sum())
    if known == 0:
        return 1.0

    def unlikeliness(power: float) -> float:
        return known * mean_loss(logits / np.exp(power), labels) + 0.5 * ((power - np.log(TYPICAL)) / SPREAD) ** 2

    low, high = np.log(TEMPERATURES)
    return float(np.exp(minimize_scalar(unlikeliness, bounds=(low, high), method="bounded").x))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities, row by row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
