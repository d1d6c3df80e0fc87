"""Which labelled pixels count: label maps, validity, class tables of several scenes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.scene.labelled import labelled_pixels
from fastdiffclip.scene.store import ClassInfo, Scene

TABLE = (ClassInfo(3, "water"), ClassInfo(1, "grass"), ClassInfo(2, "roof"), ClassInfo(9, "never"))


@dataclass
class Maps:
    """What ``labelled_pixels`` uses of a Scene."""

    maps: dict[str, np.ndarray]
    valid: dict[str, np.ndarray] = field(default_factory=dict)
    classes: tuple[ClassInfo, ...] = TABLE
    path: Path = Path("scene.zarr")

    def __post_init__(self) -> None:
        self.height, self.width = 2, 3
        self.label_maps = tuple(self.maps)
        self.valid = self.valid or {"hsi": np.ones((2, 3), bool)}
        self.modalities = dict.fromkeys(self.valid)

    def read_labels(self, name: str) -> np.ndarray:
        return self.maps[name]

    def read_valid(self, name: str) -> np.ndarray:
        return self.valid[name]

    read_valid_everywhere = Scene.read_valid_everywhere


def grid(*values: int) -> np.ndarray:
    return np.array(values, np.uint16).reshape(2, 3)


def test_labels_of_one_map() -> None:
    labelled = labelled_pixels([Maps({"labels": grid(0, 1, 2, 2, 0, 3)})])
    assert [item.value for item in labelled.classes] == [3, 1, 2]  # the order of the table; 9 does not occur
    assert labelled.names == {3: "water", 1: "grass", 2: "roof"}
    assert labelled.train is None and labelled.test is None
    centres, values = labelled.centres()
    assert centres.tolist() == [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 2]] and values.tolist() == [1, 2, 2, 3]
    assert centres.dtype == values.dtype == np.int64 and labelled.labels[0].dtype == np.uint16


def test_only_pixels_valid_in_every_modality_count() -> None:
    valid = {"hsi": grid(1, 1, 0, 1, 1, 1) > 0, "lidar": grid(1, 0, 1, 1, 1, 1) > 0}
    labelled = labelled_pixels([Maps({"labels": grid(1, 1, 2, 0, 0, 3)}, valid)])
    assert labelled.centres()[1].tolist() == [1, 3] and set(labelled.names) == {1, 3}
    with pytest.raises(InputDataError, match="no labelled pixel that is valid in every modality"):
        labelled_pixels([Maps({"labels": grid(0, 1, 2, 0, 0, 0)}, valid)])


def test_official_maps_are_united() -> None:
    scene = Maps({"train": grid(1, 0, 2, 0, 0, 0), "test": grid(2, 2, 0, 0, 3, 0)})
    labelled = labelled_pixels([scene])
    assert labelled.labels[0].tolist() == grid(1, 2, 2, 0, 3, 0).tolist()
    split = labelled.split("official", 1, 0, 1)
    assert split.train_labels.tolist() == [1, 2]
    assert split.test.tolist() == [[0, 0, 1], [0, 1, 1]] and split.test_labels.tolist() == [2, 3]


def test_a_map_beside_the_official_ones_is_filled_up() -> None:
    scene = Maps({"labels": grid(1, 0, 0, 0, 0, 0), "train": grid(1, 0, 2, 0, 0, 0), "test": grid(0, 0, 0, 0, 3, 0)})
    labelled = labelled_pixels([scene])
    assert labelled.labels[0].tolist() == grid(1, 0, 2, 0, 3, 0).tolist() and set(labelled.names) == {1, 2, 3}
    pixels = {tuple(c) for c in labelled.centres()[0].tolist()}
    split = labelled.split("official", 1, 0, 1)
    assert {tuple(c) for c in [*split.train.tolist(), *split.test.tolist()]} <= pixels


def test_the_official_split_needs_both_maps_everywhere() -> None:
    both = Maps({"train": grid(1, 0, 2, 0, 0, 0), "test": grid(0, 2, 0, 0, 3, 0)})
    with pytest.raises(UsageError, match="needs the label maps 'train' and 'test' in every scene"):
        labelled_pixels([both, Maps({"labels": grid(1, 2, 3, 0, 0, 0)})]).split("official", 1, 0, 1)
    with pytest.raises(UsageError, match="use disjoint or random"):
        labelled_pixels([Maps({"train": both.maps["train"]})]).split("official", 1, 0, 1)


def test_a_choice_of_classes() -> None:
    labelled = labelled_pixels([Maps({"labels": grid(0, 1, 2, 2, 0, 3)})], classes=(3, 2))
    assert set(labelled.names) == {2, 3} and labelled.centres()[1].tolist() == [2, 2, 3]
    with pytest.raises(InputDataError, match="no labelled pixel"):
        labelled_pixels([Maps({"labels": grid(0, 1, 2, 2, 0, 3)})], classes=(8,))


def test_several_scenes() -> None:
    first = Maps({"labels": grid(1, 0, 0, 0, 0, 0)})
    second = Maps({"labels": grid(0, 0, 0, 0, 0, 7)}, classes=(ClassInfo(7, "road"), ClassInfo(1, "grass")))
    labelled = labelled_pixels([first, second, Maps({})])
    assert labelled.centres()[0].tolist() == [[0, 0, 0], [1, 1, 2]] and labelled.names == {1: "grass", 7: "road"}
    other = Maps({"labels": grid(1, 0, 0, 0, 0, 0)}, classes=(ClassInfo(1, "turf"),), path=Path("other.zarr"))
    with pytest.raises(InputDataError, match=r"class 1 is 'grass' in one scene and 'turf' in other\.zarr"):
        labelled_pixels([first, other])


def test_scenes_without_labels() -> None:
    for scenes in ([Maps({})], [Maps({"labels": grid(0, 0, 0, 0, 0, 0)})], []):
        with pytest.raises(InputDataError, match="fastdiffclip ingest --labels"):
            labelled_pixels(scenes)
