"""The convex fit: one optimum, scikit-learn's where classes are not tied, the prior's where they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from fastdiffclip.train.logistic_regression import (
    Fit,
    fit,
    folds_of,
    left_out,
    log_softmax,
    mean_loss,
    prior_root,
    span,
    temperature_of,
)


def shots(seed: int, classes: int, per_class: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    return random.standard_normal((classes, features))[labels] + random.standard_normal((len(labels), features)), labels


def tied(classes: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).random((classes, 6))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return prior_root(rows @ rows.T, 0.9)


@given(
    st.integers(3, 7), st.integers(1, 5), st.integers(1, 12), st.sampled_from([0.5, 0.05, 0.005]), st.integers(0, 99)
)
@settings(max_examples=25, deadline=None)
def test_without_ties_it_is_scikit_learns(classes: int, each: int, features: int, ridge: float, seed: int) -> None:
    rows, labels = shots(seed, classes, each, features)
    ours = fit(rows, labels, np.eye(classes), ridge)
    # mean loss + ridge / (2 K) |A|^2 is, times C, what scikit-learn minimises
    theirs = LogisticRegression(C=classes / (len(labels) * ridge), max_iter=10000, tol=1e-9).fit(rows, labels)
    probabilities = np.exp(log_softmax(ours.logits(rows, np.eye(classes))))
    np.testing.assert_allclose(probabilities, theirs.predict_proba(rows), atol=1e-4)


@given(st.integers(2, 6), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_two_starts_find_one_optimum(classes: int, each: int, features: int, seed: int) -> None:
    rows, labels = shots(seed, classes, each, features)
    texts = tied(classes)
    random = np.random.default_rng(seed)
    start = Fit(3 * random.standard_normal((classes, features)), random.standard_normal(classes), [])
    one, other = fit(rows, labels, texts, 0.05), fit(rows, labels, texts, 0.05, start)
    assert one.losses[-1] == pytest.approx(other.losses[-1], abs=1e-8)
    np.testing.assert_allclose(log_softmax(one.logits(rows, texts)), log_softmax(other.logits(rows, texts)), atol=2e-3)


def test_classes_weigh_the_same_however_many_shots_they_have() -> None:
    rows, labels = shots(2, 3, 2, 4)
    often = np.concatenate([np.arange(6), np.repeat(np.flatnonzero(labels == 1), 7)])
    one, other = fit(rows, labels, tied(3), 0.05), fit(rows[often], labels[often], tied(3), 0.05)
    assert other.losses[-1] == pytest.approx(one.losses[-1], abs=1e-8)
    np.testing.assert_allclose(one.weight, other.weight, atol=1e-3)


def test_the_span_of_the_shots_holds_the_optimum() -> None:
    rows, labels = shots(1, 4, 2, 60)
    texts = tied(4)
    inside, basis = span(rows)
    assert inside.shape == (8, 8)
    np.testing.assert_allclose(inside @ basis, rows, atol=1e-10)
    whole, small = fit(rows, labels, texts, 0.05), fit(inside, labels, texts, 0.05)
    np.testing.assert_allclose(small.weight @ basis, whole.weight, atol=2e-4)
    assert small.losses[-1] == pytest.approx(whole.losses[-1], abs=1e-8)
    assert span(np.zeros((3, 5)))[0].shape == (3, 0)


def test_the_prior_draws_classes_of_like_texts_together() -> None:
    rows, labels = shots(3, 3, 3, 8)
    near = prior_root(np.array([[1.0, 0.95, 0], [0.95, 1, 0], [0, 0, 1]]), 0.9)
    assert np.allclose(near @ near.T, np.array([[1, 0.855, 0], [0.855, 1, 0], [0, 0, 1]]))
    loose, drawn = (root @ fit(rows, labels, root, 0.2).weight for root in (np.eye(3), near))
    cosine = [float(w[0] @ w[1] / np.linalg.norm(w[0]) / np.linalg.norm(w[1])) for w in (loose, drawn)]
    assert cosine[1] > cosine[0] + 0.1


def test_a_shot_left_out_is_not_seen() -> None:
    rows, labels = shots(4, 3, 3, 5)
    texts = tied(3)
    whole = fit(rows, labels, texts, 0.05)
    held = left_out(rows, labels, texts, 0.05, whole, np.arange(9))
    changed = labels.copy()
    changed[4] = 2
    again = left_out(rows, changed, texts, 0.05, whole, np.arange(9))
    np.testing.assert_allclose(log_softmax(held[[4]]), log_softmax(again[[4]]), atol=1e-3)
    assert mean_loss(held, labels) > mean_loss(whole.logits(rows, texts), labels)
    in_parts = left_out(rows, labels, texts, 0.05, whole, np.tile([0, 1, 2], 3))  # each with a shot of every class
    assert not np.isnan(in_parts).any()
    of_a_class = left_out(rows, labels, texts, 0.05, whole, labels)
    assert np.isnan(of_a_class).all()


def test_what_is_left_out_together() -> None:
    assert np.array_equal(folds_of(np.array([0, 2, 1, 0]), 40), np.arange(4))
    labels = np.repeat(np.arange(3), 100)[np.random.default_rng(0).permutation(300)]
    folds = folds_of(labels, 40)
    for number in range(20):
        assert np.array_equal(np.bincount(labels[folds == number]), [5, 5, 5])


def test_the_only_shot_of_a_class_is_not_left_out() -> None:
    rows, labels = shots(5, 3, 2, 5)
    rows, labels = rows[:5], labels[:5]
    held = left_out(rows, labels, np.eye(3), 0.05, fit(rows, labels, np.eye(3), 0.05), np.arange(5))
    assert np.isnan(held[4]).all() and not np.isnan(held[:4]).any()
    assert temperature_of(np.full((3, 2), np.nan), np.zeros(3, int)) == 1.0


def test_the_temperature_is_the_likeliest() -> None:
    random = np.random.default_rng(0)
    logits = 2 * random.standard_normal((4000, 5))
    labels = np.array([random.choice(5, p=p) for p in np.exp(log_softmax(logits))])
    assert temperature_of(4 * logits, labels) == pytest.approx(4.0, rel=0.1)
    assert temperature_of(logits / 4, labels) == pytest.approx(0.25, rel=0.1)


def test_one_class() -> None:
    found = fit(np.ones((3, 2)), np.zeros(3, int), np.eye(1), 0.05)
    assert found.losses == [0.0] and np.array_equal(found.weight, np.zeros((1, 2)))
