"""Figures of merit of a classification, in the units of the field's tables.

Accuracies and kappa are given in percent: 0 to 100 for accuracies, -100 to 100 for kappa.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdiffclip.errors import InputDataError, UsageError

UNCLASSIFIED = 0
BINARY = ("acc", "auc", "se", "sp")  # figures of a task with two classes, as medicine names them
CALIBRATION_BINS = 15  # Guo et al. 2017, "On Calibration of Modern Neural Networks"


@dataclass(frozen=True, eq=False)
class Scores:
    """Figures of one classification of one test set; K classes.

    ``oa``, ``aa``, ``kappa``, ``auc`` and the per-class figures are percentages. A class without test pixels
    has no accuracy (NaN, listed in ``absent``) and does not enter ``aa``.
    """

    classes: tuple[int, ...]
    oa: float
    aa: float
    kappa: float
    per_class: dict[int, float]  # accuracy of each class's own pixels (recall, "producer's accuracy")
    precision: dict[int, float]  # share of the pixels given this class that have it; NaN where never given
    f1: dict[int, float]  # NaN for an absent class
    confusion: np.ndarray  # (K, K) int64, rows true, columns predicted, in the order of `classes`
    pixels: int
    unclassified: int  # pixels predicted as none of the classes: they count as wrong, in no column
    absent: tuple[int, ...]
    auc: float = math.nan  # area under the ROC curve; NaN without two classes that both have pixels, or without ranking
    ece: float = math.nan  # expected calibration error in percent; NaN for a method without probabilities

    def binary(self) -> dict[str, float]:
        """Return ``acc``, ``auc``, ``se``, ``sp`` where there are two classes, else nothing.

        The larger class value is the positive one: ``se`` (sensitivity) is its accuracy, ``sp`` (specificity)
        that of the other; ``acc`` is ``oa`` under the name that goes with them.
        """
        if len(self.classes) != 2:
            return {}
        negative, positive = sorted(self.classes)
        figures = (self.oa, self.auc, self.per_class[positive], self.per_class[negative])
        return dict(zip(BINARY, figures, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and string keys for JSON; a figure that does not exist is None."""
        by_class = ("per_class", "precision", "f1")
        tables = {
            name: {str(value): _number(figure) for value, figure in getattr(self, name).items()} for name in by_class
        }
        return {
            "classes": list(self.classes),
            "oa": _number(self.oa),
            "aa": _number(self.aa),
            "kappa": _number(self.kappa),
            **{name: _number(figure) for name, figure in self.binary().items()},
            "ece": _number(self.ece),
            **tables,
            "confusion": self.confusion.tolist(),
            "pixels": self.pixels,
            "unclassified": self.unclassified,
            "absent": list(self.absent),
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Scores:
        """Read :meth:`to_dict` back."""

        def by_class(name: str) -> dict[int, float]:
            return {int(value): _figure(figure) for value, figure in entry[name].items()}

        return cls(
            classes=tuple(entry["classes"]),
            oa=_figure(entry["oa"]),
            aa=_figure(entry["aa"]),
            kappa=_figure(entry["kappa"]),
            per_class=by_class("per_class"),
            precision=by_class("precision"),
            f1=by_class("f1"),
            confusion=np.array(entry["confusion"], np.int64),
            pixels=entry["pixels"],
            unclassified=entry["unclassified"],
            absent=tuple(entry["absent"]),
            auc=_figure(entry.get("auc")),
            ece=_figure(entry.get("ece")),
        )


def score(
    true: np.ndarray,
    predicted: np.ndarray,
    classes: Sequence[int],
    ranking: np.ndarray | None = None,
    confidence: np.ndarray | None = None,
) -> Scores:
    """Compare predicted with true class values.

    Parameters
    ----------
    true : (N,) integers, each one of ``classes``.
    predicted : (N,) integers. 0 (nodata) and any value outside ``classes`` count as wrong.
    classes : the K class values, distinct and not 0; they order the rows of the confusion matrix.
    ranking : (N,) float, with two classes: the larger, the more surely the larger class value, for ``auc``.
    confidence : (N,) float in 0 to 1, the probability given to ``predicted``, for ``ece``.

    Kappa is Cohen's; unclassified pixels are one more category that no true pixel has. Where chance alone
    explains everything (a single class, all of it found) kappa is undefined and given as 0: the agreement
    shows no skill.

    Raises UsageError for arguments that do not go together, InputDataError for true values without a class.
    """
    from sklearn.metrics import cohen_kappa_score, confusion_matrix

    true, predicted = np.asarray(true), np.asarray(predicted)
    values = _checked_classes(true, predicted, classes)
    known = np.where(np.isin(predicted, values), predicted, UNCLASSIFIED)
    labels = [UNCLASSIFIED, *values]
    counts = confusion_matrix(true, known, labels=labels).astype(np.int64)[1:]
    confusion, support = counts[:, 1:], counts.sum(axis=1)
    given = confusion.sum(axis=0)
    hits = np.diag(confusion)
    recall, precision = _percent(hits, support), _percent(hits, given)
    f1 = np.where(support > 0, _percent(2 * hits, support + given), np.nan)

    undefined = np.unique(np.concatenate([true, known])).size == 1
    kappa = 0.0 if undefined else 100.0 * cohen_kappa_score(true, known, labels=labels)
    return Scores(
        classes=tuple(values),
        oa=100.0 * float(hits.sum()) / true.size,
        aa=float(np.nanmean(recall)),
        kappa=float(kappa),
        per_class=dict(zip(values, recall.tolist(), strict=True)),
        precision=dict(zip(values, precision.tolist(), strict=True)),
        f1=dict(zip(values, f1.tolist(), strict=True)),
        confusion=confusion,
        pixels=int(true.size),
        unclassified=int(counts[:, 0].sum()),
        absent=tuple(value for value, count in zip(values, support, strict=True) if count == 0),
        auc=math.nan if ranking is None else _area_under_curve(true, np.asarray(ranking), values),
        ece=math.nan if confidence is None else 100.0 * calibration_error(np.asarray(confidence), true == predicted),
    )


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """:func:`calibration_error` of (N, K) class probabilities whose true columns are ``labels`` (N,) int, 0 to 1.

    Raises UsageError for arguments that do not go together.
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise UsageError(f"probabilities are (N, K) and labels (N,), got {probabilities.shape} and {labels.shape}")
    return calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels)


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """How far confidence lies from accuracy: mean over 15 equal bins of (0, 1], weighted by their pixels; 0 to 1.

    ``confidence`` (N,) float in 0 to 1, ``correct`` (N,) bool. Raises UsageError for arguments that do not go together.
    """
    if confidence.ndim != 1 or confidence.shape != correct.shape or confidence.size == 0:
        raise UsageError(f"confidence and hits are two vectors of one length, got {confidence.shape}, {correct.shape}")
    if not (confidence.min() >= 0 and confidence.max() <= 1):  # NaN compares false
        raise UsageError("a confidence is a probability; some lie outside 0 to 1")
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
    surplus = np.bincount(bins, confidence - correct, CALIBRATION_BINS)
    return float(np.abs(surplus).sum() / confidence.size)


def _area_under_curve(true: np.ndarray, ranking: np.ndarray, values: list[int]) -> float:
    from sklearn.metrics import roc_auc_score

    if len(values) != 2 or ranking.shape != true.shape or not np.isfinite(ranking).all():
        raise UsageError(
            f"a ranking goes with two classes and is one finite number per pixel, got {len(values)} classes, "
            f"{ranking.shape} for {true.shape}"
        )
    positive = true == max(values)
    return math.nan if positive.all() or not positive.any() else 100.0 * float(roc_auc_score(positive, ranking))


def summarise(runs: Sequence[Scores]) -> dict[str, Any]:
    """Mean and sample standard deviation (ddof = 1) over runs, as `evaluate --json` names them.

    Returns ``oa_mean, oa_sd, aa_mean, aa_sd, kappa_mean, kappa_sd, ece_mean, ece_sd`` (percent), ``seeds`` (number of
    runs) and ``per_class`` (class value -> mean accuracy over the runs whose test set has the class, None if none has).
    One run has no spread: its sd is None; so is ``ece`` without probabilities. Runs with two classes add means and sd
    of ``acc``, ``auc``, ``se`` and ``sp`` (see :meth:`Scores.binary`), None where a run has no such figure.
    Raises UsageError without any run.
    """
    if not runs:
        raise UsageError("there are no runs to summarise; give at least one")
    summary: dict[str, Any] = {}
    rows = [{"oa": run.oa, "aa": run.aa, "kappa": run.kappa, "ece": run.ece, **run.binary()} for run in runs]
    for name in rows[0]:
        figures = np.array([row[name] for row in rows])
        summary[f"{name}_mean"] = _number(figures.mean())
        summary[f"{name}_sd"] = _number(figures.std(ddof=1)) if len(runs) > 1 else None
    summary["seeds"] = len(runs)
    summary["per_class"] = {
        value: _mean_of_existing([run.per_class.get(value, math.nan) for run in runs])
        for value in sorted({value for run in runs for value in run.classes})
    }
    return summary


def paired_difference(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Mean of ``first - second`` over draws that both were given, and its standard error (None for one draw).

    Returns ``mean``, ``se`` and ``draws``. Raises UsageError for sequences of different length or none.
    """
    if len(first) != len(second) or not len(first):
        raise UsageError(f"differences are taken of the same draws, got {len(first)} and {len(second)}")
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    error = differences.std(ddof=1) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return {"mean": float(differences.mean()), "se": None if error is None else float(error), "draws": len(first)}


def _checked_classes(true: np.ndarray, predicted: np.ndarray, classes: Sequence[int]) -> list[int]:
    values = [int(value) for value in classes]
    if true.ndim != 1 or true.shape != predicted.shape:
        raise UsageError(
            f"true and predicted labels must be two vectors of one length, got {true.shape} and {predicted.shape}"
        )
    if true.size == 0:
        raise InputDataError("there is no test pixel to score; the split left none for any class")
    if not values or len(set(values)) != len(values) or UNCLASSIFIED in values:
        raise UsageError(f"classes must be distinct values other than 0, got {values}")
    strangers = np.setdiff1d(true, values)
    if strangers.size:
        raise InputDataError(
            f"true labels hold the values {strangers[:10].tolist()}, which no class has; "
            f"the classes are {values}. Add them to the class table or leave those pixels out"
        )
    return values


def _percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(100.0 * part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _mean_of_existing(figures: list[float]) -> float | None:
    existing = [figure for figure in figures if not math.isnan(figure)]
    return float(np.mean(existing)) if existing else None


def _figure(number: float | None) -> float:
    return math.nan if number is None else float(number)


def _number(figure: float) -> float | None:
    return None if math.isnan(figure) else float(figure)
