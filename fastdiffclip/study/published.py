"""The paper's own figures, beside ours where the scenes are the paper's: ``configs/study/published.yaml``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from fastdiffclip.files import config_text
from fastdiffclip.model.prompts import PRESETS, load_preset
from fastdiffclip.scene.store import ClassInfo, Scene

MRNET = "mrnet"


@dataclass(frozen=True)
class Published:
    """A row of the paper: figures in percent, or, with ``minus``, their differences to the method named there."""

    study: str
    data: tuple[str, ...]
    label: str
    figures: dict[str, float]
    source: str
    shots: int | None | str = ""
    value: float | None = None
    minus: str | None = None


def published_rows(study: str, data: str | None) -> list[Published]:
    """The paper's rows of a study on a data set, none for a data set that is not the paper's."""
    if data is None:
        return []
    found = [_row(entry) for entry in yaml.safe_load(config_text("study/published.yaml"))["rows"]]
    return [row for row in found if row.study == study and data in row.data]


def _row(entry: dict[str, Any]) -> Published:
    shots = entry.get("shots", "")
    return Published(**{**entry, "data": tuple(entry["data"]), "shots": None if shots == "all" else shots})


def dataset_of(scenes: Sequence[Scene], classes: Sequence[ClassInfo]) -> str | None:
    """Which of the paper's data sets scenes are, by the names of their classes; None for any other."""
    if all(scene.centre_only for scene in scenes):
        tasks = yaml.safe_load(config_text(f"presets/{MRNET}.yaml"))["tasks"].values()
        known = [{_key(item["name"]) for item in task} for task in tasks]
        return MRNET if {_key(item.name) for item in classes} in known else None
    names = {_key(item.name) for item in classes}
    for preset in PRESETS:
        if names <= {_key(item.name) for item in load_preset(preset).classes}:
            return preset
    return None


def _key(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()
