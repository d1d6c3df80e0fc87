"""The small scene's trained classifier as prediction uses it, and tiles that the scene's sides do not divide."""

from __future__ import annotations

import pytest

from fastdiffclip.infer import engine
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.train.flc import FlcResult

from .streams import SMALL


@pytest.fixture(scope="module")
def classifier(flc_run: FlcResult) -> Classifier:
    assert flc_run.folder is not None
    return Classifier.load(flc_run.folder, "cpu", "fp32")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine.BATCHES, "cpu", SMALL)
