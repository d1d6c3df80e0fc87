"""A class more for a trained model, from its name and description alone: no pixel, no training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiffclip import checkpoint
from fastdiffclip.errors import UsageError
from fastdiffclip.files import open_folder
from fastdiffclip.model.prompts import ClassText, build_prompts
from fastdiffclip.model.text_similarity import text_similarity
from fastdiffclip.runtime import Compute, memory_budget
from fastdiffclip.scene.prepare import FrontEnd
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.data import unlabelled_centres
from fastdiffclip.train.logistic import expected_texts, new_logistic, offset_for_share, window_features

FULL_LENGTH = 1.0 - 1e-4  # of the text vectors of classes that had shots


def add_class(
    model: Path, scenes: Sequence[Scene], out: Path, name: str, description: str = "", value: int | None = None,
    share: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a copy of a run of ``train-flc`` that knows a class more; the others keep their numbers.

    The new class stands where the prior of the head expects it, given the classes with shots and how alike the texts
    are. That alone would never win, for what is expected lies between the classes that it is like: its bias is raised
    until it wins a given share of the unlabelled windows of ``scenes``.

    Args:
        model: run with ``flc.head=logistic``. out: folder of the new one.
        value: class value in maps; None takes the one above the largest.
        share: how much of the scenes the class is expected to cover, 0 to 1; None: as much as the average one.

    Returns:
        The entry of the class in the manifest, and ``likeness``: similarity of its text to each other class's.

    Raises:
        UsageError: name or value are there already, or are none; another head; ``out`` is not empty.
        InputDataError: the run is damaged.
    """
    run = checkpoint.load_run(model, "flc")
    if run.config.flc.head != "logistic":
        raise UsageError(
            f"{model} was trained with flc.head={run.config.flc.head}, which learns every class from pixels; "
            "train with flc.head=logistic to add classes by description"
        )
    if share is not None and not 0.0 < share < 1.0:
        raise UsageError(f"the share of the new class is above 0 and below 1; got {share:g}")
    classes, prompts = run.manifest["classes"], list(run.manifest["prompts"])
    value = max(entry["value"] for entry in classes) + 1 if value is None else value
    _check(name, value, classes)
    modalities = tuple(entry["name"] for entry in run.manifest["front_end"]["modalities"])
    prompt = build_prompts([ClassText(value, name, description)], "p5" if description.strip() else "p4", modalities)[0]
    if prompt in prompts:
        raise UsageError(f"the model knows a class with the text {prompt!r} already; describe the new one otherwise")
    texts = run.tensors["text_embeddings"].double().numpy()
    known = np.flatnonzero(np.linalg.norm(texts, axis=1) > FULL_LENGTH)
    likeness = text_similarity([prompts[place] for place in known], [prompt])
    row = expected_texts(texts[known], run.config.logistic.text * likeness)
    tensors = {key: tensor for key, tensor in run.tensors.items() if key != checkpoint.LOSSES}
    bias = tensors["model.bias"]
    embeddings = _embeddings(run, scenes)
    others = embeddings @ texts.T + bias.double().numpy()
    own = offset_for_share(others, (embeddings @ row.T)[:, 0], 1.0 / (len(classes) + 1) if share is None else share)
    tensors["text_embeddings"] = torch.from_numpy(np.concatenate([texts, row]).astype(np.float32))
    tensors["model.bias"] = torch.cat([bias, torch.tensor([own], dtype=torch.float32)])
    entry = {"value": value, "name": name, "description": description, "colour": None}
    kept = ("front_end", "tokenizer_sha256", "umd", "shots", "split", "head")
    extra = {key: run.manifest[key] for key in kept if key in run.manifest}
    extra |= {"classes": [*classes, entry], "prompts": [*prompts, prompt], "added_to": str(model)}
    open_folder(out, resume=False)
    checkpoint.save_run(
        out, tensors, run.config, stage="flc", seed=run.manifest["seed"], scenes=run.manifest["scenes"],
        losses=run.tensors[checkpoint.LOSSES].tolist(), identity=f"{run.manifest['fingerprint']}+{prompt}", extra=extra,
    )  # fmt: skip
    names = [classes[place]["name"] for place in known]
    return entry | {"likeness": dict(zip(names, likeness[0].round(4).tolist(), strict=True))}


def _embeddings(run: checkpoint.Run, scenes: Sequence[Scene]) -> np.ndarray:
    """Where unlabelled windows of the scenes stand in the text space, ``(n, E)``."""
    front_end = FrontEnd.from_parts(*run.front_end_parts())
    where = Compute.choose("cpu", run.config.precision)
    model = new_logistic(front_end, run.config, None, 0)
    model.take(run.part("model"))
    source = WindowSource(scenes, front_end, run.config.model.window, memory_budget(run.config.memory_gib))
    drawn = unlabelled_centres(scenes, run.config.logistic.samples, run.config.model.window, seed=0)
    features = window_features(model, source.windows(drawn), where)
    return (features - model.centre.double().numpy()) @ model.weight.double().numpy().T


def _check(name: str, value: int, classes: list[dict[str, Any]]) -> None:
    if not name.strip():
        raise UsageError("the new class has no name; give --name")
    if not 1 <= value <= 65535:
        raise UsageError(f"a class value is a whole number from 1 to 65535; got {value}")
    for entry in classes:
        if entry["value"] == value:
            raise UsageError(f"the model knows the class value {value}, it is {entry['name']!r}; give another --value")
        if entry["name"].split() == name.split():
            raise UsageError(f"the model knows a class named {entry['name']!r} already; give another --name")
