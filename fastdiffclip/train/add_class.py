"""A class more for a trained model: from its name and description, or from a few labelled pixels of it as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdiffclip import checkpoint
from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.files import open_folder
from fastdiffclip.model.logistic_classifier import LogisticClassifier
from fastdiffclip.model.prompts import ClassText, build_prompts
from fastdiffclip.runtime import Compute, memory_budget
from fastdiffclip.scene.labels import LARGEST_VALUE, with_colours
from fastdiffclip.scene.prepare import FrontEnd
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import ClassInfo, Scene, open_scene
from fastdiffclip.train.data import scene_records
from fastdiffclip.train.logistic import feature_statistics, new_logistic, window_features
from fastdiffclip.train.new_class import KnownClasses, NewClass, require_text_space, unlabelled_features

KEPT = ("front_end", "tokenizer_sha256", "umd", "split", "head")  # entries of the manifest that stay as they are


@dataclass(frozen=True)
class ClassShots:
    """Labelled pixels of one class: ``places`` (n, 2) int64, rows and columns in ``scene``."""

    scene: Scene
    places: np.ndarray


def add_class(
    model: Path, scenes: Sequence[Scene], out: Path, name: str, description: str = "", value: int | None = None,
    share: float | None = None, shots: ClassShots | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a copy of a run of ``train-flc`` that knows a class more; the weights of the others stay as they are.

    Without shots the new class stands where the prior of the head expects it, given the classes with shots and how
    alike the texts are; its bias is raised until it wins its share of the unlabelled windows of ``scenes``. With shots
    its weights and bias are fitted to them and to those of the model; see :mod:`fastdiffclip.train.new_class`.

    Args:
        model: run with ``flc.head=logistic``. out: folder of the new one.
        name: where the class tables of the scenes have it, value, colour and description come from there.
        value: class value in maps; None takes the table's, else the one above the largest.
        share: how much of the scenes the class covers, 0 to 1; None: as much as the average one, or with shots what
            they say.
        shots: of the new class, which the model may know from words alone by now. The scenes that the model was
            trained on are looked for among ``scenes``, then where they were.

    Returns:
        The entry of the class in the manifest with what it says of its addition: ``shots``, ``share``, ``likeness`` of
        its text to each class that had shots.

    Raises:
        UsageError: name or value are there already, or are none; another head; ``out`` is not empty.
        InputDataError: the run is damaged, or a scene that it was trained on is gone.
    """
    run = checkpoint.load_run(model, "flc")
    require_text_space(run.config, f"{model} was trained with")
    require_share(share)
    head = new_logistic(FrontEnd.from_parts(*run.front_end_parts()), run.config, None, 0)
    head.take(run.part("model"))
    seen = [*scenes, *([shots.scene] if shots else [])]
    known, new = _before(run, head, seen, name, description, value, share, replaces=shots is not None)
    where = Compute.choose("cpu", run.config.precision)
    trained, labelled, unlabelled = run.manifest["scenes"], run.manifest["shots"], None
    if shots is None or share is not None:
        unlabelled = unlabelled_features(head, _windows(run, scenes), run.config, where)
    if shots is not None:
        found = _scenes_of(run, seen)
        if shots.scene.sha256 not in {scene.sha256 for scene in found}:
            found.append(shots.scene)
            trained = [*trained, *scene_records([shots.scene])]
        place = [scene.sha256 for scene in found].index(shots.scene.sha256)
        labelled = [*labelled, *([place, int(row), int(col), new.info.value] for row, col in shots.places)]
        known = _with_shots(run, head, known, new, np.array(labelled), _windows(run, found), unlabelled, where)
    elif unlabelled is not None:
        known = known.with_described([new], unlabelled, run.config)
    open_folder(out, resume=None)
    _save(run, head, known, out, trained, labelled)
    return asdict(new.info) | known.added[-1]


def _before(
    run: checkpoint.Run, head: LogisticClassifier, seen: Sequence[Scene], name: str, description: str,
    value: int | None, share: float | None, replaces: bool,
) -> tuple[KnownClasses, NewClass]:  # fmt: skip
    """What a run knows, but for a class from words alone that the new one ``replaces``; and what the new one is."""
    texts, prompts = run.tensors["text_embeddings"], run.manifest["prompts"]
    known = KnownClasses.of(head, texts, classes_of(run), prompts, run.manifest.get("added", ()))
    table = [item for scene in seen for item in scene.classes]
    if replaces and (place := _described(known, name)) is not None:
        known, table = known.without(place), [known.classes[place], *table]
    info = class_to_add(name, description, value, known.classes, table)
    modalities = tuple(entry["name"] for entry in run.manifest["front_end"]["modalities"])
    text = ClassText(info.value, info.name, info.description)
    prompt = build_prompts([text], "p5" if info.description.strip() else "p4", modalities)[0]
    return known, NewClass(info, prompt, share)


def _save(
    run: checkpoint.Run, head: LogisticClassifier, known: KnownClasses, out: Path, scenes: list[dict[str, Any]],
    labelled: list[list[int]],
) -> None:  # fmt: skip
    """Write the run with the classes that are known now; its losses are those of the training."""
    tensors = {key: tensor for key, tensor in run.tensors.items() if key != checkpoint.LOSSES}
    tensors["text_embeddings"] = known.put_into(head)
    tensors |= {f"model.{name}": tensor for name, tensor in head.state_dict().items()}
    extra = {key: run.manifest[key] for key in KEPT if key in run.manifest}
    extra |= {"classes": [asdict(item) for item in known.classes], "prompts": list(known.prompts)}
    extra |= {"shots": labelled, "added": list(known.added), "added_to": str(run.path)}
    checkpoint.save_run(
        out, tensors, run.config, stage="flc", seed=run.manifest["seed"], scenes=scenes,
        losses=run.tensors[checkpoint.LOSSES].tolist(),
        identity=f"{run.manifest['fingerprint']}+{known.prompts[-1]}", extra=extra,
    )  # fmt: skip


def _described(known: KnownClasses, name: str) -> int | None:
    """Where a class of that name stands which was added from words alone; None without one."""
    values = [entry["value"] for entry in known.added if entry["shots"] == 0]
    named = (place for place, item in enumerate(known.classes) if folded(item.name) == folded(name))
    return next((place for place in named if known.classes[place].value in values), None)


def _windows(run: checkpoint.Run, scenes: Sequence[Scene]) -> WindowSource:
    front_end = FrontEnd.from_parts(*run.front_end_parts())
    return WindowSource(scenes, front_end, run.config.model.window, memory_budget(run.config.memory_gib))


def _with_shots(
    run: checkpoint.Run, head: LogisticClassifier, known: KnownClasses, new: NewClass, labelled: np.ndarray,
    source: WindowSource, unlabelled: np.ndarray | None, where: Compute,
) -> KnownClasses:  # fmt: skip
    """``labelled`` (N, 4): scene, row, column and class value of the shots of all classes."""
    position = {item.value: number for number, item in enumerate([*known.classes, new.info])}
    places = np.array([position[int(value)] for value in labelled[:, 3]])
    features = window_features(head, source.windows(np.ascontiguousarray(labelled[:, :3], np.int64)), where)
    statistics = feature_statistics(head, source, run.config, where)
    shares = run.manifest["head"]["shares"]
    return known.with_shots(new, features, places, statistics, shares, run.config, unlabelled)


def classes_of(run: checkpoint.Run) -> tuple[ClassInfo, ...]:
    """The classes that a run of ``train-flc`` knows, in its order."""
    return tuple(
        ClassInfo(**row | {"colour": None if row["colour"] is None else tuple(row["colour"])})
        for row in run.manifest["classes"]
    )


def class_to_add(
    name: str, description: str, value: int | None, known: Sequence[ClassInfo], table: Sequence[ClassInfo]
) -> ClassInfo:
    """What a class to add is: as the class table has it where that names it, else with a value and a colour of its own.

    Raises:
        UsageError: there is no name, or it or the value belong to a class already.
    """
    if not name.strip():
        raise UsageError("the new class has no name; give --name")
    for item in known:
        if folded(item.name) == folded(name):
            raise UsageError(f"the model knows a class named {item.name!r} already; give the new one another name")
    listed = next((item for item in table if folded(item.name) == folded(name)), None)
    if value is None:
        others = max(item.value for item in (*known, *table))
        value = others + 1 if listed is None else listed.value
    if not 1 <= value <= LARGEST_VALUE:
        raise UsageError(f"a class value is a whole number from 1 to {LARGEST_VALUE}; got {value}")
    for item in known:
        if item.value == value:
            raise UsageError(f"the model knows the class value {value}, it is {item.name!r}; give another --value")
    for item in table:
        if item.value == value and folded(item.name) != folded(name):
            raise UsageError(f"the class table has the value {value} for {item.name!r}; give another --value")
    if listed is None:
        listed = with_colours([*known, *table, ClassInfo(value, " ".join(name.split()))])[-1]
    return ClassInfo(value, listed.name, " ".join(description.split()) or listed.description, listed.colour)


def folded(name: str) -> str:
    """A class name without what does not tell it from another: case, underscores, further spaces."""
    return " ".join(name.replace("_", " ").split()).casefold()


def require_share(share: float | None) -> None:
    """Raise :class:`UsageError` for what is no share of a class."""
    if share is not None and not 0.0 < share < 1.0:
        raise UsageError(f"the share of the new class is above 0 and below 1; got {share:g}")


def _scenes_of(run: checkpoint.Run, given: Sequence[Scene]) -> list[Scene]:
    """The scenes that a run was trained on. Raises :class:`InputDataError` where one is gone or has changed."""
    found = []
    for entry in run.manifest["scenes"]:
        scene = next((item for item in given if item.sha256 == entry["sha256"]), None)
        if scene is None:
            remedy = f"give it as SCENE: the labelled pixels of {run.path} are in it"
            try:
                scene = open_scene(entry["path"])
            except InputDataError as error:
                raise InputDataError(f"{error}; {remedy}") from None
            if scene.sha256 != entry["sha256"]:
                raise InputDataError(f"{entry['path']} has changed since the model was trained on it; {remedy}")
        found.append(scene)
    return found
