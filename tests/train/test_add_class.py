"""A class added by its description: the others keep their scores, it stands where its text puts it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiffclip import checkpoint
from fastdiffclip.checkpoint import load_run
from fastdiffclip.config import Config, LogisticConfig
from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import ClassInfo, Scene, open_scene
from fastdiffclip.train.add_class import ClassShots, add_class, class_to_add
from fastdiffclip.train.flc import FlcResult, Shots, train_flc
from fastdiffclip.train.new_class import NewClass

from ..conftest import write_small_scene


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


def test_with_shots_it_is_learnt_and_the_others_keep_their_scores(
    small_scene: Scene, small_config: Config, small_shots: Shots, run: Path, tmp_path: Path
) -> None:
    """The third class of the scene, taught later: from words, then from two pixels in place of that."""
    there = small_shots.labels != 4
    two = replace(
        small_shots, centres=small_shots.centres[there], labels=small_shots.labels[there],
        classes=small_shots.classes[:2], prompts=small_shots.prompts[:2],
    )  # fmt: skip
    config = load_run(run, "flc").config
    train_flc([small_scene], two, config, out=tmp_path / "two", device="cpu")
    shots = ClassShots(small_scene, small_shots.centres[~there][:2, 1:])
    words = add_class(tmp_path / "two", [small_scene], tmp_path / "words", "Water")
    assert (words["value"], words["name"], words["description"], words["shots"]) == (4, "water", "a dark pond", 0)
    assert words["colour"] == (20, 40, 200)  # of the class table, as are value and description
    for base in ("two", "words"):
        out = tmp_path / f"{base}-taught"
        entry = add_class(tmp_path / base, [small_scene], out, "water", shots=shots)
        assert (entry["value"], entry["shots"], entry["share"]) == (4, 2, None)
        before, after = scores(tmp_path / "two", small_scene), scores(out, small_scene)
        ratio = after[1][:, :2] / after[1][:, :2].sum(axis=1, keepdims=True)
        np.testing.assert_allclose(ratio, before[1], atol=1e-5)
        rows, cols = np.nonzero(small_scene.read_valid_everywhere())
        truth, found = small_scene.read_labels("labels")[rows, cols], after[0].values(after[1])
        assert (found[truth > 0] == truth[truth > 0]).mean() > 0.95
        manifest = load_run(out, "flc").manifest
        assert [item["value"] for item in manifest["classes"]] == [1, 2, 4]
        assert [item["shots"] for item in manifest["added"]] == [2]
        assert manifest["shots"][-2:] == [[0, *map(int, place), 4] for place in shots.places]
    third = add_class(tmp_path / "two-taught", [small_scene], tmp_path / "third", "lawn", "low green grass")
    assert set(third["likeness"]) == {"grass", "roof", "water"}  # what was taught tells of others


def test_shots_from_another_scene_and_a_scene_that_is_gone(run: Path, small_scene: Scene, tmp_path: Path) -> None:
    other = open_scene(write_small_scene(tmp_path / "other.zarr", seed=3))
    shots = ClassShots(other, np.array([[2, 2], [2, 3]]))
    entry = add_class(run, [], tmp_path / "new", "moss", "wet moss", shots=shots)
    manifest = load_run(tmp_path / "new", "flc").manifest
    assert [scene["sha256"] for scene in manifest["scenes"]] == [small_scene.sha256, other.sha256]
    assert manifest["shots"][-1] == [1, 2, 3, entry["value"]]
    assert load_run(tmp_path / "new", "flc").manifest["added_to"] == str(run)
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    left = checkpoint.read_checked(moved / checkpoint.MANIFEST)
    left["scenes"][0]["path"] = str(tmp_path / "gone.zarr")
    checkpoint.write_checked(moved / checkpoint.MANIFEST, left)
    with pytest.raises(InputDataError, match=r"no scene at .*gone\.zarr.*give it as SCENE"):
        add_class(moved, [], tmp_path / "newer", "moss", "wet moss", shots=shots)
    left["scenes"][0]["path"] = str(other.path)
    checkpoint.write_checked(moved / checkpoint.MANIFEST, left)
    with pytest.raises(InputDataError, match=r"has changed since the model was trained on it; give it as SCENE"):
        add_class(moved, [], tmp_path / "newer", "moss", "wet moss", shots=shots)
    assert not (tmp_path / "newer").exists()
    add_class(moved, [small_scene], tmp_path / "newer", "moss", "wet moss", shots=shots)


def test_training_with_a_described_class_is_training_and_adding_it(
    run: Path, small_scene: Scene, small_shots: Shots, tmp_path: Path
) -> None:
    """To the bit; and resumed, it says the same of it."""
    add_class(run, [small_scene], tmp_path / "later", "pond", "still water", share=0.2)
    info = class_to_add("pond", "still water", None, small_shots.classes, small_scene.classes)
    new = NewClass(info, "pond: still water", 0.2)
    config = load_run(run, "flc").config
    shots = replace(small_shots, added=(new,))
    result = train_flc([small_scene], shots, config, out=tmp_path / "at-once", device="cpu")
    later, at_once = (load_run(tmp_path / name, "flc") for name in ("later", "at-once"))
    for name, tensor in later.tensors.items():
        assert torch.equal(tensor, at_once.tensors[name]), name
    for entry in ("classes", "prompts", "added", "shots"):
        assert later.manifest[entry] == at_once.manifest[entry], entry
    assert [item.name for item in result.classes] == ["grass", "roof", "water", "pond"]
    again = train_flc([small_scene], shots, config, out=tmp_path / "at-once", device="cpu", resume=True)
    assert again.added == result.added and torch.equal(again.text_embeddings, result.text_embeddings)
    for other in ((), (replace(new, share=0.3),), (replace(new, prompt="pond"),)):
        with pytest.raises(UsageError, match="other settings"):
            changed = replace(small_shots, added=other)
            train_flc([small_scene], changed, config, out=tmp_path / "at-once", device="cpu", resume=True)


def test_a_described_class_needs_the_text_space(small_scene: Scene, small_shots: Shots, small_config: Config) -> None:
    shots = replace(small_shots, added=(NewClass(ClassInfo(9, "pond"), "pond"),))
    with pytest.raises(UsageError, match="flc.head=contrastive, which learns every class from pixels"):
        train_flc([small_scene], shots, small_config, device="cpu")


def test_what_a_class_to_add_is() -> None:
    known = (ClassInfo(1, "grass"), ClassInfo(2, "road", colour=(9, 9, 9)))
    table = (*known, ClassInfo(7, "Dark Pond", "still water", (1, 2, 3)))
    assert class_to_add("dark_pond", "", None, known, table) == table[2]
    assert class_to_add("dark pond", "deep", 5, known, table) == ClassInfo(5, "Dark Pond", "deep", (1, 2, 3))
    new = class_to_add("moss", "", None, known, table)
    assert (new.value, new.name) == (8, "moss") and new.colour not in (None, (9, 9, 9), (1, 2, 3))
    with pytest.raises(UsageError, match="the class table has the value 7 for 'Dark Pond'"):
        class_to_add("moss", "", 7, known, table)
    with pytest.raises(UsageError, match="knows a class named 'road' already"):
        class_to_add("ROAD", "", None, known, table)


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


@pytest.mark.parametrize("views", [("means", "restored"), ("means", "tokens")])
def test_a_head_that_looks_through_a_network(
    small_scene: Scene, small_config: Config, small_shots: Shots, tmp_path: Path, views: tuple[str, ...]
) -> None:
    """Its weights, random here, go into the new run, and the others keep their scores."""
    flc = small_config.flc.model_copy(update={"head": "logistic", "encoder": "frozen"})
    settings = LogisticConfig(views=views, sizes=(3,), samples=100)  # type: ignore[arg-type]
    config = small_config.model_copy(update={"flc": flc, "logistic": settings})
    train_flc([small_scene], small_shots, config, out=tmp_path / "run", device="cpu")
    before = scores(tmp_path / "run", small_scene)
    shots = ClassShots(small_scene, np.array([[0, 0], [0, 1]]))
    for out, given in (("said", None), ("shown", shots)):
        add_class(tmp_path / "run", [small_scene], tmp_path / out, "moss", "wet moss", shots=given, share=0.1)
        after = scores(tmp_path / out, small_scene)
        ratio = after[1][:, :3] / after[1][:, :3].sum(axis=1, keepdims=True)
        np.testing.assert_allclose(ratio, before[1], atol=1e-5)
        assert (after[1].argmax(1) == 3).mean() == pytest.approx(0.1, abs=0.08)
