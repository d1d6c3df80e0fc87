"""A classifier read back, and that a window's probabilities depend on nothing beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiffclip.config import Config
from fastdiffclip.errors import InputDataError
from fastdiffclip.evaluate.contest import as_classifier
from fastdiffclip.infer.classifier import BATCH, Classifier
from fastdiffclip.kernels.reference import unit
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.flc import FlcResult, Shots, train_flc


@pytest.fixture(scope="module")
def windows(small_scene: Scene, flc_run: FlcResult) -> list[np.ndarray]:
    """200 windows per modality."""
    row, col = np.unravel_index(np.arange(0, 600, 3), (24, 30))
    centres = np.stack([np.zeros_like(row), row, col], axis=1).astype(np.int64)
    return WindowSource([small_scene], flc_run.front_end, 3, 1 << 30).windows(centres)


def load(run: FlcResult, precision: str | None = None) -> Classifier:
    assert run.folder is not None
    return Classifier.load(run.folder, "cpu", precision)


def test_the_class_of_the_nearest_text(flc_run: FlcResult, windows: list[np.ndarray]) -> None:
    classifier = load(flc_run)
    probabilities = classifier.probabilities(windows)
    assert probabilities.shape == (200, 3) and probabilities.dtype == np.float32
    with torch.no_grad():
        image = unit(flc_run.model.embed_image([torch.from_numpy(part) for part in windows]))
        scores = flc_run.model.logit_scale * image @ flc_run.text_embeddings.T
    np.testing.assert_allclose(probabilities, scores.softmax(1).numpy(), rtol=1e-4, atol=1e-6)
    expected = np.array([1, 2, 4])[probabilities.argmax(1)]
    assert np.array_equal(classifier.values(probabilities), expected) and len(np.unique(expected)) == 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_read_back_it_gives_the_same(flc_run: FlcResult, windows: list[np.ndarray], precision: str) -> None:
    first, second = load(flc_run, precision), load(flc_run, precision)
    out = first.probabilities(windows)
    assert np.array_equal(out, first.probabilities(windows)) and np.array_equal(out, second.probabilities(windows))
    if precision == "fp32":
        assert np.array_equal(out, as_classifier(flc_run, "cpu").probabilities(windows))
    assert [(c.value, c.name, c.description, c.colour) for c in second.classes] == [
        (c.value, c.name, c.description, c.colour) for c in flc_run.classes
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 3, BATCH - 1, BATCH, BATCH + 1])
def test_windows_beside_it_do_not_matter(
    flc_run: FlcResult, windows: list[np.ndarray], precision: str, rows: int
) -> None:
    classifier = load(flc_run, precision)
    whole = classifier.probabilities(windows)
    assert np.array_equal(classifier.probabilities([part[:rows] for part in windows]), whole[:rows])
    wild = [part.copy() for part in windows]
    for part in wild:
        part[rows:] = 1e4
    assert np.array_equal(classifier.probabilities(wild)[:rows], whole[:rows])


def test_no_windows(flc_run: FlcResult, windows: list[np.ndarray]) -> None:
    assert load(flc_run).probabilities([part[:0] for part in windows]).shape == (0, 3)


def test_settings_of_the_temperature_survive(
    small_scene: Scene, small_config: Config, small_shots: Shots, windows: list[np.ndarray], tmp_path: Path
) -> None:
    flc = small_config.flc.model_copy(update={"temperature": 1.0, "max_logit_scale": 0.5, "epochs": 1})
    config = small_config.model_copy(update={"flc": flc})
    result = train_flc([small_scene], small_shots, config, out=tmp_path / "run", device="cpu")
    expected = as_classifier(result, "cpu").probabilities(windows)
    assert np.array_equal(load(result).probabilities(windows), expected)


def test_damage_is_named(flc_run: FlcResult, tmp_path: Path) -> None:
    assert flc_run.folder is not None
    folder = Path(shutil.copytree(flc_run.folder, tmp_path / "run"))
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(InputDataError, match=r"model\.safetensors does not match the checksum"):
        Classifier.load(folder, "cpu")
    with pytest.raises(InputDataError, match="not a finished run"):
        Classifier.load(tmp_path, "cpu")
