"""Baselines against plain definitions, on separable data, and on Salinas-A."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdiffclip.errors import UsageError
from fastdiffclip.evaluate.baselines import (
    BASELINES,
    centre_and_mean_features,
    predict_baseline,
    predict_linear,
)
from fastdiffclip.evaluate.metrics import score


def clouds(shots: int, classes: int = 3, channels: int = 8, side: int = 5, seed: int = 0):
    """Windows of two modalities whose classes lie apart; labels are 2, 4, 6, ..."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(99).normal(0, 3, (classes, channels))
    labels = np.repeat(2 * np.arange(1, classes + 1), shots)
    noise = rng.normal(0, 1, (labels.size, side * side, channels))
    windows = {
        "hsi": (means[labels // 2 - 1][:, None] + noise).astype(np.float32),
        "lidar": rng.normal(0, 1, (labels.size, side * side, 1)).astype(np.float32),
    }
    return windows, labels


@given(
    number=st.integers(0, 4),
    side=st.sampled_from([1, 3, 5, 7]),
    channels=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    data=st.data(),
)
def test_features_by_definition(number: int, side: int, channels: list[int], data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([None, *range(1, side + 1, 2)]))
    rng = np.random.default_rng(0)
    windows = {f"m{i}": rng.normal(size=(number, side * side, c)).astype(np.float32) for i, c in enumerate(channels)}
    features = centre_and_mean_features(windows, size)
    width = sum(channels)
    assert features["pixel"].shape == (number, width) and features["window"].shape == (number, 2 * width)
    assert features["pixel"].dtype == features["window"].dtype == np.float32
    rows, cols = np.divmod(np.arange(side * side), side)
    radius = ((size or side) - 1) // 2
    inside = np.maximum(abs(rows - side // 2), abs(cols - side // 2)) <= radius
    centre = np.concatenate([w[:, side * side // 2] for w in windows.values()], axis=1)
    mean = np.concatenate([w[:, inside].mean(axis=1) for w in windows.values()], axis=1)
    np.testing.assert_array_equal(features["pixel"], centre)
    np.testing.assert_allclose(features["window"], np.concatenate([centre, mean], axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("shots", [1, 2, 6])
def test_separable_classes(name: str, shots: int) -> None:
    train, labels = clouds(shots)
    test, truth = clouds(20, seed=1)
    for kind in ("pixel", "window"):
        inputs = centre_and_mean_features(train)[kind], labels, centre_and_mean_features(test)[kind]
        predicted, ranking = predict_baseline(name, *inputs, seed=3)
        assert score(truth, predicted, [2, 4, 6]).oa > 85.0 and ranking is None
        np.testing.assert_array_equal(predicted, predict_baseline(name, *inputs, seed=3)[0])


@pytest.mark.parametrize("name", ["svm", "extratrees"])
@pytest.mark.parametrize("shots", [1, 6])
def test_two_classes_are_ranked(name: str, shots: int) -> None:
    train, labels = clouds(shots, classes=2)
    test, truth = clouds(20, classes=2, seed=1)
    features = [centre_and_mean_features(part)["window"] for part in (train, test)]
    predicted, ranking = predict_baseline(name, features[0], labels, features[1])
    assert ranking is not None and ranking.dtype == np.float64
    assert ranking[predicted == 4].min() >= ranking[predicted == 2].max()
    assert score(truth, predicted, [2, 4], ranking).auc > 95.0
    assert predict_baseline("1nn", features[0], labels, features[1])[1] is None


def test_nearest_neighbour_by_definition() -> None:
    rng = np.random.default_rng(4)
    train, test, labels = rng.normal(size=(9, 5)), rng.normal(size=(40, 5)), rng.integers(1, 4, 9)
    nearest = ((test[:, None] - train[None]) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(predict_baseline("1nn", train, labels, test)[0], labels[nearest])


def test_svm_searches_only_where_every_class_has_three() -> None:
    from fastdiffclip.evaluate.baselines import _svm

    features = np.random.default_rng(0).normal(size=(8, 4))
    assert type(_svm(features, np.array([1, 1, 1, 1, 1, 1, 2, 2]), 0)).__name__ == "SVC"
    search = _svm(features, np.array([1, 1, 1, 1, 1, 2, 2, 2]), 0)
    assert search.cv.get_n_splits() == 3 and len(search.param_grid) == 12


@pytest.mark.parametrize("name", BASELINES)
def test_one_class_constant_features_and_no_test(name: str) -> None:
    train, test = np.ones((4, 3)), np.zeros((2, 3))
    np.testing.assert_array_equal(predict_baseline(name, train, np.full(4, 9), test)[0], [9, 9])
    assert set(predict_baseline(name, np.ones((6, 3)), np.repeat([1, 2], 3), test)[0]) <= {1, 2}
    assert predict_baseline(name, train, np.array([1, 1, 2, 2]), np.empty((0, 3)))[0].shape == (0,)


@pytest.mark.parametrize("side", [1, 3, 5, 11])
@pytest.mark.parametrize("shots", [1, 2, 20])
def test_linear_on_separable_classes(side: int, shots: int) -> None:
    train, labels = clouds(shots, side=side)
    test, truth = clouds(20, side=side, seed=1)
    predicted, probabilities, classes = predict_linear(train, labels, test)
    assert classes.tolist() == [2, 4, 6]
    assert score(truth, predicted, [2, 4, 6]).oa > 85.0
    assert probabilities.shape == (60, 3) and probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0)
    np.testing.assert_array_equal(classes[probabilities.argmax(axis=1)], predicted)


def test_linear_uses_the_inner_five_by_five_and_no_row_length() -> None:
    train, labels = clouds(4, side=7)
    test, _ = clouds(5, side=7, seed=1)
    _, expected, _ = predict_linear(train, labels, test)
    rows, cols = np.divmod(np.arange(49), 7)
    outer = np.maximum(abs(rows - 3), abs(cols - 3)) == 3
    changed = {name: 10 * np.where(outer[None, :, None], 1e3, block) for name, block in test.items()}
    np.testing.assert_allclose(predict_linear(train, labels, changed)[1], expected, rtol=1e-4)


def test_linear_joins_posteriors_by_their_geometric_mean() -> None:
    from sklearn.linear_model import LogisticRegression

    train, labels = clouds(3)
    test, _ = clouds(4, seed=1)
    logs = []
    for inner in (np.s_[1:4], np.s_[:]):
        rows = []
        for windows in (train, test):
            means = [w.reshape(len(w), 5, 5, -1)[:, inner, inner].mean((1, 2)) for w in windows.values()]
            joined = np.concatenate(means, axis=1)
            rows.append(joined / np.linalg.norm(joined, axis=1, keepdims=True))
        logs.append(LogisticRegression(C=20 / 3, max_iter=1000).fit(rows[0], labels).predict_log_proba(rows[1]))
    expected = np.exp((logs[0] + logs[1]) / 2)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(predict_linear(train, labels, test)[1], expected, rtol=1e-3, atol=1e-5)


def test_linear_with_one_class_empty_windows_and_no_test() -> None:
    train, _ = clouds(2)
    labels, probabilities, classes = predict_linear(train, np.full(6, 7), train)
    assert set(labels) == {7} and classes.tolist() == [7] and (probabilities == 1).all()
    zeros = {name: np.zeros_like(block) for name, block in train.items()}
    assert np.isfinite(predict_linear(train, np.repeat([1, 2], 3), zeros)[1]).all()
    none = {name: block[:0] for name, block in train.items()}
    assert predict_linear(train, np.repeat([1, 2], 3), none)[1].shape == (0, 2)


def test_what_is_refused() -> None:
    features, labels = np.ones((4, 3)), np.array([1, 1, 2, 2])
    with pytest.raises(UsageError, match="did you mean 'extratrees'"):
        predict_baseline("extratree", features, labels, features)
    with pytest.raises(UsageError, match="do not go together"):
        predict_baseline("svm", features, labels[:3], features)
    with pytest.raises(UsageError, match="no labelled pixel"):
        predict_baseline("svm", features[:0], labels[:0], features)
    for windows in ({}, {"hsi": np.ones((2, 4, 3))}, {"hsi": np.ones((2, 8, 3))}, {"hsi": np.ones((2, 9))}):
        with pytest.raises(UsageError):
            centre_and_mean_features(windows)
    with pytest.raises(UsageError, match="differ in number"):
        centre_and_mean_features({"hsi": np.ones((2, 9, 3)), "lidar": np.ones((2, 25, 1))})
    with pytest.raises(UsageError, match="odd and at most 3"):
        centre_and_mean_features({"hsi": np.ones((2, 9, 3))}, size=5)
    with pytest.raises(UsageError, match="differ"):
        predict_linear({"hsi": np.ones((4, 9, 3))}, labels, {"lidar": np.ones((4, 9, 3))})


def test_salinas_a_halves(real_data: Path) -> None:
    """Five shots a class from one half of each field, tested on the other: the SVM is near 96 % there."""
    from scipy.io import loadmat

    cube = loadmat(real_data / "salinas_a/salinasA_corrected.mat")["salinasA_corrected"].astype(np.float32)
    truth = loadmat(real_data / "salinas_a/salinasA_gt.mat")["salinasA_gt"]
    values = (cube - cube.mean((0, 1))) / cube.std((0, 1))
    rng = np.random.default_rng(0)
    train, test = [], []
    for value in np.unique(truth[truth > 0]):
        rows, cols = np.nonzero(truth == value)
        first = np.nonzero(rows < np.median(rows))[0]
        second = np.nonzero(rows >= np.median(rows) + 4)[0]
        chosen = rng.choice(first, 5, replace=False)
        train.append((rows[chosen], cols[chosen]))
        test.append((rows[second], cols[second]))
    (train_at, test_at) = (tuple(np.concatenate(axis) for axis in zip(*part, strict=True)) for part in (train, test))
    predicted, _ = predict_baseline("svm", values[train_at], truth[train_at], values[test_at])
    assert score(truth[test_at], predicted, np.unique(truth[truth > 0]).tolist()).aa > 85.0
