"""A class added by its description: the others keep their scores, it stands where its text puts it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiffclip.config import Config, LogisticConfig
from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.add_class import add_class
from fastdiffclip.train.flc import FlcResult, Shots, train_flc


@pytest.fixture(scope="module")
def run(small_scene: Scene, small_config: Config, small_shots: Shots, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flc = small_config.flc.model_copy(update={"head": "logistic", "encoder": "frozen"})
    config = small_config.model_copy(update={"flc": flc, "logistic": LogisticConfig(sizes=(3,), samples=100)})
    folder = tmp_path_factory.mktemp("run") / "flc"
    train_flc([small_scene], small_shots, config, out=folder, device="cpu")
    return folder


def scores(folder: Path, scene: Scene) -> tuple[Classifier, np.ndarray]:
    classifier = Classifier.load(folder, "cpu")
    rows, cols = np.nonzero(scene.read_valid_everywhere())
    centres = np.stack([np.zeros_like(rows), rows, cols], axis=1).astype(np.int64)
    windows = WindowSource([scene], classifier.front_end, 3, 1 << 30).windows(centres)
    return classifier, classifier.probabilities(windows)


def test_the_others_keep_their_scores(run: Path, small_scene: Scene, tmp_path: Path) -> None:
    entry = add_class(run, [small_scene], tmp_path / "new", "pond", "a dark pond of still water", share=0.2)
    assert (entry["value"], entry["name"]) == (5, "pond")
    assert max(entry["likeness"], key=entry["likeness"].get) == "water" and len(entry["likeness"]) == 3
    before, after = scores(run, small_scene), scores(tmp_path / "new", small_scene)
    assert [item.value for item in after[0].classes] == [1, 2, 4, 5] and after[1].shape[1] == 4
    ratio = after[1][:, :3] / after[1][:, :3].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(ratio, before[1], atol=1e-5)
    assert (after[1].argmax(1) == 3).mean() == pytest.approx(0.2, abs=0.08)  # the sample is 100 of 708 windows
    likest = [np.corrcoef(np.log(after[1][:, 3]), np.log(after[1][:, k]))[0, 1] for k in range(3)]
    assert int(np.argmax(likest)) == 2
    again = add_class(tmp_path / "new", [small_scene], tmp_path / "newer", "lawn", "low green grass", value=9)
    assert len(again["likeness"]) == 3  # an added class tells nothing of another
    third = scores(tmp_path / "newer", small_scene)
    np.testing.assert_allclose(third[1][:, :4] / third[1][:, :4].sum(1, keepdims=True), after[1], atol=1e-5)
    assert torch.equal(third[0].text_embeddings[:4], after[0].text_embeddings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": " "}, "has no name"),
        ({"name": "roof"}, "knows a class named 'roof'"),
        ({"value": 2}, "knows the class value 2, it is 'roof'"),
        ({"share": 1.0}, "above 0 and below 1"),
        ({"value": 0}, "whole number from 1 to 65535"),
        ({"value": 70000}, "whole number from 1 to 65535"),
    ],
)
def test_a_class_that_cannot_be_added(
    run: Path, small_scene: Scene, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        add_class(run, [small_scene], tmp_path / "new", **({"name": "pond", "description": "a pond"} | changes))  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_and_a_model_that_learns_from_pixels_alone(
    run: Path, flc_run: FlcResult, small_scene: Scene, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="not empty"):
        add_class(run, [small_scene], run, "pond", "a pond")
    assert flc_run.folder is not None
    with pytest.raises(UsageError, match="flc.head=contrastive, which learns every class from pixels"):
        add_class(flc_run.folder, [small_scene], tmp_path / "new", "pond", "a pond")
    with pytest.raises(InputDataError, match="not a finished run"):
        add_class(tmp_path, [small_scene], tmp_path / "new", "pond", "a pond")
