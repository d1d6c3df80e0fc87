"""Repeated honest evaluation: many splits, our method and the baselines on the same pixels, one table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastdiffclip.config import Config, load_config
from fastdiffclip.errors import UsageError, nearest
from fastdiffclip.evaluate.baselines import centre_and_mean_features, predict_baseline, predict_linear
from fastdiffclip.evaluate.metrics import Scores, score, summarise
from fastdiffclip.files import open_folder, replacing
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.runtime import Compute, Progress, memory_budget, silent
from fastdiffclip.scene.labelled import Labelled, labelled_pixels
from fastdiffclip.scene.prepare import fit_front_end
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.splits import Split
from fastdiffclip.scene.store import ClassInfo, Scene
from fastdiffclip.train.engine import fingerprint, settings_of, weights_digest
from fastdiffclip.train.flc import FlcResult, Shots, class_prompts, train_flc, window_source
from fastdiffclip.train.umd import UmdResult, train_umd

CLASSICAL = ("svm", "extratrees", "1nn")
BASELINES = (*CLASSICAL, "linear", "clip")
DEFAULT_BASELINES = (*CLASSICAL, "linear")
OURS = "fastdiffclip"
LINEAR_WINDOW = 5
PART = 4096  # windows held at once, a multiple of every batch


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


class Predicted(NamedTuple):
    """What a method says of n pixels.

    ``values`` (n,) int64 class values. ``ranking`` (n,) float64 where there are two classes and the method can
    rank them: the larger, the more surely the larger class value.
    """

    values: np.ndarray
    ranking: np.ndarray | None = None


@dataclass
class Evaluation:
    """Scores of every run and the rows of the table."""

    scene: str
    plan: Plan
    classes: tuple[ClassInfo, ...] = ()
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
        self.scenes, self.labelled, self.umd = list(scenes), labelled, umd
        self.config, self.device = config, device
        self.budget = memory_budget(config.memory_gib)
        self.prompts = class_prompts(scenes, labelled, prompts)
        self.plain_prompts = class_prompts(scenes, labelled, "p1")
        self._sources: dict[tuple[str, int], WindowSource] = {}
        self._windows: WindowSource | None = None

    def run(self, method: str, features: str, split: Split, seed: int) -> Predicted:
        """What a method, trained on the split's shots, says of its test pixels."""
        if method == OURS:
            return self._ours(split, seed)
        if method == "clip":
            return self._clip(split, seed)
        if method == "linear":
            source = self._source("mnf", LINEAR_WINDOW)
            windows = [self._named(source, part) for part in (split.train, split.test)]
            values, probabilities, classes = predict_linear(windows[0], split.train_labels, windows[1])
            return Predicted(values, log_odds(probabilities, classes.tolist()))
        rows = [self._rows(part, features) for part in (split.train, split.test)]
        return Predicted(*predict_baseline(method, rows[0], split.train_labels, rows[1], seed=seed))

    def _rows(self, centres: np.ndarray, features: str) -> np.ndarray:
        source = self._source("standard", self.config.model.window)
        parts = [centre_and_mean_features(self._named(source, part))[features] for part in in_parts(centres)]
        return np.concatenate(parts)

    def _source(self, kind: str, window: int) -> WindowSource:
        key = (kind, window)
        if key not in self._sources:
            front_end = fit_front_end(kind, self.scenes, self.config.components)
            self._sources[key] = WindowSource(self.scenes, front_end, window, self.budget)
        return self._sources[key]

    @staticmethod
    def _named(source: WindowSource, centres: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(source.front_end.channels, source.windows(centres), strict=True))

    def _ours(self, split: Split, seed: int) -> Predicted:
        return self._train_and_predict(split, self.prompts, self.config, self.umd, seed)

    def _clip(self, split: Split, seed: int) -> Predicted:
        """Image and text towers from scratch, plain class names: what pretraining and prompts are compared with."""
        flc = self.config.flc.model_copy(update={"encoder": "finetune"})
        config = self.config.model_copy(update={"flc": flc})
        return self._train_and_predict(split, self.plain_prompts, config, None, seed)

    def _train_and_predict(
        self, split: Split, prompts: Sequence[str], config: Config, umd: UmdResult | None, seed: int
    ) -> Predicted:
        if self._windows is None:
            self._windows = window_source(self.scenes, self.config, self.umd)
        shots = Shots(split.train, split.train_labels, self.labelled.classes, tuple(prompts))
        result = train_flc(self.scenes, shots, config, umd=umd, source=self._windows, seed=seed, device=self.device)
        return classify_centres(result, self._windows, split.test, self.device)


def as_classifier(result: FlcResult, device: str = "auto") -> Classifier:
    """A trained model as prediction uses it."""
    where = Compute.choose(device, result.config.precision)
    return Classifier(result.model, result.text_embeddings, result.classes, result.front_end, result.config, where)


def classify_centres(result: FlcResult, source: WindowSource, centres: np.ndarray, device: str = "auto") -> Predicted:
    """What a trained model says of pixels ``(n, 3)`` (scene, row, column), their windows taken from ``source``."""
    classifier = as_classifier(result, device)
    probabilities = np.concatenate([classifier.probabilities(source.windows(part)) for part in in_parts(centres)])
    return Predicted(classifier.values(probabilities), log_odds(probabilities, [item.value for item in result.classes]))


def log_odds(probabilities: np.ndarray, values: Sequence[int]) -> np.ndarray | None:
    """Ranking (n,) float64 of (n, 2) probabilities of two class values; None for any other number of classes.

    The ratio still tells apart what is so sure that the larger probability is rounded to 1.
    """
    if len(values) != 2:
        return None
    logarithms = np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float64).tiny))
    larger = int(np.argmax(values))
    return logarithms[:, larger] - logarithms[:, 1 - larger]


def predict_centres(result: FlcResult, source: WindowSource, centres: np.ndarray, device: str = "auto") -> np.ndarray:
    """The class values ``(n,)`` of :func:`classify_centres`."""
    return classify_centres(result, source, centres, device).values


def in_parts(centres: np.ndarray) -> list[np.ndarray]:
    """Centres in order, so many at a time that their windows fit in memory."""
    return [centres[first : first + PART] for first in range(0, max(1, len(centres)), PART)]


def held_out(result: FlcResult, source: WindowSource, split: Split, device: str = "auto") -> Scores:
    """Figures of a trained model on the test pixels of its split."""
    predicted = classify_centres(result, source, split.test, device)
    return score(split.test_labels, predicted.values, [item.value for item in result.classes], predicted.ranking)


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
        umd: a pretrained model; None pretrains one (kept in ``out/umd``), or starts from random weights with
            ``pretrain=False``.
        out: folder for ``predictions.jsonl``, which ``resume`` goes on with; more shots, seeds and baselines may be
            asked for then.

    Raises:
        UsageError: among others, ``out`` was started with other settings, scenes or pretraining.
        InputDataError: see its message.
    """
    began = time.monotonic()
    plan, config = plan or Plan(), config or load_config()
    labelled = labelled_pixels(scenes, plan.classes)
    seeds = range(plan.first_seed, plan.first_seed + plan.seeds)
    splits = {
        (k, s): labelled.split(plan.split, k, s, config.model.window, plan.on_short, plan.test_limit)
        for k in plan.shots
        for s in seeds
    }
    contest = Contest(scenes, labelled, config, umd, plan.prompts, device)
    if out is not None:
        open_folder(out, resume)
    if umd is None and pretrain:  # the long part, once labels, shots and prompts are known to be good
        folder = None if out is None else out / "umd"
        contest.umd = train_umd(
            scenes, config, seed=plan.first_seed, out=folder, device=device, resume=resume, progress=progress
        )
    values = [item.value for item in labelled.classes]
    result = Evaluation(scene_title(scenes), plan, labelled.classes)
    done, record = _journal(out, _identity(scenes, plan, config, contest.umd))
    jobs = [(k, s, m, f) for k in plan.shots for m, f in plan.entries() for s in seeds]
    for number, (shots, seed, method, features) in enumerate(jobs):
        key = json.dumps([plan.split, shots, seed, method, features])
        split = splits[shots, seed]
        result.split_report = split.report
        if key not in done:
            done[key] = contest.run(method, features, split, seed)
            record(key, done[key])
        scores = score(split.test_labels, done[key].values, values, done[key].ranking)
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


def _identity(scenes: Sequence[Scene], plan: Plan, config: Config, umd: UmdResult | None) -> str:
    """What predictions depend on besides split, shots, seed, method and features."""
    start = None if umd is None else weights_digest(umd.model.encoder)
    drawn = [plan.prompts, plan.on_short, plan.classes, plan.test_limit]
    return fingerprint("evaluate", settings_of(config), drawn, [scene.sha256 for scene in scenes], start)


def _journal(out: Path | None, identity: str) -> tuple[dict[str, Predicted], Callable[[str, Predicted], None]]:
    """Predictions already on disk, and how to add one; the first line says what they depend on."""
    if out is None:
        return {}, lambda key, predicted: None
    path = out / "predictions.jsonl"
    lines = _whole_lines(path) or [{"fingerprint": identity}]
    if lines[0].get("fingerprint") != identity:
        raise UsageError(
            f"{path} was made with other settings, scenes or pretraining; resume with the same, or give another --out"
        )
    with replacing(path) as temporary:  # anew, so that nothing is appended to a line that a kill cut short
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in lines), encoding="utf-8")

    def record(key: str, predicted: Predicted) -> None:
        ranking = None if predicted.ranking is None else predicted.ranking.tolist()
        with open(path, "a", encoding="utf-8") as file:
            entry = {"key": key, "predicted": predicted.values.tolist(), "ranking": ranking}
            file.write(json.dumps(entry) + "\n")

    return {entry["key"]: _read_entry(entry) for entry in lines[1:]}, record


def _read_entry(entry: dict[str, Any]) -> Predicted:
    ranking = entry.get("ranking")
    return Predicted(np.array(entry["predicted"], np.int64), None if ranking is None else np.array(ranking))


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break  # the line that a kill cut short
    return entries
