"""Runs any study: pretrainings first, each once, then every piece that the journal lacks; and what came of it."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastdiffclip.config import load_config
from fastdiffclip.errors import InputDataError
from fastdiffclip.evaluate.contest import SOURCES
from fastdiffclip.evaluate.journal import Journal
from fastdiffclip.evaluate.metrics import Scores, paired_difference, summarise
from fastdiffclip.evaluate.runner import scene_title
from fastdiffclip.files import held_folder, write_atomic
from fastdiffclip.runtime import Progress, memory_budget, silent
from fastdiffclip.scene.labelled import labelled_pixels
from fastdiffclip.scene.store import ClassInfo, Scene
from fastdiffclip.study.catalogue import FIGURES, Row, Study
from fastdiffclip.study.crew import Task, crew
from fastdiffclip.study.job import FORMAT, Job, Options, Piece, Pretraining, make_job
from fastdiffclip.study.workshop import Done
from fastdiffclip.train.loop import settings_of

JOURNAL = "draws.jsonl"
MANIFEST = "manifest.json"  # of a finished pretraining


@dataclass
class Cell:
    """One line at one number of shots: what the journal holds of its draws, in the order of the seeds."""

    row: Row
    settings: dict[str, Any]
    shots: int | None
    seeds: tuple[int, ...]
    entries: list[dict[str, Any]]
    keys: tuple[str, ...]
    differences: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def scores(self) -> list[Scores]:
        """The figures of each draw; none of a picture of features."""
        return [Scores.from_dict(entry["scores"]) for entry in self.entries if "scores" in entry]

    def summary(self) -> dict[str, Any]:
        """Mean and sd of every figure, see :func:`fastdiffclip.evaluate.metrics.summarise`."""
        return summarise(self.scores)


@dataclass
class StudyResult:
    """Everything that tables and pictures are made of.

    Attributes:
        reference: label of the row that differences are taken to.
        seconds: of this command; ``computed`` of ``results`` pieces of it were not in the journal before.
    """

    study: Study
    scene: str
    scenes: list[Scene]
    classes: tuple[ClassInfo, ...]
    split: str
    recipe: str
    out: Path
    cells: list[Cell]
    reference: str
    notes: tuple[str, ...]
    seconds: float
    results: int
    computed: int
    pretrainings: int

    def arrays(self, cell: Cell) -> dict[str, np.ndarray]:
        """The arrays of a cell's first draw."""
        return read_arrays(self.out, cell.keys[0])


def run_study(
    study: Study,
    scenes: Sequence[Scene],
    options: Options | None = None,
    *,
    out: Path,
    resume: bool = False,
    jobs: int = 1,
    device: str = "auto",
    progress: Progress = silent,
) -> StudyResult:
    """Run a study into ``out``, or finish what is there with ``resume``.

    ``out`` may hold other studies of any scenes and settings: a piece that one of them did already is not done again.
    Every piece runs on one thread, so that its result does not depend on ``jobs``, the number of processes.

    Raises:
        UsageError, InputDataError, ResourceError: see their messages.
    """
    began, options = time.monotonic(), options or Options()
    with held_folder(out, resume):
        settings = load_config(options.recipe, options.file, options.overrides)
        budget = memory_budget(settings.memory_gib) // (SOURCES * max(jobs, 1))
        job, notes = make_job(study, scenes, options, out, device, budget)
        journal = Journal(out / JOURNAL, "study", FORMAT)
        absent = {piece.key: piece for piece in job.pieces if not _is_there(journal, out, study, piece)}
        missing = sorted(absent.values(), key=lambda piece: piece.line)  # what a line reads stays in memory
        needed = {piece.umd for piece in missing}
        first = [
            each
            for each in job.pretrainings
            if each.key in needed and not (job.umd_folder(each.key) / MANIFEST).is_file()
        ]
        if missing:
            _work(job, first, missing, journal, min(jobs, len(missing)), progress)
        cells = _cells(job, journal)
    usual = study.reference if study.reference in {cell.row.label for cell in cells} else cells[0].row.label
    reference = options.reference or usual
    _compare(cells, reference, study)
    labelled, last = labelled_pixels(scenes, options.classes), cells[-1]
    report = job.draw(labelled, last.shots, last.seeds[-1]).report
    return StudyResult(
        study, scene_title(scenes), list(scenes), labelled.classes, job.split, settings.recipe, out, cells, reference,
        (*report, *study.notes, *notes),
        time.monotonic() - began, len(job.pieces), len(missing), len(first),
    )  # fmt: skip


def _work(
    job: Job, first: Sequence[Pretraining], pieces: Sequence[Piece], journal: Journal, jobs: int, progress: Progress
) -> None:
    name = job.study.name
    with crew(job, jobs, progress) as work:
        for tasks, title in ((list[Task](first), f"{name} umd"), (list[Task](pieces), name)):
            if tasks:
                progress(title, 0, len(tasks), "")
            for number, (task, done) in enumerate(work(tasks), 1):
                note = f"seed {task.seed}"
                if isinstance(task, Piece):
                    _keep(job.out, task, done, journal)
                    note = _note(done.entry)
                progress(title, number, len(tasks), note)


def _keep(out: Path, piece: Piece, done: Done, journal: Journal) -> None:
    """Arrays first: an entry of the journal says that they are there."""
    if done.arrays:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **done.arrays)
        (out / "arrays").mkdir(exist_ok=True)
        write_atomic(_arrays_path(out, piece.key), buffer.getvalue())
    journal.add(piece.key, done.entry)


def _note(entry: dict[str, Any]) -> str:
    shots = "all" if entry["shots"] is None else entry["shots"]
    figure = f", AA {entry['scores']['aa']:.1f}" if "scores" in entry else ""
    return f"{entry['row']}, {shots} shots, seed {entry['seed']}{figure}"


def _is_there(journal: Journal, out: Path, study: Study, piece: Piece) -> bool:
    return piece.key in journal.entries and (study.kind == "scores" or _arrays_path(out, piece.key).is_file())


def _arrays_path(out: Path, key: str) -> Path:
    return out / "arrays" / f"{key}.npz"


def read_arrays(out: Path, key: str) -> dict[str, np.ndarray]:
    """The arrays of a piece. Raises :class:`InputDataError` for a damaged file."""
    path = _arrays_path(out, key)
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputDataError(f"{path} cannot be read: {error}; remove it and run the study with --resume") from None


def _cells(job: Job, journal: Journal) -> list[Cell]:
    """By number of shots, then in the order of the rows."""
    found: dict[tuple[int | None, int], list[Piece]] = {}
    for piece in job.pieces:
        found.setdefault((piece.shots, piece.line), []).append(piece)
    cells = []
    for (shots, number), pieces in found.items():
        line = job.lines[number]
        settings = {
            **settings_of(line.config), "pretrained": line.row.pretrained, "prompts": list(line.texts),
            "umd": pieces[0].umd,
        }  # fmt: skip
        entries = [journal.entries[piece.key] for piece in pieces]
        seeds, keys = zip(*((piece.seed, piece.key) for piece in pieces), strict=True)
        cells.append(Cell(line.row, settings, shots, seeds, entries, keys))
    return cells


def _compare(cells: Sequence[Cell], reference: str, study: Study) -> None:
    """Give every cell its paired differences to the reference's draws of the same shots."""
    if study.kind == "features":
        return
    others = {cell.shots: cell.scores for cell in cells if cell.row.label == reference}
    for cell in cells:
        if cell.row.label != reference:
            mine, theirs = cell.scores, others[cell.shots]
            for name in FIGURES:
                pairs = [(_figure(one, name), _figure(two, name)) for one, two in zip(mine, theirs, strict=True)]
                if None not in {part for pair in pairs for part in pair}:
                    cell.differences[name] = paired_difference(*zip(*pairs, strict=True))


def _figure(scores: Scores, name: str) -> float | None:
    found = scores.to_dict().get(name)
    return None if found is None else float(found)
