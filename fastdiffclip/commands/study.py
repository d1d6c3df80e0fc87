"""The command ``study``: the paper's tables and figures on scenes of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdiffclip.commands import process, training, views, workflow
from fastdiffclip.commands.terminal import progress_bars, say, table
from fastdiffclip.config import load_config
from fastdiffclip.runtime import set_threads
from fastdiffclip.scene.store import Scene, open_scene
from fastdiffclip.study.catalogue import Study
from fastdiffclip.study.crew import count_jobs
from fastdiffclip.study.exams import generated_exams
from fastdiffclip.study.job import Options
from fastdiffclip.study.output import notes_of, summary_of, table_of, title_of, write_study
from fastdiffclip.study.pictures import draw_features, draw_maps
from fastdiffclip.study.plots import plot_figures
from fastdiffclip.study.runner import StudyResult, run_study

GENERATED = (
    "No exams were named: these are generated ones (dark bands, whole or broken). Their figures say that the command "
    "works and nothing about knees."
)


def run(
    study: Study, paths: Sequence[Path], options: Options, *, out: Path | None, resume: bool, jobs: int, device: str
) -> dict[str, Any]:
    """Run a study and show it; returns what ``--json`` prints."""
    set_threads(1)  # pieces share the machine by processes
    made = study.exams and not paths
    scenes = _scenes(study, paths, options)
    folder = out or training.new_folder(scenes, study.name)
    count = count_jobs(jobs, device)
    with process.keeping(study.name, folder), progress_bars() as progress:
        result = run_study(
            study, scenes, options, out=folder, resume=resume, jobs=count, device=device, progress=progress
        )
        if made:
            result.notes = (GENERATED, *result.notes)
        return _show(result)


def _scenes(study: Study, paths: Sequence[Path], options: Options) -> list[Scene]:
    if study.exams and not paths:
        settings = load_config(options.recipe, options.file, options.overrides)
        return [open_scene(path) for path in generated_exams(workflow.RUNS, settings.model.window)]
    return workflow.open_scenes(paths)


def _show(result: StudyResult) -> dict[str, Any]:
    columns, rows = table_of(result)
    table(title_of(result), columns, rows, right=1 if result.study.kind == "features" else 2)
    for note in views.condensed(notes_of(result)):
        say(f"  {note}")
    say()
    files = [*write_study(result), draw(result)]
    for path in files:
        say(f"Written: {path}")
    say(
        f"{result.computed} of {result.results} results computed, {result.pretrainings} "
        f"pretraining{'' if result.pretrainings == 1 else 's'}, in {result.seconds:.0f} s"
        f"{'; the rest was there.' if result.computed < result.results else '.'}"
    )
    return summary_of(result) | {"out": str(result.out), "files": [str(path) for path in files]}


def draw(result: StudyResult) -> Path:
    """Write the picture of a study beside its table."""
    path = result.out / f"{result.study.name}.png"
    {"scores": plot_figures, "maps": draw_maps, "features": draw_features}[result.study.kind](result, path)
    return path
