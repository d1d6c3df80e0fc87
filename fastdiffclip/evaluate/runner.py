"""Repeated honest evaluation: many splits, our method and the baselines on the same pixels, one table."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdiffclip.config import Config, load_config
from fastdiffclip.errors import UsageError, nearest
from fastdiffclip.evaluate.contest import BASELINES, CLASSICAL, OURS, Contest, Predicted, scores_of
from fastdiffclip.evaluate.journal import Journal
from fastdiffclip.evaluate.metrics import Scores, summarise
from fastdiffclip.files import held_folder
from fastdiffclip.runtime import Progress, silent
from fastdiffclip.scene.labelled import labelled_pixels
from fastdiffclip.scene.splits import Split
from fastdiffclip.scene.store import ClassInfo, Scene
from fastdiffclip.train.loop import fingerprint, settings_of, weights_digest
from fastdiffclip.train.umd import UmdResult, train_umd

DEFAULT_BASELINES = (*CLASSICAL, "linear")
JOURNAL = "predictions.jsonl"
FORMAT = 1  # of its entries: raise it when results of the same settings change


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
        umd: a pretrained model; None pretrains one (kept in ``out/umd``) where the settings look through the encoder,
            or starts from random weights with ``pretrain=False``.
        out: folder for ``predictions.jsonl``, which ``resume`` goes on with; more shots, seeds and baselines may be
            asked for then.

    Raises:
        UsageError: among others, ``out`` was started with other settings, scenes, pretraining or another version.
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
    result = Evaluation(scene_title(scenes), plan, labelled.classes)
    with nullcontext() if out is None else held_folder(out, resume):
        # The long part, once labels, shots and prompts are known to be good.
        if umd is None and pretrain and config.reads_network:
            folder = None if out is None else out / "umd"
            contest.umd = train_umd(
                scenes, config, seed=plan.first_seed, out=folder, device=device, resume=resume, progress=progress
            )
        journal = Journal(None if out is None else out / JOURNAL, _identity(contest, plan), FORMAT)
        _run(result, contest, splits, journal, progress)
    result.seconds = time.monotonic() - began
    return result


def _run(
    result: Evaluation, contest: Contest, splits: Mapping[tuple[int | None, int], Split], journal: Journal,
    progress: Progress,
) -> None:  # fmt: skip
    """Every method on every draw, where the journal lacks it; the scores of all go to the result."""
    plan, values = result.plan, [item.value for item in result.classes]
    jobs = [(*draw, *entry) for k in plan.shots for entry in plan.entries() for draw in splits if draw[0] == k]
    for number, (shots, seed, method, features) in enumerate(jobs):
        key = json.dumps([plan.split, shots, seed, method, features])
        split = splits[shots, seed]
        result.split_report = split.report
        if key not in journal.entries:
            journal.add(key, contest.run(method, features, split, seed).to_entry())
        scores = scores_of(Predicted.from_entry(journal.entries[key]), split, values)
        result.scores.setdefault((method, features, shots), []).append(scores)
        words = f"{method} {'all' if shots is None else shots} shots, AA {scores.aa:.1f}"
        progress("evaluate", number + 1, len(jobs), words)


def scene_title(scenes: Sequence[Scene]) -> str:
    """Name of one scene, or of the folder that several lie in."""
    return scenes[0].name if len(scenes) == 1 else f"{scenes[0].path.resolve().parent.name} ({len(scenes)} scenes)"


def _identity(contest: Contest, plan: Plan) -> str:
    """What predictions depend on besides split, shots, seed, method and features."""
    start = None if contest.umd is None else weights_digest(contest.umd.network)
    drawn = [plan.on_short, plan.classes, plan.test_limit]
    shas = [scene.sha256 for scene in contest.scenes]
    return fingerprint("evaluate", settings_of(contest.config), contest.prompts, drawn, shas, start)
