"""Classes that a model learns from words, or from a few labels later on: what the options name, and where it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdiffclip.errors import InputDataError, UsageError, nearest
from fastdiffclip.evaluate.contest import in_parts
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.model.prompts import WORDLESS, ClassText, build_prompts, resolve_prompts
from fastdiffclip.runtime import memory_budget
from fastdiffclip.scene import rois, vectors
from fastdiffclip.scene.georeference import Grid, require_same_grid
from fastdiffclip.scene.labelled import Labelled
from fastdiffclip.scene.labels import LabelMap, read_label_map
from fastdiffclip.scene.pending import is_scene
from fastdiffclip.scene.readers import expand, open_raster
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.splits import Split, make_split
from fastdiffclip.scene.store import ClassInfo, Scene, open_scene
from fastdiffclip.train.add_class import ClassShots, class_to_add, folded
from fastdiffclip.train.flc import Shots, class_prompts
from fastdiffclip.train.new_class import NewClass

JUDGED = 4000  # labelled pixels of the new class, and of the others, that are looked at at most


@dataclass(frozen=True)
class Drawn:
    """Labelled pixels of a class to add.

    Attributes:
        shots: to learn from. test: ``(m, 2)`` rows and columns of further ones whose windows overlap no shot's.
        others: ``(o, 2)`` of labelled pixels of other classes.
    """

    shots: ClassShots
    test: np.ndarray
    others: np.ndarray


def shots_of(
    scenes: Sequence[Scene], labelled: Labelled, split: Split, prompts: str | None,
    added: Mapping[str, tuple[str, float | None]],
) -> Shots:  # fmt: skip
    """The training pixels of a split, the classes that they train, and those that join from their descriptions.

    Raises:
        UsageError: two classes have the same text, or as :func:`new_classes`.
    """
    texts = dict(zip(labelled.classes, class_prompts(scenes, labelled, prompts), strict=True))
    new = new_classes(scenes, labelled, split, prompts, added)
    values = {item.info.value for item in new}
    classes = tuple(item for item in texts if item.value not in values)
    said = [texts[item] for item in classes]
    for item in new:
        if item.prompt in said:
            raise UsageError(f"--add-class {item.info.name}: another class has its text, {item.prompt!r}; word it anew")
        said.append(item.prompt)
    return Shots(split.train, split.train_labels, classes, tuple(texts[item] for item in classes), new)


def new_classes(
    scenes: Sequence[Scene], labelled: Labelled, split: Split, prompts: str | None,
    added: Mapping[str, tuple[str, float | None]],
) -> tuple[NewClass, ...]:  # fmt: skip
    """The classes that ``--add-class`` names, in the words that it gives, else as ``--prompts`` words the others.

    Raises:
        UsageError: one of them has training pixels, there are no words, or as :func:`class_to_add`.
        InputDataError: the prompts have no text for it.
    """
    table, trained = class_table(scenes), set(split.train_labels.tolist())
    known = [item for item in labelled.classes if item.value in trained]
    modalities = tuple(scenes[0].modalities)
    found: list[NewClass] = []
    for name, (description, share) in added.items():
        for item in known:
            if folded(item.name) == folded(name):
                raise UsageError(
                    f"--add-class {item.name}: {int((split.train_labels == item.value).sum())} labelled pixels of that "
                    "class are trained on; --add-class is for classes without any"
                )
        if prompts == WORDLESS:
            raise UsageError(f"--prompts {WORDLESS} leaves no words that --add-class could map {name!r} from")
        info = class_to_add(name, description, None, [*known, *(one.info for one in found)], table)
        text = ClassText(info.value, info.name, info.description)
        words = build_prompts([text], "p5", modalities) if description else resolve_prompts(prompts, [text], modalities)
        found.append(NewClass(info, words[0], share))
    return tuple(found)


def unlabelled_classes(scenes: Sequence[Scene], known: Sequence[ClassInfo]) -> list[ClassInfo]:
    """The classes of the scenes' class tables that are not among those known."""
    values = {item.value for item in known}
    return [item for item in class_table(scenes) if item.value not in values]


def class_table(scenes: Sequence[Scene]) -> tuple[ClassInfo, ...]:
    """The classes that the scenes' class tables name, labelled or not."""
    return tuple({item.value: item for scene in scenes for item in scene.classes}.values())


def draw_shots(spec: str, scenes: Sequence[Scene], name: str, count: int | None, window: int, seed: int) -> Drawn:
    """The labelled pixels of a class that ``--shots-from`` holds, ``count`` of them as shots (None: all).

    ``spec`` is a scene, or labels on the grid of the one scene given, of any kind that ``ingest --labels`` takes.

    Raises:
        UsageError: there are fewer than ``count``, or several scenes with a file.
        InputDataError: the class is not in it, or no pixel of it is valid.
    """
    path = Path(spec)
    if is_scene(path):
        scene = open_scene(path)
        labels, named = _stored_labels(scene), {item.value: item.name for item in scene.classes}
    else:
        if len(scenes) != 1:
            raise UsageError(
                f"--shots-from {spec} is a file of labels, which lie on one SCENE; {len(scenes)} are given"
            )
        scene = scenes[0]
        read = _label_file(spec, scene)
        labels, named = read.values, read.class_names
    names = named or {item.value: item.name for item in scene.classes}
    value, valid = _value_of(spec, labels, names, bool(named), name), scene.read_valid_everywhere()
    pixels = np.argwhere((labels == value) & valid)
    if len(pixels) < (count or 1):
        raise UsageError(
            f"{spec} has {len(pixels)} valid labelled pixels of {name!r}, and --shots asks for {count or 'all'}; "
            "label more, or ask for fewer"
        )
    test = np.empty((0, 2), np.int64)
    shots = pixels
    if count is not None:
        own = np.where(labels == value, value, 0)
        settings: dict[str, Any] = {"shots": count, "seed": seed, "window": window, "class_names": {value: name}}
        split = make_split("disjoint", [own], [valid], **settings, on_short="use-all", test_limit=JUDGED)
        if len(split.train) == count:
            shots, test = split.train[:, 1:], split.test[:, 1:]
        else:  # too few to part them from test pixels
            shots = make_split("random", [own], [valid], **settings).train[:, 1:]
    others = np.argwhere((labels > 0) & (labels != value) & valid)
    others = np.random.Generator(np.random.PCG64(seed)).permutation(others)[:JUDGED]
    return Drawn(ClassShots(scene, shots), test, others)


def judged(model: Path, drawn: Drawn, value: int) -> dict[str, Any]:
    """Percent of the test pixels of an added class that are found, and of other pixels taken for it; None of none."""
    classifier = Classifier.load(model, "cpu")
    config, scene = classifier.config, drawn.shots.scene
    source = WindowSource([scene], classifier.front_end, config.model.window, memory_budget(config.memory_gib))
    figures: dict[str, Any] = {}
    for key, pixels in (("found", drawn.test), ("taken", drawn.others)):
        centres, hits = np.column_stack([np.zeros(len(pixels), np.int64), pixels]).astype(np.int64), 0
        for part in in_parts(centres) if len(pixels) else ():
            hits += int((classifier.values(classifier.probabilities(source.windows(part))) == value).sum())
        figures[key] = 100.0 * hits / len(pixels) if len(pixels) else None
        figures[f"{key}_of"] = len(pixels)
    return figures


def _stored_labels(scene: Scene) -> np.ndarray:
    """The label map of a scene, filled up from the official ones."""
    labels = np.zeros((scene.height, scene.width), np.uint16)
    for name in scene.label_maps:
        labels = np.where(labels > 0, labels, scene.read_labels(name))
    return labels


def _label_file(spec: str, scene: Scene) -> LabelMap:
    files, variable = expand(spec)
    if len(files) != 1:
        raise UsageError(f"{spec} stands for {len(files)} files; --shots-from takes one")
    path, suffix = files[0], files[0].suffix.lower()
    grid = Grid("the scene", scene.path, scene.height, scene.width, scene.crs_wkt, scene.affine_transform)
    if suffix in vectors.SUFFIXES:
        return vectors.read_polygons(path, variable, grid)
    if suffix in rois.SUFFIXES:
        return rois.read_rois(path, variable, grid)
    with open_raster(path, variable) as source:
        own = Grid("labels", path, source.height, source.width, source.crs_wkt, source.affine_transform)
        require_same_grid([grid, own])
        return LabelMap(path, read_label_map(source), source.class_names, source.class_colours)


def _value_of(spec: str, labels: np.ndarray, names: Mapping[int, str], own: bool, name: str) -> int:
    """The label value of a class, by name; a file without names (``own``) that holds a single value may be its mask."""
    values = [int(value) for value in np.unique(labels[labels > 0])]
    named = [value for value in values if folded(names.get(value, "")) == folded(name)]
    if not named and not own and len(values) == 1 and (values[0] == 1 or values[0] not in names):
        return values[0]
    if named:
        return named[0]
    present = [names.get(value, f"value {value}") for value in values]
    raise InputDataError(
        f"{spec} labels no pixel {name!r}{nearest(name, present)}; it labels {', '.join(present) or 'none at all'}"
    )
