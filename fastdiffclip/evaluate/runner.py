"""Repeated honest evaluation: many splits, our method and the baselines on the same pixels, one table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiffclip.config import Config
from fastdiffclip.errors import UsageError, nearest
from fastdiffclip.evaluate.baselines import centre_and_mean_features, predict_baseline, predict_linear
from fastdiffclip.evaluate.metrics import Scores, score, summarise
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.runtime import Compute, Progress, memory_budget, open_folder, silent
from fastdiffclip.scene.labelled import Labelled, labelled_pixels
from fastdiffclip.scene.prepare import fit_front_end
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.splits import Split
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.flc import FlcResult, Shots, class_prompts, frozen_features, new_classifier, train_flc
from fastdiffclip.train.umd import UmdResult, train_umd

CLASSICAL = ("svm", "extratrees", "1nn")
BASELINES = (*CLASSICAL, "linear", "clip")
DEFAULT_BASELINES = (*CLASSICAL, "linear")
OURS = "fastdiffclip"
LINEAR_WINDOW = 5


@dataclass(frozen=True)
class Plan:
    """What is evaluated.

    Attributes:
        shots: labelled windows per class, None for all.
        seeds: number of draws; draw ``first_seed + i`` also seeds the classifier's weights.
        classes: class values to keep, None for all.
        test_limit: at most that many test pixels per class, None for all.
    """

    shots: tuple[int | None, ...] = (2,)
    seeds: int = 10
    split: str = "disjoint"
    baselines: tuple[str, ...] = DEFAULT_BASELINES
    prompts: str | None = None
    on_short: str = "error"
    first_seed: int = 0
    classes: tuple[int, ...] | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        for name in self.baselines:
            if name not in BASELINES:
                raise UsageError(
                    f"there is no baseline {name!r}{nearest(name, BASELINES)}; there is: {', '.join(BASELINES)}"
                )
        if self.seeds < 1 or not self.shots or any(k is not None and k < 1 for k in self.shots):
            raise UsageError("an evaluation needs at least one seed and one shot per class")

    def entries(self) -> list[tuple[str, str]]:
        """(method, features) of every row at one number of shots, ours first."""
        pairs = [(OURS, "window")]
        for name in self.baselines:
            pairs += [(name, "pixel"), (name, "window")] if name in CLASSICAL else [(name, "window")]
        return pairs


@dataclass
class Evaluation:
    """Scores of every run and the rows of the table."""

    scene: str
    plan: Plan
    scores: dict[tuple[str, str, int | None], list[Scores]] = field(default_factory=dict)
    split_report: tuple[str, ...] = ()
    seconds: float = 0.0

    def rows(self) -> list[dict[str, Any]]:
        """One row per shots, method and feature set: mean and sd over the draws, in percent."""
        return [
            {
                "scene": self.scene,
                "split": self.plan.split,
                "shots": "all" if shots is None else shots,
                "method": method,
                "features": features,
                **summarise(runs),
            }
            for (method, features, shots), runs in self.scores.items()
        ]


class Contest:
    """Scenes, labels, front ends and pretrained weights that all runs of an evaluation share."""

    def __init__(
        self,
        scenes: Sequence[Scene],
        labelled: Labelled,
        config: Config,
        umd: UmdResult | None,
        prompts: str | None,
        device: str,
    ) -> None:
        self.scenes, self.labelled, self.config, self.umd, self.device = (
            list(scenes),
            labelled,
            config,
            umd,
            device,
        )
        self.budget = memory_budget(config.memory_gib)
        self.prompts = class_prompts(scenes, labelled, prompts)
        self.plain_prompts = class_prompts(scenes, labelled, "p1")
        self._sources: dict[tuple[str, int], WindowSource] = {}
        self._features: tuple[dict[tuple[int, ...], int], torch.Tensor] | None = None

    def run(self, method: str, features: str, split: Split, seed: int) -> np.ndarray:
        """Class values that a method, trained on the split's shots, gives its test pixels."""
        if method == OURS:
            return self._ours(split, seed)
        if method == "clip":
            return self._clip(split, seed)
        if method == "linear":
            source = self._source("mnf", LINEAR_WINDOW)
            windows = [self._named(source, part) for part in (split.train, split.test)]
            return predict_linear(windows[0], split.train_labels, windows[1])[0]
        source = self._source("standard", self.config.model.window)
        rows = [centre_and_mean_features(self._named(source, part))[features] for part in (split.train, split.test)]
        return predict_baseline(method, rows[0], split.train_labels, rows[1], seed=seed)

    def _source(self, kind: str, window: int) -> WindowSource:
        key = (kind, window)
        if key not in self._sources:
            front_end = fit_front_end(kind, self.scenes, self.config.components)
            self._sources[key] = WindowSource(self.scenes, front_end, window, self.budget)
        return self._sources[key]

    @staticmethod
    def _named(source: WindowSource, centres: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(source.front_end.channels, source.windows(centres), strict=True))

    def _shots(self, split: Split, prompts: Sequence[str]) -> Shots:
        return Shots(split.train, split.train_labels, self.labelled.classes, tuple(prompts))

    def _ours(self, split: Split, seed: int) -> np.ndarray:
        shots = self._shots(split, self.prompts)
        if self.config.flc.encoder != "frozen":
            result = train_flc(self.scenes, shots, self.config, umd=self.umd, seed=seed, device=self.device)
            return predict_centres(result, self.scenes, split.test, self.device)
        features = self._frozen(split.train)
        result = train_flc(
            self.scenes, shots, self.config, umd=self.umd, features=features, seed=seed, device=self.device
        )
        classifier = as_classifier(result, self.device)
        return classifier.values(classifier.from_features(self._frozen(split.test)))

    def _frozen(self, centres: np.ndarray) -> torch.Tensor:
        """Features of labelled pixels; the encoder is frozen, so they are computed once for all draws."""
        where = Compute.choose(self.device, self.config.precision)
        if self._features is None:
            everywhere, _ = self.labelled.centres()
            front_end = (
                self.umd.front_end
                if self.umd
                else fit_front_end(self.config.prepare, self.scenes, self.config.components)
            )
            model = new_classifier(front_end, self.config, self.umd, 0).to(where.device)
            source = WindowSource(self.scenes, front_end, self.config.model.window, self.budget)
            place = {tuple(centre): number for number, centre in enumerate(everywhere.tolist())}
            self._features = place, frozen_features(model, source.windows(everywhere), where)
        place, values = self._features
        return values[torch.tensor([place[tuple(centre)] for centre in centres.tolist()], dtype=torch.int64)]

    def _clip(self, split: Split, seed: int) -> np.ndarray:
        """Image and text towers from scratch, plain class names: what pretraining and prompts are compared with."""
        flc = self.config.flc.model_copy(update={"encoder": "finetune"})
        config = self.config.model_copy(update={"flc": flc})
        shots = self._shots(split, self.plain_prompts)
        result = train_flc(self.scenes, shots, config, umd=None, seed=seed, device=self.device)
        return predict_centres(result, self.scenes, split.test, self.device)


def as_classifier(result: FlcResult, device: str = "auto") -> Classifier:
    """A trained model as prediction uses it."""
    where = Compute.choose(device, result.config.precision)
    return Classifier(result.model, result.text_embeddings, result.classes, result.front_end, result.config, where)


def predict_centres(
    result: FlcResult, scenes: Sequence[Scene], centres: np.ndarray, device: str = "auto"
) -> np.ndarray:
    """Class values of pixels ``(n, 3)`` (scene, row, column)."""
    classifier = as_classifier(result, device)
    source = WindowSource(scenes, result.front_end, result.config.model.window, memory_budget(result.config.memory_gib))
    parts = [
        classifier.values(classifier.probabilities(source.windows(centres[first : first + 4096])))
        for first in range(0, len(centres), 4096)
    ]
    return np.concatenate(parts)


def held_out(result: FlcResult, scenes: Sequence[Scene], split: Split, device: str = "auto") -> Scores:
    """Figures of a trained model on the test pixels of its split."""
    predicted = predict_centres(result, scenes, split.test, device)
    return score(split.test_labels, predicted, [item.value for item in result.classes])


def evaluate(
    scenes: Sequence[Scene],
    plan: Plan | None = None,
    config: Config | None = None,
    *,
    umd: UmdResult | None = None,
    pretrain: bool = True,
    out: Path | None = None,
    resume: bool = False,
    device: str = "auto",
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate our method and the baselines over repeated splits.

    Pretraining sees the unlabelled pixels of the whole scenes, test pixels included, and is shared by all draws.

    Args:
        scenes: opened scenes with labels.
        plan: what to run; config: settings of our method.
        umd: a pretrained model; None pretrains one, or starts from random weights with ``pretrain=False``.
        out: folder for ``scores.jsonl``, which ``resume`` goes on with.

    Raises:
        UsageError, InputDataError: see their messages.
    """
    began = time.monotonic()
    plan, config = plan or Plan(), config or Config()
    labelled = labelled_pixels(scenes, plan.classes)
    if umd is None and pretrain:
        umd = train_umd(scenes, config, seed=plan.first_seed, device=device, progress=progress)
    contest = Contest(scenes, labelled, config, umd, plan.prompts, device)
    values = [item.value for item in labelled.classes]
    result = Evaluation(scene_title(scenes), plan)
    done, record = _journal(out, resume)
    jobs = [
        (k, s, m, f)
        for k in plan.shots
        for m, f in plan.entries()
        for s in range(plan.first_seed, plan.first_seed + plan.seeds)
    ]
    for number, (shots, seed, method, features) in enumerate(jobs):
        key = json.dumps([plan.split, shots, seed, method, features])
        split = labelled.split(plan.split, shots, seed, config.model.window, plan.on_short, plan.test_limit)
        result.split_report = split.report
        if key not in done:
            predicted = contest.run(method, features, split, seed)
            done[key] = predicted.tolist()
            record(key, done[key])
        scores = score(split.test_labels, np.array(done[key], dtype=np.int64), values)
        result.scores.setdefault((method, features, shots), []).append(scores)
        progress(
            "evaluate",
            number + 1,
            len(jobs),
            f"{method} {'all' if shots is None else shots} shots, AA {scores.aa:.1f}",
        )
    result.seconds = time.monotonic() - began
    return result


def scene_title(scenes: Sequence[Scene]) -> str:
    """Name of one scene, or of the folder that several lie in."""
    return scenes[0].name if len(scenes) == 1 else f"{scenes[0].path.resolve().parent.name} ({len(scenes)} scenes)"


def _journal(out: Path | None, resume: bool) -> tuple[dict[str, list[int]], Callable[[str, list[int]], None]]:
    """Predictions already on disk, and how to add one."""
    if out is None:
        return {}, lambda key, predicted: None
    path = open_folder(out, resume) / "predictions.jsonl"
    done: dict[str, list[int]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the line that a kill cut short
            done[entry["key"]] = entry["predicted"]

    def record(key: str, predicted: list[int]) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "predicted": predicted}) + "\n")

    return done, record
