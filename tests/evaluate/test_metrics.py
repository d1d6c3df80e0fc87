"""Scores against figures worked out by hand, and against plain definitions on random labels."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.evaluate.metrics import (
    Scores,
    calibration_error,
    expected_calibration_error,
    paired_difference,
    score,
    summarise,
)


def test_worked_example() -> None:
    true = np.array([1, 1, 1, 1, 2, 2, 3, 3, 3, 3])
    predicted = np.array([1, 1, 1, 2, 2, 2, 3, 1, 3, 3])
    scores = score(true, predicted, [1, 2, 3])
    assert scores.confusion.tolist() == [[3, 1, 0], [0, 2, 0], [1, 0, 3]]
    assert scores.oa == pytest.approx(80.0)
    assert scores.aa == pytest.approx((75 + 100 + 75) / 3)
    chance = (4 * 4 + 2 * 3 + 4 * 3) / 100
    assert scores.kappa == pytest.approx(100 * (0.8 - chance) / (1 - chance))
    assert scores.per_class == pytest.approx({1: 75.0, 2: 100.0, 3: 75.0})
    assert scores.precision == pytest.approx({1: 75.0, 2: 200 / 3, 3: 100.0})
    assert scores.f1 == pytest.approx({1: 75.0, 2: 80.0, 3: 600 / 7})


def test_rows_follow_the_given_order_of_classes() -> None:
    scores = score(np.array([7, 7, 3]), np.array([7, 3, 3]), [7, 3])
    assert scores.confusion.tolist() == [[1, 1], [0, 1]]


def test_absent_class_leaves_the_average() -> None:
    scores = score(np.array([1, 1, 2, 2]), np.array([1, 9, 2, 2]), [1, 2, 9])
    assert scores.absent == (9,)
    assert math.isnan(scores.per_class[9]) and math.isnan(scores.f1[9])
    assert scores.precision[9] == 0.0
    assert scores.aa == pytest.approx(75.0)
    assert scores.to_dict()["per_class"]["9"] is None


def test_nodata_and_foreign_predictions_are_wrong() -> None:
    true = np.array([1, 1, 2, 2])
    scores = score(true, np.array([1, 0, 2, 77]), [1, 2])
    assert scores.unclassified == 2
    assert scores.oa == pytest.approx(50.0)
    assert scores.per_class == pytest.approx({1: 50.0, 2: 50.0})
    assert scores.confusion.sum() == 2
    chance = (2 * 1 + 2 * 1) / 16
    assert scores.kappa == pytest.approx(100 * (0.5 - chance) / (1 - chance))


@pytest.mark.parametrize(("predicted", "oa"), [([5, 5, 5], 100.0), ([0, 0, 0], 0.0), ([5, 5, 0], 200 / 3)])
def test_kappa_of_a_single_class_is_zero(predicted: list[int], oa: float) -> None:
    scores = score(np.array([5, 5, 5]), np.array(predicted), [5])
    assert scores.kappa == 0.0
    assert scores.oa == pytest.approx(oa)


def test_single_pixel_class_of_many() -> None:
    assert score(np.array([2]), np.array([2]), [1, 2]).kappa == 0.0


labels = st.integers(1, 200).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 5), min_size=n, max_size=n),
        st.lists(st.integers(0, 6), min_size=n, max_size=n),
    )
)


@given(labels)
def test_plain_definitions(pair: tuple[list[int], list[int]]) -> None:
    true, predicted = map(np.array, pair)
    classes = [1, 2, 3, 4, 5]
    scores = score(true, predicted, classes)
    assert scores.oa == pytest.approx(100 * np.mean(true == predicted))
    present = [c for c in classes if (true == c).any()]
    assert scores.aa == pytest.approx(np.mean([100 * np.mean(predicted[true == c] == c) for c in present]))
    assert set(present) | set(scores.absent) == set(classes)
    assert -100.0 <= scores.kappa <= 100.0
    assert scores.confusion.sum() + scores.unclassified == true.size
    json.dumps(scores.to_dict(), allow_nan=False)


def test_summary_of_runs() -> None:
    true = np.array([1, 1, 2, 2])
    runs = [score(true, np.array(p), [1, 2, 3]) for p in ([1, 1, 2, 2], [1, 2, 2, 2], [1, 2, 1, 2])]
    summary = summarise(runs)
    assert summary["oa_mean"] == pytest.approx(75.0)
    assert summary["oa_sd"] == pytest.approx(25.0)  # sample, not population
    assert summary["seeds"] == 3
    assert summary["per_class"] == {1: pytest.approx(200 / 3), 2: pytest.approx(250 / 3), 3: None}
    json.dumps(summary)


def test_one_run_has_no_spread() -> None:
    summary = summarise([score(np.array([1, 2]), np.array([1, 2]), [1, 2])])
    assert summary["oa_sd"] is None and summary["kappa_mean"] == 100.0


def test_two_classes_as_medicine_counts_them() -> None:
    true = np.array([1, 1, 1, 2, 2, 1])
    predicted = np.array([1, 1, 2, 2, 0, 1])
    ranking = np.array([0.1, 0.6, 0.6, 0.9, 0.3, 0.2])
    scores = score(true, predicted, [2, 1], ranking)  # the positive class is the larger value, in whatever order
    pairs = [(0.5 if p == n else float(p > n)) for p in ranking[true == 2] for n in ranking[true == 1]]
    assert scores.binary() == pytest.approx({"acc": 400 / 6, "auc": 100 * np.mean(pairs), "se": 50.0, "sp": 75.0})
    assert scores.to_dict()["se"] == 50.0 and "se" not in score(true, predicted, [1, 2, 3]).to_dict()
    without = score(true, predicted, [1, 2])
    assert math.isnan(without.auc) and without.to_dict()["auc"] is None
    summary = summarise([scores, score(true, true, [1, 2], true.astype(float))])
    assert summary["se_mean"] == pytest.approx(75.0) and summary["auc_mean"] == pytest.approx(50 + scores.auc / 2)
    assert summary["acc_mean"] == summary["oa_mean"] and summary["sp_sd"] == pytest.approx(25 / math.sqrt(2))
    summary = summarise([scores, without])
    assert summary["auc_mean"] is None and summary["auc_sd"] is None and summary["se_sd"] == 0.0
    json.dumps(summary, allow_nan=False)


def test_a_curve_needs_both_classes() -> None:
    assert math.isnan(score(np.array([2, 2]), np.array([2, 1]), [1, 2], np.array([0.2, 0.1])).auc)
    for ranking in (np.array([0.1]), np.array([0.1, np.nan])):
        with pytest.raises(UsageError, match="one finite number per pixel"):
            score(np.array([1, 2]), np.array([1, 2]), [1, 2], ranking)
    with pytest.raises(UsageError, match="goes with two classes"):
        score(np.array([1, 2]), np.array([1, 2]), [1, 2, 3], np.array([0.1, 0.2]))


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="one length"):
        score(np.array([1, 2]), np.array([1]), [1, 2])
    with pytest.raises(InputDataError, match="no test pixel"):
        score(np.array([], int), np.array([], int), [1])
    with pytest.raises(InputDataError, match=r"\[8\]"):
        score(np.array([1, 8]), np.array([1, 1]), [1])
    with pytest.raises(UsageError, match="distinct"):
        score(np.array([1]), np.array([1]), [1, 0])
    with pytest.raises(UsageError, match="at least one"):
        summarise([])


def test_calibration_error_by_hand() -> None:
    # Two bins: ten pixels at 0.95, six of them right (off by 0.35); ten at 0.35, all wrong (off by 0.35).
    probabilities = np.array([[0.95, 0.05]] * 10 + [[0.35, 0.35]] * 10)
    labels = np.array([0] * 6 + [1] * 14)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.35)
    sure = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert expected_calibration_error(sure, np.array([0, 1])) == 0.0
    assert expected_calibration_error(sure, np.array([1, 0])) == 1.0


@given(st.integers(0, 2**32 - 1))
def test_a_calibrated_forecast_has_a_small_error(seed: int) -> None:
    # 20,000 forecasts that come true as often as they say: each of 15 bins is off by about 1 / sqrt(1300).
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.3, 1.0, 20_000)
    assert calibration_error(confidence, rng.random(20_000) < confidence) < 0.03
    assert calibration_error(confidence, rng.random(20_000) < confidence / 2) > 0.2


def test_calibration_is_part_of_the_scores() -> None:
    true, predicted = np.array([1, 2, 2]), np.array([1, 2, 1])
    scores = score(true, predicted, [1, 2], confidence=np.array([0.9, 0.9, 0.9]))
    assert scores.ece == pytest.approx(100 * (0.9 - 2 / 3))
    assert scores.to_dict()["ece"] == scores.ece and score(true, predicted, [1, 2]).to_dict()["ece"] is None
    assert summarise([scores, scores])["ece_mean"] == pytest.approx(scores.ece)
    assert summarise([score(true, predicted, [1, 2])])["ece_mean"] is None


@pytest.mark.parametrize("confidence", [np.array([0.5]), np.array([0.5, 1.2, 0.1]), np.array([0.5, np.nan, 0.1])])
def test_confidences_that_are_none(confidence: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"confidence"):
        score(np.array([1, 2, 2]), np.array([1, 2, 1]), [1, 2], confidence=confidence)


def test_scores_come_back_from_json() -> None:
    true, predicted = np.array([1, 2, 2, 1]), np.array([1, 2, 1, 0])
    for classes, extra in (([1, 2], {"ranking": np.arange(4.0)}), ([1, 2, 9], {"confidence": np.full(4, 0.5)})):
        scores = score(true, predicted, classes, **extra)
        again = Scores.from_dict(json.loads(json.dumps(scores.to_dict(), allow_nan=False)))
        assert again.to_dict() == scores.to_dict() and again.binary().keys() == scores.binary().keys()
        np.testing.assert_array_equal(again.confusion, scores.confusion)


def test_paired_difference_by_hand() -> None:
    found = paired_difference([3.0, 5.0, 10.0], [1.0, 4.0, 4.0])
    assert found == {"mean": 3.0, "se": pytest.approx(np.std([2, 1, 6], ddof=1) / math.sqrt(3)), "draws": 3}
    assert paired_difference([3.0], [1.0]) == {"mean": 2.0, "se": None, "draws": 1}
    for first, second in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(UsageError, match="the same draws"):
            paired_difference(first, second)
