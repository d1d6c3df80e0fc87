"""What a study leaves: a table as Markdown and CSV, everything as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdiffclip.evaluate.metrics import paired_difference
from fastdiffclip.evaluate.tables import write_tables
from fastdiffclip.runtime import machine, versions
from fastdiffclip.study.catalogue import FIGURES
from fastdiffclip.study.published import Published, dataset_of, published_rows
from fastdiffclip.study.runner import Cell, StudyResult

PUBLISHED = "published"


def mean_and_spread(mean: float | None, spread: float | None, sign: str = "") -> str:
    """``72.1 ± 3.4``, the mean alone without a spread, nothing without a mean."""
    if mean is None:
        return ""
    text = f"{mean:{sign}.1f}"
    return text if spread is None else f"{text} ± {spread:.1f}"


def table_of(result: StudyResult) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table, the paper's rows below ours of the same number of shots."""
    study = result.study
    if study.kind == "features":
        rows = [_feature_row(cell) for cell in result.cells]
        return ["features", "dimensions", "test pixels", "nearest shot %"], rows
    judged = FIGURES[study.judged_by]
    columns = ["shots", "method", *(_column(name) for name in study.figures), f"{judged} - {result.reference} (± se)"]
    lines: list[list[str]] = []
    for shots in dict.fromkeys(cell.shots for cell in result.cells):
        lines += [_row(result, cell) for cell in result.cells if cell.shots == shots]
        lines += [_published_row(result, row) for row in _published(result) if row.shots == shots]
    return columns, lines


def about(result: StudyResult) -> str:
    """What a table or picture shows: study, scene, split, number of draws."""
    draws = len(result.cells[0].seeds)
    count = f"{draws} draws" if draws > 1 else "one draw"
    return f"{result.study.name}: {result.study.title}. {result.scene}, split {result.split}, {count}"


def title_of(result: StudyResult) -> str:
    """The title of the table."""
    return about(result) + (" (mean ± sd, percent)" if len(result.cells[0].seeds) > 1 else " (percent)")


def notes_of(result: StudyResult) -> list[str]:
    """What a reader has to know, the paper's claims set against ours among it."""
    notes = list(result.notes)
    if any(cell.row.pretrained and cell.settings["umd"] for cell in result.cells):
        notes.append(
            "Pretraining saw the unlabelled pixels of the whole scene, test pixels included; "
            "no label of a test pixel was used."
        )
    for row in _published(result):
        ours = _ours_minus(result, row)
        beside = f" Here {'; '.join(ours)}." if ours else ""
        notes.append(f"Published: {row.source}; its split and its number of draws are others.{beside}")
    return notes


def write_study(result: StudyResult) -> list[Path]:
    """Write the Markdown, the CSV and the JSON; returns their paths."""
    summary = summary_of(result)
    return write_tables(result.out, title_of(result), *table_of(result), summary, stem=result.study.name)


def summary_of(result: StudyResult) -> dict[str, Any]:
    """Everything, JSON-able: settings, draws, figures of each draw, versions, seconds."""
    return {
        "study": result.study.name,
        "title": result.study.title,
        "scene": result.scene,
        "scenes": [{"name": scene.name, "path": str(scene.path), "sha256": scene.sha256} for scene in result.scenes],
        "split": result.split,
        "recipe": result.recipe,
        "reference": result.reference,
        "rows": [_cell(cell) for cell in result.cells],
        PUBLISHED: [
            {"label": row.label, "shots": row.shots, "minus": row.minus, "figures": row.figures, "source": row.source}
            for row in _published(result)
        ],
        "notes": notes_of(result),
        "computed": result.computed,
        "pretrainings": result.pretrainings,
        "seconds": round(result.seconds, 1),
        "machine": machine(),
        "versions": versions(),
    }


def _cell(cell: Cell) -> dict[str, Any]:
    row = cell.row
    entries = [{key: value for key, value in entry.items() if key not in ("row", "shots")} for entry in cell.entries]
    return {
        "label": row.label, "method": row.method, "features": row.features,
        "shots": "all" if cell.shots is None else cell.shots, "panel": row.panel or None, "value": row.value,
        **(cell.summary() if cell.scores else {}),
        "differences": cell.differences, "settings": cell.settings, "draws": entries,
    }  # fmt: skip


def _column(name: str) -> str:
    return FIGURES[name] if name == "kappa" else f"{FIGURES[name]} %"


def _row(result: StudyResult, cell: Cell) -> list[str]:
    summary = cell.summary()
    figures = [mean_and_spread(summary.get(f"{name}_mean"), summary.get(f"{name}_sd")) for name in result.study.figures]
    difference = cell.differences.get(result.study.judged_by)
    last = "" if difference is None else mean_and_spread(difference["mean"], difference["se"], "+")
    return ["all" if cell.shots is None else str(cell.shots), cell.row.label, *figures, last]


def _published(result: StudyResult) -> list[Published]:
    return published_rows(result.study.name, dataset_of(result.scenes, result.classes))


def _published_row(result: StudyResult, row: Published) -> list[str]:
    sign = "+" if row.minus else ""
    figures = [f"{row.figures[name]:{sign}.2f}" if name in row.figures else "" for name in result.study.figures]
    return ["all" if row.shots is None else str(row.shots), f"{row.label} ({PUBLISHED})", *figures, ""]


def _ours_minus(result: StudyResult, row: Published) -> list[str]:
    """The same difference of ours, of the first row and of the paper's recipe."""
    own = {cell.row.label: cell for cell in result.cells if cell.shots == row.shots}
    if row.minus not in own:
        return []
    texts = []
    for label in dict.fromkeys((*list(own)[:1], "paper")):
        if label not in own or label == row.minus:
            continue
        for name in row.figures:
            first, second = ([scores.to_dict()[name] for scores in own[key].scores] for key in (label, row.minus))
            found = paired_difference(first, second)
            difference = mean_and_spread(found["mean"], found["se"], "+")
            texts.append(f"{label} - {row.minus}: {FIGURES[name]} {difference} (± se)")
    return texts


def _feature_row(cell: Cell) -> list[str]:
    entry = cell.entries[0]
    return [cell.row.label, str(entry["dimensions"]), str(entry["pixels"]), f"{entry['nearest']:.1f}"]
