"""A class added to a fitted head: the conditional fit against the whole one, shares that are kept, and edges."""

from __future__ import annotations

import numpy as np
import pytest

from fastdiffclip.config import Config, LogisticConfig
from fastdiffclip.errors import UsageError
from fastdiffclip.scene.store import ClassInfo
from fastdiffclip.train.logistic import fit_head
from fastdiffclip.train.logistic_regression import prior_root
from fastdiffclip.train.new_class import KnownClasses, NewClass, biases_for_shares, fit_one_class
from fastdiffclip.train.views import FeatureStatistics, View

PROMPTS = ("grass: green blades", "road: grey asphalt", "roof: red tiles", "pond: dark water")
CLASSES = tuple(ClassInfo(place + 1, text.partition(":")[0]) for place, text in enumerate(PROMPTS))
FEATURES = 6


def statistics() -> FeatureStatistics:
    every = np.arange(FEATURES)
    return FeatureStatistics(
        np.zeros(FEATURES), {"means": View(every, np.ones(FEATURES)), "pixel": View(every[:4], np.ones(4))}
    )


def drawn(per_class: int, seed: int = 0, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    middle = np.random.default_rng(7).normal(size=(classes, FEATURES))
    labels = np.repeat(np.arange(classes), per_class)
    return middle[labels] + 0.3 * rng.normal(size=(len(labels), FEATURES)), labels


def known_of(config: Config, features: np.ndarray, labels: np.ndarray) -> tuple[KnownClasses, dict[str, float]]:
    """Three classes fitted to the shots of those below 3."""
    there = labels < 3
    places = np.zeros((there.sum(), 3), np.int64)
    head = fit_head(features[there], labels[there], places, PROMPTS[:3], statistics(), config.logistic)
    return KnownClasses(CLASSES[:3], PROMPTS[:3], head.texts, head.bias, head.centre, head.weight), head.shares


@pytest.fixture
def config() -> Config:
    return Config(logistic=LogisticConfig(views=("means", "pixel")))


@pytest.mark.parametrize("shots", [1, 2, 5])
def test_with_shots_it_is_found_and_the_others_stay(config: Config, shots: int) -> None:
    features, labels = drawn(5)
    take = np.flatnonzero((labels < 3) | (np.cumsum(labels == 3) <= shots))
    known, shares = known_of(config, features, labels)
    new = NewClass(CLASSES[3], PROMPTS[3])
    wider = known.with_shots(new, features[take], labels[take], statistics(), shares, config)
    test, truth = drawn(50, seed=1)
    before, after = known.logits(test), wider.logits(test)
    np.testing.assert_allclose(after[:, :3], before, atol=1e-12)
    assert (after.argmax(1) == truth).mean() > 0.95
    assert wider.added[0] | {"likeness": None} == {
        "value": 4, "name": "pond", "shots": shots, "share": None, "likeness": None,
    }  # fmt: skip
    assert np.linalg.norm(wider.texts, axis=1) == pytest.approx(1.0)  # a class with shots is one to learn others from
    assert wider.texts.shape == (4, 4) and np.allclose(wider.texts, np.tril(wider.texts))
    root = prior_root(wider.texts @ wider.texts.T, 1.0)
    np.testing.assert_allclose(root, wider.texts, atol=1e-9)


def test_a_known_share_moves_the_bias_alone(config: Config) -> None:
    features, labels = drawn(5)
    known, shares = known_of(config, features, labels)
    unlabelled, _ = drawn(200, seed=3)
    new = NewClass(CLASSES[3], PROMPTS[3], 0.15)
    wider = known.with_shots(new, features, labels, statistics(), shares, config, unlabelled)
    assert (wider.logits(unlabelled).argmax(1) == 3).mean() == pytest.approx(0.15, abs=0.002)
    free = known.with_shots(NewClass(CLASSES[3], PROMPTS[3]), features, labels, statistics(), shares, config)
    assert np.array_equal(free.texts, wider.texts) and np.array_equal(free.weight, wider.weight)
    assert np.array_equal(free.bias[:3], wider.bias[:3]) and free.bias[3] > wider.bias[3]


def test_the_fit_of_one_class_is_the_optimum(config: Config) -> None:
    """Against the objective as the docstring says it, written over all logits; no step in any direction betters it."""
    features, labels = drawn(4)
    known, _ = known_of(config, features, labels)
    others, expected = known.logits(features), np.linspace(-1, 1, len(features))
    slope, bias = fit_one_class(features, labels, others, expected, 0.7, statistics(), {"means": 1.0}, 0.1)

    def objective(slope: np.ndarray, bias: float) -> float:
        logits = np.column_stack([others, expected + 0.7 * features @ slope + bias])
        losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
        return float(losses.mean() + 0.1 / (2 * 4 * 4**0.5) * slope @ slope)

    best = objective(slope, bias)
    for direction in np.random.default_rng(0).normal(size=(50, FEATURES + 1)) * 1e-2:
        assert objective(slope + direction[:-1], bias + direction[-1]) > best


def test_views_are_averaged_by_their_shares(config: Config) -> None:
    features, labels = drawn(4)
    known, _ = known_of(config, features, labels)
    others, expected = known.logits(features), np.zeros(len(features))
    shares = {"means": {"means": 1.0}, "pixel": {"pixel": 1.0}, "both": {"means": 0.25, "pixel": 0.75}}
    fits = {
        name: fit_one_class(features, labels, others, expected, 1.0, statistics(), part, 0.1)
        for name, part in shares.items()
    }
    np.testing.assert_allclose(fits["both"][0], 0.25 * fits["means"][0] + 0.75 * fits["pixel"][0], atol=1e-12)
    assert fits["both"][1] == pytest.approx(0.25 * fits["means"][1] + 0.75 * fits["pixel"][1])
    assert not fits["pixel"][0][4:].any()


def test_without_spare_room_only_the_bias_is_learnt(config: Config) -> None:
    features, labels = drawn(3)
    known, _ = known_of(config, features, labels)
    slope, _ = fit_one_class(
        features, labels, known.logits(features), np.zeros(len(features)), 0.0, statistics(), {"means": 1.0}, 0.1
    )
    assert not slope.any()


@pytest.mark.parametrize("shares", [(0.3,), (0.3, 0.2), (0.05, 0.5, 0.3)])
def test_every_described_class_wins_its_share(config: Config, shares: tuple[float, ...]) -> None:
    features, labels = drawn(5)
    known, _ = known_of(config, features, labels)
    unlabelled, _ = drawn(300, seed=3)
    texts = ("green water blades", "grey sand", "red moss on tiles")
    new = [NewClass(ClassInfo(10 + i, texts[i]), texts[i], share) for i, share in enumerate(shares)]
    wider = known.with_described(new, unlabelled, config)
    won = np.bincount(wider.logits(unlabelled).argmax(1), minlength=3 + len(shares))[3:] / len(unlabelled)
    np.testing.assert_allclose(won, shares, atol=0.005)
    assert [entry["share"] for entry in wider.added] == list(shares)
    again = wider
    for _ in shares:
        again = again.without(3)
    assert again.classes == known.classes and np.array_equal(again.texts, known.texts) and again.added == ()


def test_the_average_share(config: Config) -> None:
    features, labels = drawn(5)
    known, _ = known_of(config, features, labels)
    new = [NewClass(ClassInfo(9, "pond"), "pond water"), NewClass(ClassInfo(8, "moss"), "wet moss")]
    assert [entry["share"] for entry in known.with_described(new, features, config).added] == [0.2, 0.2]
    with pytest.raises(UsageError, match="knows a class with the text 'road: grey asphalt'"):
        known.with_described([NewClass(ClassInfo(9, "x"), PROMPTS[1])], features, config)


def test_one_bias_is_a_quantile() -> None:
    rng = np.random.default_rng(0)
    others, own = rng.normal(size=(400, 3)), rng.normal(size=(400, 1))
    bias = biases_for_shares(others, own, [0.25])
    assert bias[0] == pytest.approx(np.quantile(others.max(1) - own[:, 0], 0.25))
