"""The commands that train and judge: ``train-umd``, ``train-flc``, ``evaluate``."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiffclip import checkpoint
from fastdiffclip.commands import process, views, workflow
from fastdiffclip.commands.new_classes import unlabelled_classes
from fastdiffclip.commands.terminal import progress_bars, say
from fastdiffclip.config import Config
from fastdiffclip.evaluate.runner import Plan
from fastdiffclip.files import require_free
from fastdiffclip.runtime import Compute, be_deterministic, set_threads
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.umd import UmdResult
from fastdiffclip.train.world import World


@dataclass(frozen=True)
class Job:
    """What the training commands have in common; ``out`` None stands for the default folder."""

    config: Config
    seed: int
    out: Path | None
    resume: bool
    dry_run: bool
    device: str
    threads: int
    deterministic: bool = False
    tensorboard: bool = False

    def folder(self, scenes: Sequence[Scene], stage: str) -> Path:
        """The folder of this run, which is free or to be resumed; one for all processes. Raises :class:`UsageError`."""
        world = World.from_environment()
        folder = self.out or Path(world.text_of_main(str(new_folder(scenes, stage))))
        if world.main:
            require_free(folder, self.resume)
        return folder

    @contextmanager
    def opened(self, paths: Sequence[Path]) -> Iterator[list[Scene]]:
        """The scenes; a dry run writes the built-in one into a temporary folder. All processes have met then."""
        set_threads(self.threads)
        if self.deterministic:
            be_deterministic()
        where = Compute.choose(self.device, self.config.precision, self.config.compile)
        with World.from_environment().met(where.device) as world, tempfile.TemporaryDirectory() as folder:
            root = Path(folder) if self.dry_run else workflow.RUNS
            if world.main:  # it makes the built-in scene where that is asked for
                workflow.open_scenes(paths, root)
            world.wait()
            yield workflow.open_scenes(paths, root)


@dataclass(frozen=True)
class Labels:
    """What ``train-flc`` learns from: shots per class (None: all), how they are drawn, what classes are called.

    ``added``: description and share, by name, of classes that have no labelled pixel.
    """

    shots: int | None
    split: str
    on_short: str
    prompts: str | None
    added: Mapping[str, tuple[str, float | None]]


def umd(job: Job, paths: Sequence[Path]) -> dict[str, Any]:
    """Run ``train-umd``; returns what ``--json`` prints."""
    with job.opened(paths) as scenes:
        folder = job.folder(scenes, "umd")
        plan = workflow.plan_umd(scenes, job.config)
        views.show_plan("train-umd", plan)
        if job.dry_run:
            return _dry(plan, folder)
        return plan | views.show_umd(_pretrain(job, scenes, folder, job.resume))


def flc(job: Job, paths: Sequence[Path], labels: Labels, umd_choice: str | None) -> dict[str, Any]:
    """Run ``train-flc``, after ``train-umd`` where no pretrained model fits; returns what ``--json`` prints."""
    with job.opened(paths) as scenes:
        folder = job.folder(scenes, "flc")
        plan = workflow.plan_flc(
            scenes, job.config, labels.shots, labels.split, labels.on_short, labels.prompts, job.seed, labels.added
        )
        wanted = umd_choice != "none" and (umd_choice is not None or job.config.reads_network)
        pretrained = workflow.find_umd(scenes, job.config, umd_choice) if wanted else None
        views.show_plan("train-flc", plan)
        missing = pretrained is None and wanted
        if missing:
            say("No pretrained model of these scenes and settings was found: train-umd runs first.")
        elif pretrained is not None:
            say(f"Pretrained network: {pretrained.folder}")
        if job.dry_run:
            return _dry(plan, folder)
        if missing:
            first = new_folder(scenes, "umd")
            pretrained = _pretrain(job, scenes, first, False)
            say(f"Pretrained network: {first}")
        with process.keeping("train-flc", folder), progress_bars() as progress:
            trained = workflow.train_classifier(
                scenes, job.config, umd=pretrained, shots=labels.shots, split_kind=labels.split,
                on_short=labels.on_short, prompts=labels.prompts, seed=job.seed, out=folder, device=job.device,
                resume=job.resume, progress=progress, tensorboard=job.tensorboard, added=labels.added,
            )  # fmt: skip
        used = None if pretrained is None else str(pretrained.folder)
        return plan | {"umd": used} | views.show_trained(trained)


def evaluation(job: Job, paths: Sequence[Path], plan: Plan, umd_choice: str | None) -> dict[str, Any]:
    """Run ``evaluate``; returns what ``--json`` prints."""
    with job.opened(paths) as scenes:
        folder = job.folder(scenes, "evaluate")
        with process.keeping("evaluate", folder), progress_bars() as progress:
            result = workflow.evaluate_scenes(
                scenes, plan, job.config, umd=umd_choice, out=folder, resume=job.resume, device=job.device,
                progress=progress,
            )  # fmt: skip
            summary = views.show_evaluation(result, folder)
        if plan.classes is None and (absent := unlabelled_classes(scenes, result.classes)):
            say(views.left_out([item.name for item in absent]))
        return summary


def new_folder(scenes: Sequence[Scene], stage: str) -> Path:
    """``runs/<scene>/<stage>-<time>``, with a number behind it where a run of the same second has that."""
    first = checkpoint.new_run_path(workflow.folder_name(scenes), stage, workflow.RUNS)
    others = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([first], others) if not folder.exists())


def _pretrain(job: Job, scenes: Sequence[Scene], folder: Path, resume: bool) -> UmdResult:
    with process.keeping("train-umd", folder), progress_bars() as progress:
        return workflow.pretrain(
            scenes, job.config, seed=job.seed, out=folder, device=job.device, resume=resume, progress=progress,
            tensorboard=job.tensorboard,
        )  # fmt: skip


def _dry(plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    say(f"Dry run: nothing was written; the run would go to {folder}")
    return plan | {"out": str(folder), "dry_run": True}
