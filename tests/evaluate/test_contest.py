"""What methods share: windows that are made once, confidences, the baseline without pretraining."""

from __future__ import annotations

import numpy as np
import pytest

from fastdiffclip.config import Config, load_config
from fastdiffclip.evaluate import contest as contests
from fastdiffclip.evaluate import runner
from fastdiffclip.evaluate.contest import SOURCES, Contest, WindowSources, winning
from fastdiffclip.evaluate.runner import Plan, evaluate
from fastdiffclip.scene.labelled import labelled_pixels
from fastdiffclip.scene.prepare import fit_front_end
from fastdiffclip.scene.store import Scene


def test_windows_are_prepared_once(small_scene: Scene) -> None:
    sources = WindowSources([small_scene], 2**30)
    first = sources.fitted("mnf", 4, 3)
    assert sources.fitted("mnf", 4, 3) is first
    assert sources.behind(fit_front_end("mnf", [small_scene], 4), 3) is first  # the same numbers
    others = [sources.fitted("mnf", 4, 5), sources.fitted("mnf", 3, 3), sources.fitted("standard", 3, 3)]
    assert len({id(source) for source in (first, *others)}) == 4
    assert sources.fitted("standard", 9, 3) is others[-1]  # it keeps all bands
    assert sources.fitted("mnf", 4, 3) is not first and len(others) == SOURCES  # three are held


def test_confidence_is_of_the_class_that_is_given(small_scene: Scene, small_config: Config) -> None:
    labelled = labelled_pixels([small_scene])
    split = labelled.split("disjoint", 3, 0, 3)
    judge = Contest([small_scene], labelled, small_config, None, None, "cpu")
    for method, has in (("linear", True), ("fastdiffclip", True), ("svm", False), ("1nn", False)):
        found = judge.run(method, "window", split, 0)
        assert (found.confidence is not None) == has
        if found.confidence is not None:
            assert found.confidence.shape == found.values.shape
            assert (found.confidence >= 1 / 3 - 1e-4).all() and (found.confidence <= 1).all()
    assert winning(np.array([[0.123456, 0.876544]])).tolist() == [0.8765]


def test_linear_is_the_same_in_parts(small_scene: Scene, small_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled = labelled_pixels([small_scene])
    split = labelled.split("disjoint", 3, 0, 3)
    judge = Contest([small_scene], labelled, small_config, None, None, "cpu")
    whole = judge.run("linear", "window", split, 0)
    monkeypatch.setattr(contests, "PART", 10)
    parts = judge.run("linear", "window", split, 0)
    assert np.array_equal(whole.values, parts.values) and np.allclose(whole.confidence, parts.confidence, atol=1e-4)


def test_clip_trains_both_towers_whatever_the_recipe(small_scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = contests.train_flc

    def spy(scenes: object, shots: object, config: Config, **settings: object) -> object:
        seen.append((config.flc.head, config.flc.encoder, settings["umd"], shots.prompts))  # type: ignore[attr-defined]
        return plain(scenes, shots, config, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(contests, "train_flc", spy)
    tiny = ["model.width=16", "model.depth=1", "model.heads=2", "model.window=3", "flc.epochs=1", "components=4"]
    config = load_config("best", None, [*tiny, "logistic.samples=64"])
    assert config.flc.head == "logistic"
    labelled = labelled_pixels([small_scene])
    judge = Contest([small_scene], labelled, config, None, None, "cpu")
    judge.run("clip", "window", labelled.split("disjoint", 2, 0, 3), 0)
    assert seen == [("contrastive", "finetune", None, ("grass", "roof", "water"))]


def test_a_head_that_reads_no_encoder_needs_no_pretraining(small_scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("pretraining began")

    monkeypatch.setattr(runner, "train_umd", never)
    sets = ["model.window=3", "components=4", "logistic.samples=64", "logistic.views=[means,neighbours,pixel]"]
    config = load_config("best", None, sets)
    assert not config.reads_network
    rows = evaluate([small_scene], Plan((2,), 1, baselines=()), config, device="cpu").rows()
    assert rows[0]["aa_mean"] > 80 and rows[0]["ece_mean"] is not None
