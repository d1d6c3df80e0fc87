"""Training with ``flc.head=logistic``: a run like any other, exact on resume, and sound with few shots or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiffclip import checkpoint
from fastdiffclip.config import Config, LogisticConfig, load_config
from fastdiffclip.errors import UsageError
from fastdiffclip.evaluate.contest import as_classifier
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.model.logistic_classifier import LogisticClassifier
from fastdiffclip.model.text_similarity import text_similarity
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import Scene
from fastdiffclip.train import logistic
from fastdiffclip.train.flc import FlcResult, Shots, train_flc, window_source
from fastdiffclip.train.logistic import (
    WEIGHED_BY_PLACE,
    expected_texts,
    fit_candidates,
    fit_head,
    place_groups,
    shares_of,
)
from fastdiffclip.train.logistic_regression import prior_root
from fastdiffclip.train.umd import UmdResult
from fastdiffclip.train.views import FeatureStatistics, View, make_views

WITH_TOKENS = ("means", "neighbours", "tokens")


def with_head(config: Config, views: tuple[str, ...] = ("means", "neighbours", "pixel"), **changes: object) -> Config:
    flc = config.flc.model_copy(update={"head": "logistic", "encoder": "frozen"})
    logistic = LogisticConfig(views=views, sizes=(3,), samples=200, **changes)  # type: ignore[arg-type]
    return config.model_copy(update={"flc": flc, "logistic": logistic})


@pytest.fixture(scope="module")
def config(small_config: Config) -> Config:
    return with_head(small_config)


@pytest.fixture(scope="module")
def logistic_run(
    small_scene: Scene, config: Config, small_shots: Shots, tmp_path_factory: pytest.TempPathFactory
) -> FlcResult:
    return train_flc([small_scene], small_shots, config, out=tmp_path_factory.mktemp("run") / "flc", device="cpu")


def says(result: FlcResult, source: WindowSource, centres: np.ndarray) -> np.ndarray:
    return as_classifier(result, "cpu").probabilities(source.windows(centres))


def every_pixel(scene: Scene) -> np.ndarray:
    rows, cols = np.nonzero(scene.read_valid_everywhere())
    return np.stack([np.zeros_like(rows), rows, cols], axis=1).astype(np.int64)


def test_it_learns(small_scene: Scene, config: Config, logistic_run: FlcResult) -> None:
    labels = small_scene.read_labels("labels")
    centres = every_pixel(small_scene)
    centres = centres[labels[centres[:, 1], centres[:, 2]] > 0]
    source = window_source([small_scene], config, None)
    classifier = as_classifier(logistic_run, "cpu")
    found = classifier.values(classifier.probabilities(source.windows(centres)))
    assert (found == labels[centres[:, 1], centres[:, 2]]).mean() > 0.95


def test_what_a_run_leaves(logistic_run: FlcResult) -> None:
    assert logistic_run.folder is not None
    names = {path.name for path in logistic_run.folder.iterdir()}
    assert {"model.safetensors", "config.yaml", "manifest.json", "metrics.json", "log.csv"} <= names
    run = checkpoint.load_run(logistic_run.folder, "flc")
    assert run.config == logistic_run.config and len(run.manifest["prompts"]) == 3
    log = (logistic_run.folder / "log.csv").read_text().splitlines()
    assert log[0] == "step,learning_rate,loss" and len(log) == 1 + len(logistic_run.losses)
    assert logistic_run.losses == sorted(logistic_run.losses, reverse=True)
    assert set(run.manifest["head"]["shares"]) == {"means", "neighbours", "pixel"}
    assert sum(run.manifest["head"]["shares"].values()) == pytest.approx(1.0)


@pytest.mark.parametrize("views", [("means", "neighbours", "pixel"), WITH_TOKENS])
def test_read_back_it_says_the_same(
    small_scene: Scene, small_config: Config, small_shots: Shots, small_umd: UmdResult, tmp_path: Path,
    views: tuple[str, ...],
) -> None:  # fmt: skip
    config = with_head(small_config, views)
    result = train_flc([small_scene], small_shots, config, umd=small_umd, out=tmp_path / "run", device="cpu")
    source, centres = window_source([small_scene], config, small_umd), every_pixel(small_scene)
    expected = says(result, source, centres)
    again = Classifier.load(tmp_path / "run", "cpu")
    assert np.array_equal(again.probabilities(source.windows(centres)), expected)
    assert (again.model.encoder is not None) == ("tokens" in views)
    if again.model.encoder is not None:
        assert torch.equal(again.model.encoder.class_tokens, small_umd.model.encoder.class_tokens)


def test_resume_takes_the_finished_run(
    small_scene: Scene, config: Config, small_shots: Shots, logistic_run: FlcResult
) -> None:
    assert logistic_run.folder is not None
    before = (logistic_run.folder / "model.safetensors").read_bytes()
    again = train_flc([small_scene], small_shots, config, out=logistic_run.folder, device="cpu", resume=True)
    assert again.losses == logistic_run.losses
    assert torch.equal(again.text_embeddings, logistic_run.text_embeddings)
    assert (logistic_run.folder / "model.safetensors").read_bytes() == before
    changed = with_head(config, ridge=0.5)
    with pytest.raises(UsageError, match="other settings"):
        train_flc([small_scene], small_shots, changed, out=logistic_run.folder, device="cpu", resume=True)


def test_the_same_run_twice_and_with_statistics_that_are_there_already(
    small_scene: Scene, config: Config, small_shots: Shots, logistic_run: FlcResult
) -> None:
    source = window_source([small_scene], config, None)
    for _ in range(2):
        again = train_flc([small_scene], small_shots, config, source=source, device="cpu")
        for name, tensor in again.model.state_dict().items():
            assert torch.equal(tensor, logistic_run.model.state_dict()[name]), name


def test_the_order_of_the_shots_does_not_matter(
    small_scene: Scene, config: Config, small_shots: Shots, logistic_run: FlcResult
) -> None:
    order = np.random.default_rng(0).permutation(len(small_shots.labels))
    mixed = replace(small_shots, centres=small_shots.centres[order], labels=small_shots.labels[order])
    source, centres = window_source([small_scene], config, None), every_pixel(small_scene)
    again = train_flc([small_scene], mixed, config, device="cpu")
    # Fits end where the gradient is below 1e-6 (those that leave a shot out: 1e-4), not at the last bit.
    np.testing.assert_allclose(says(again, source, centres), says(logistic_run, source, centres), atol=5e-3)


@pytest.mark.parametrize("keep", [1, 2])
def test_few_shots_of_a_class(small_scene: Scene, config: Config, small_shots: Shots, keep: int) -> None:
    kept = np.concatenate([np.flatnonzero(small_shots.labels == value)[:keep] for value in (1, 2, 4)])
    few = replace(small_shots, centres=small_shots.centres[kept], labels=small_shots.labels[kept])
    result = train_flc([small_scene], few, config, device="cpu")
    found = says(result, window_source([small_scene], config, None), every_pixel(small_scene))
    assert np.isfinite(found).all() and len(np.unique(found.argmax(1))) == 3
    assert isinstance(result.model, LogisticClassifier)
    assert (float(result.model.temperature) == 1.0) == (keep == 1)


def test_one_class_alone(small_scene: Scene, config: Config, small_shots: Shots) -> None:
    kept = small_shots.labels == 2
    alone = Shots(small_shots.centres[kept], small_shots.labels[kept], small_shots.classes[1:2], ("roof",))
    result = train_flc([small_scene], alone, config, device="cpu")
    found = says(result, window_source([small_scene], config, None), every_pixel(small_scene))
    assert np.array_equal(found, np.ones_like(found)) and result.losses == [0.0]


def test_a_class_without_shots_stands_where_its_text_puts_it(
    small_scene: Scene, config: Config, small_shots: Shots
) -> None:
    seen = small_shots.labels != 4
    prompts = ("short green grass", "red roof of tiles", "red roof of tin")
    partly = Shots(small_shots.centres[seen], small_shots.labels[seen], small_shots.classes, prompts)
    result = train_flc([small_scene], partly, config, device="cpu")
    texts = result.text_embeddings.double().numpy()
    similarity = text_similarity(prompts)
    np.testing.assert_allclose(texts[:2] @ texts[:2].T, 0.1 * np.eye(2) + 0.9 * similarity[:2, :2], atol=1e-6)
    np.testing.assert_allclose(texts[2] @ texts[:2].T, 0.9 * similarity[2, :2], atol=1e-6)
    found = says(result, window_source([small_scene], config, None), every_pixel(small_scene))
    assert np.corrcoef(found[:, 2], found[:, 1])[0, 1] > np.corrcoef(found[:, 2], found[:, 0])[0, 1]


def test_expected_texts_are_the_priors_expectation() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 8))
    covariance = rows @ rows.T
    root = prior_root(covariance[:4, :4], 1.0 - 1e-12)
    known = np.random.default_rng(1).standard_normal((4, 3))
    expected = covariance[4, :4] @ np.linalg.solve(covariance[:4, :4], known)
    found = expected_texts(root, covariance[[4], :4]) @ np.linalg.solve(root, known)
    np.testing.assert_allclose(found[0], expected, atol=1e-8)


def test_views_are_averaged_into_one_linear_map(small_config: Config) -> None:
    """The head on raw features is the weighted mean of the views' logits, divided by the temperature."""
    from fastdiffclip.model.window_features import FeatureLayout
    from fastdiffclip.train.logistic import average

    config = with_head(small_config, ("means", "pixel"))
    layout = FeatureLayout.of({"hsi": 6}, config)
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 4)
    features = random.standard_normal((3, layout.total))[labels] + 0.5 * random.standard_normal((12, layout.total))
    statistics = make_views(features, np.zeros((0, layout.means)), layout, config, 1)
    prompts = ("grass", "roof", "water")
    places = np.zeros((12, 3), np.int64)
    head = fit_head(features, labels, places, prompts, statistics, config.logistic)
    root = prior_root(text_similarity(prompts), 0.9)
    candidates = fit_candidates(features, labels, places, root, statistics, config.logistic.ridge)
    shares = shares_of(candidates, labels)
    centred = features - statistics.centre
    parts = [centred @ c.weight.T @ root.T + c.bias for c in candidates]
    expected = sum(share * part for share, part in zip(shares, parts, strict=True))
    np.testing.assert_allclose(centred @ head.weight.T @ head.texts.T + head.bias, expected, atol=1e-9)
    assert average(candidates, shares)[2].shape == (12, 3) and head.left_out_loss is not None
    loss = [float(np.nanmean(c.left_out[:, 0] * 0 + 1)) for c in candidates]
    assert loss == [1.0, 1.0]  # every shot could be left out


def in_stands(each: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, FeatureStatistics]:
    """Features, labels, places of two classes in five stands of ``each`` shots along a diagonal.

    The view `stands` knows the stand, whatever grows there; the view `kinds` knows the class, with some noise.
    """
    random = np.random.default_rng(0)
    labels, stands = (part.ravel().repeat(each) for part in np.mgrid[:2, :5])
    known = 3 * random.standard_normal((2, 5, 8))[labels, stands] + 0.1 * random.standard_normal((len(labels), 8))
    kinds = np.stack([labels * 2.0 - 1, np.zeros(len(labels))], axis=1) + 0.6 * random.standard_normal((len(labels), 2))
    within = random.integers(0, 6, (len(labels), 2))
    places = np.column_stack([np.zeros_like(labels), stands[:, None] * [20, -30] + within + [0, 200]])
    views = {"stands": View(np.arange(8), np.ones(8)), "kinds": View(np.arange(8, 10), np.ones(2))}
    order = random.permutation(len(labels))
    features = np.concatenate([known, kinds], axis=1)
    return features[order], labels[order], places[order], FeatureStatistics(np.zeros(10), views)


def test_hundreds_of_shots_are_left_out_by_place_to_weigh_the_views() -> None:
    """A neighbour that stays speaks for the view that knows the stand; without the whole stand the other is better."""
    features, labels, places, statistics = in_stands(16)
    settings, prompts = LogisticConfig(), ("ash", "oak")
    head = fit_head(features, labels, places, prompts, statistics, settings)
    assert head.shares["kinds"] > 0.99
    nowhere = fit_head(features, labels, np.zeros_like(places), prompts, statistics, settings)
    assert nowhere.shares["stands"] > 0.99  # fewer places than groups: as with few shots
    candidates = fit_candidates(features, labels, places, np.eye(2), statistics, settings.ridge)
    plain = fit_candidates(features, labels, np.zeros_like(places), np.eye(2), statistics, settings.ridge)
    for one, other in zip(candidates, plain, strict=True):
        assert np.array_equal(one.weight, other.weight) and np.array_equal(one.left_out, other.left_out)
        assert not np.array_equal(one.weighed_by, one.left_out) and other.weighed_by is other.left_out


def test_a_run_with_hundreds_of_shots_knows_their_places(
    small_scene: Scene, small_shots: Shots, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, centres = small_scene.read_labels("labels"), every_pixel(small_scene)
    centres = centres[labels[centres[:, 1], centres[:, 2]] > 0]
    shots = replace(small_shots, centres=centres, labels=labels[centres[:, 1], centres[:, 2]].astype(np.int64))
    assert len(centres) > WEIGHED_BY_PLACE
    seen: list[np.ndarray] = []
    monkeypatch.setattr(logistic, "place_groups", lambda _, places: seen.append(places))
    train_flc([small_scene], shots, config, device="cpu")
    assert len(seen) == 1 and np.array_equal(seen[0], centres)


def test_up_to_150_shots_places_say_nothing() -> None:
    features, labels, places, statistics = in_stands(15)
    heads = [
        fit_head(features, labels, where, ("ash", "oak"), statistics, LogisticConfig())
        for where in (places, np.zeros_like(places))
    ]
    assert heads[0].shares == heads[1].shares and heads[0].temperature == heads[1].temperature
    assert np.array_equal(heads[0].weight, heads[1].weight) and np.array_equal(heads[0].bias, heads[1].bias)
    candidates = fit_candidates(features, labels, places, np.eye(2), statistics, LogisticConfig().ridge)
    assert all(c.weighed_by is c.left_out for c in candidates)


def test_groups_follow_the_main_axis_of_a_class() -> None:
    _, labels, places, _ = in_stands(16)
    groups = place_groups(labels, places)
    assert groups is not None
    stands = places[:, 1] // 20  # 20 rows apart, 6 wide
    for label in (0, 1):
        own, expected = groups[labels == label], stands[labels == label]
        assert np.array_equal(own, expected) or np.array_equal(own, 4 - expected)


def test_scenes_are_kept_together() -> None:
    """Ten scenes of three shots: two scenes a group, wherever in their scene the shots lie."""
    places = np.random.default_rng(0).integers(0, 100, (30, 3))
    places[:, 0] = np.random.default_rng(1).permutation(np.arange(10).repeat(3))
    assert np.array_equal(place_groups(np.zeros(30, int), places), places[:, 0] // 2)


@given(counts=st.lists(st.integers(5, 23), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_every_group_has_its_part_of_every_class(counts: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(counts)), counts))
    flat = random.choice(10_000, len(labels), replace=False)
    places = np.column_stack([random.integers(0, 3, len(labels)), flat // 100, flat % 100])
    groups = place_groups(labels, places)
    assert groups is not None
    for label, count in enumerate(counts):
        sizes = np.bincount(groups[labels == label], minlength=5)
        assert len(sizes) == 5 and sizes.sum() == count and sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("places", [4, 5])
def test_a_class_of_few_places_has_no_groups(places: int) -> None:
    """Shots of one place in two groups would be left out with themselves still there."""
    labels = np.repeat([0, 1], 40)
    where = np.zeros((80, 3), np.int64)
    where[:40, 1], where[40:, 2] = np.arange(40), np.arange(40) % places
    groups = place_groups(labels, where)
    assert (groups is None) == (places < 5)


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(UsageError, match="flc.head=logistic leaves the encoder frozen"):
        load_config("best", None, ["flc.encoder=finetune"])
    with pytest.raises(UsageError, match="must be odd"):
        load_config("best", None, ["logistic.sizes=[2]"])
    with pytest.raises(UsageError, match="must not name one twice"):
        load_config("best", None, ["logistic.views=[means,means]"])
    with pytest.raises(UsageError, match="needs logistic.class_tokens"):
        load_config("best", None, ["logistic.views=[tokens]", "logistic.class_tokens=0"])
    assert load_config("best").flc.head == "logistic" and load_config("paper").flc.head == "contrastive"
