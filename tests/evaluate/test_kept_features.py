"""Features that draws share: to the bit those of each classifier alone, and never another network's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastdiffclip.config import Config, LogisticConfig
from fastdiffclip.evaluate import contest
from fastdiffclip.evaluate.contest import as_classifier, classify_centres
from fastdiffclip.evaluate.kept_features import KEPT, SHARE, features_of_pixels
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.flc import FlcResult, Shots, train_flc, window_source
from fastdiffclip.train.umd import UmdResult, train_umd


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pixels went through a network, call by call."""
    counts: list[int] = []
    plain = Classifier.features

    def spy(self: Classifier, windows: Any) -> np.ndarray:
        counts.append(len(windows[0]))
        return plain(self, windows)

    monkeypatch.setattr(Classifier, "features", spy)
    return counts


@pytest.fixture
def centres(small_scene: Scene) -> np.ndarray:
    """Every valid pixel, in an order of their own."""
    rows, cols = np.nonzero(small_scene.read_valid_everywhere())
    pixels = np.stack([np.zeros_like(rows), rows, cols], axis=1).astype(np.int64)
    return np.random.default_rng(4).permutation(pixels)


def logistic(config: Config, *views: str, bf16: bool = False) -> Config:
    changes: dict[str, Any] = {
        "flc": config.flc.model_copy(update={"head": "logistic", "encoder": "frozen"}),
        "logistic": LogisticConfig(views=views, samples=64),  # type: ignore[arg-type]
        "precision": "bf16" if bf16 else "fp32",
    }
    return config.model_copy(update=changes)


def part_of(shots: Shots, first: int) -> Shots:
    return replace(shots, centres=shots.centres[first::2], labels=shots.labels[first::2])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("views", [("means", "pixel"), ("means", "tokens")])
def test_later_draws_compute_what_is_new_and_find_the_same_bits(
    small_scene: Scene, small_config: Config, small_shots: Shots, small_umd: UmdResult, centres: np.ndarray,
    computed: list[int], views: tuple[str, ...], bf16: bool,
) -> None:  # fmt: skip
    config = logistic(small_config, *views, bf16=bf16)
    shared = window_source([small_scene], config, small_umd)
    draws = [(0, centres[:200]), (1, centres[150:330][::-1]), (0, centres[100:300])]
    for first, pixels in draws:
        trained = train_flc([small_scene], part_of(small_shots, first), config, umd=small_umd, source=shared)
        found, alone = classify_centres(trained, shared, pixels), as_classifier(trained)
        expected = alone.probabilities(shared.windows(pixels))
        assert np.array_equal(found.values, alone.values(expected))
        assert np.array_equal(alone.probabilities_of(features_of_pixels(alone, shared, pixels)), expected)
    assert computed == [200, 130]


def test_another_network_or_setting_is_looked_through_anew(
    small_scene: Scene, small_config: Config, small_shots: Shots, small_umd: UmdResult, centres: np.ndarray,
    computed: list[int],
) -> None:  # fmt: skip
    config, pixels = logistic(small_config, "means", "tokens"), centres[:70]
    other = train_umd([small_scene], small_config, seed=9, device="cpu")
    source = window_source([small_scene], config, small_umd)
    wider = config.model_copy(update={"logistic": config.logistic.model_copy(update={"mean_token": 0.7})})
    for umd, settings in ((small_umd, config), (other, config), (other, wider), (small_umd, config)):
        trained = train_flc([small_scene], small_shots, settings, umd=umd, source=source)
        alone = as_classifier(trained)
        expected = alone.probabilities(source.windows(pixels))
        assert np.array_equal(alone.probabilities_of(features_of_pixels(alone, source, pixels)), expected)
    assert computed == [70] * 4


def test_an_encoder_that_every_draw_moves_is_never_taken_for_another(
    small_scene: Scene, small_config: Config, small_shots: Shots, small_umd: UmdResult, centres: np.ndarray,
    computed: list[int],
) -> None:  # fmt: skip
    source = window_source([small_scene], small_config, small_umd)
    for seed in (0, 1):
        trained = train_flc([small_scene], small_shots, small_config, umd=small_umd, source=source, seed=seed)
        found = classify_centres(trained, source, centres[:65])
        alone = as_classifier(trained)
        assert np.array_equal(found.values, alone.values(alone.probabilities(source.windows(centres[:65]))))
    assert computed == [65, 65]


def test_memory_is_bounded(
    flc_run: FlcResult, small_scene: Scene, centres: np.ndarray, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest, "PART", 64)
    classifier = as_classifier(flc_run)
    bytes_of_one = classifier.features(WindowSource([small_scene], flc_run.front_end, 3, 1 << 30).windows(centres[:1]))
    computed.clear()
    source = WindowSource([small_scene], flc_run.front_end, 3, SHARE * 100 * bytes_of_one.nbytes)
    first = classify_centres(flc_run, source, centres[:200])
    assert len(source.memo[KEPT]._rows) == 100 and sum(row.nbytes for row in source.memo[KEPT]._rows.values()) == (
        100 * bytes_of_one.nbytes
    )
    again = classify_centres(flc_run, source, centres[:200])
    assert computed == [64, 64, 64, 8, 28, 64, 8]
    assert np.array_equal(first.values, again.values) and np.array_equal(first.confidence, again.confidence)  # type: ignore[arg-type]


def test_no_pixel(flc_run: FlcResult, small_scene: Scene) -> None:
    source = WindowSource([small_scene], flc_run.front_end, 3, 1 << 30)
    for _ in range(2):
        assert len(classify_centres(flc_run, source, np.empty((0, 3), np.int64)).values) == 0
