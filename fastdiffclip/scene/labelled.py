"""The labelled pixels of scenes: which maps count, which pixels are usable, which classes occur."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.scene.splits import Split, make_split
from fastdiffclip.scene.store import ClassInfo, Scene


@dataclass(frozen=True)
class Labelled:
    """Labels of several scenes, ready to be split.

    Attributes:
        labels: per scene ``(H, W)`` uint16, 0 = unlabelled; the map ``labels``, filled up from the official maps.
        train, test: the official maps, or None unless every scene has both.
        valid: per scene ``(H, W)`` bool, valid in every modality.
        classes: classes that occur, in the order of the class table.
    """

    labels: list[np.ndarray]
    train: list[np.ndarray] | None
    test: list[np.ndarray] | None
    valid: list[np.ndarray]
    classes: tuple[ClassInfo, ...]

    @property
    def names(self) -> dict[int, str]:
        """Class value to name."""
        return {item.value: item.name for item in self.classes}

    def centres(self) -> tuple[np.ndarray, np.ndarray]:
        """All labelled valid pixels: ``(n, 3)`` int64 centres and ``(n,)`` int64 class values."""
        centres, values = [], []
        for number, (labels, valid) in enumerate(zip(self.labels, self.valid, strict=True)):
            rows, cols = np.nonzero((labels > 0) & valid)
            centres.append(np.stack([np.full_like(rows, number), rows, cols], axis=1))
            values.append(labels[rows, cols])
        return np.concatenate(centres).astype(np.int64), np.concatenate(values).astype(np.int64)

    def split(
        self,
        kind: str,
        shots: int | None,
        seed: int,
        window: int,
        on_short: str = "error",
        test_limit: int | None = None,
    ) -> Split:
        """See :func:`fastdiffclip.scene.splits.make_split`; ``official`` needs both official maps."""
        official = kind == "official"
        if official and (self.train is None or self.test is None):
            raise UsageError(
                "the split 'official' needs the label maps 'train' and 'test' in every scene; use disjoint or random"
            )
        return make_split(
            kind,
            self.train if official and self.train is not None else self.labels,
            self.valid,
            shots=shots,
            seed=seed,
            window=window,
            class_names=self.names,
            on_short=on_short,
            official_test=self.test if official else None,
            test_limit=test_limit,
        )


def labelled_pixels(scenes: Sequence[Scene], classes: Sequence[int] | None = None) -> Labelled:
    """Read the labels of scenes; ``classes`` keeps only these class values.

    Raises:
        InputDataError: no scene has labels, the class tables disagree, no labelled pixel is valid, or all
            belong to one class.
    """
    table: dict[int, ClassInfo] = {}
    for scene in scenes:
        for item in scene.classes:
            if table.setdefault(item.value, item).name != item.name:
                raise InputDataError(
                    f"class {item.value} is {table[item.value].name!r} in one scene and {item.name!r} in {scene.path}; "
                    f"ingest them with one class table"
                )
    maps, train, test, valid = [], [], [], []
    for scene in scenes:
        shape = (scene.height, scene.width)
        named = {name: scene.read_labels(name) for name in scene.label_maps}
        if classes is not None:
            named = {name: np.where(np.isin(values, list(classes)), values, 0) for name, values in named.items()}
        union = np.zeros(shape, np.uint16)
        for name in ("labels", "train", "test"):
            union = np.where(union > 0, union, named.get(name, union))
        maps.append(union)
        train.append(named.get("train"))
        test.append(named.get("test"))
        valid.append(scene.read_valid_everywhere())
    present = np.zeros(1 << 16, dtype=bool)
    for labels, usable in zip(maps, valid, strict=True):
        present[labels[usable]] = True
    if not present[1:].any():
        raise InputDataError(
            "the scenes have no labelled pixel that is valid in every modality; "
            "add labels with 'fastdiffclip ingest --labels'"
        )
    occurring = tuple(item for item in table.values() if present[item.value])
    if len(occurring) < 2:
        raise InputDataError(
            f"the labelled pixels all belong to one class, '{occurring[0].name}'; "
            f"a classifier needs labels of at least two classes"
        )
    both = all(part is not None for part in train) and all(part is not None for part in test)
    return Labelled(
        maps,
        [part for part in train if part is not None] if both else None,
        [part for part in test if part is not None] if both else None,
        valid,
        occurring,
    )
