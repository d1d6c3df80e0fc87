"""One HTML page that shows a run: maps, figures beside the baselines, training, settings, files.

The page stands alone (pictures are embedded, nothing is loaded from elsewhere, no script), follows the
reader's light or dark scheme, and prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from fastdiffclip.evaluate import report_parts as parts
from fastdiffclip.evaluate.metrics import Scores
from fastdiffclip.evaluate.report_figures import figure_class_map, figure_curves, figure_windows
from fastdiffclip.files import replacing
from fastdiffclip.infer.raster import check_map

if TYPE_CHECKING:
    from fastdiffclip.scene.store import ClassInfo

WIDE = 1.9  # width over height from which maps stand below each other
BESIDE = 9  # most classes for which bars and confusion matrix fit beside each other
ANCHORS = {
    "maps": "Map",
    "figures": "Figures",
    "classes": "Classes",
    "training": "Training",
    "record": "Record",
}
SPLITS = {
    "disjoint": "no training window overlaps a test window.",
    "random": "training and test windows overlap: the figures flatter every method that looks at neighbours.",
    "official": "the training and test maps that come with the data set.",
}
SEEN = (
    "Mask diffusion (UMD) saw the pixels of the whole scene, those of the test set included, but none of "
    "their labels; scene statistics are taken from the same pixels. Accuracies and kappa are in percent, ± "
    "is the standard deviation over seeds, the best of a column is bold."
)


@dataclass(frozen=True)
class CurvePanel:
    """One chart of training: name -> (x, y)."""

    title: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    x_label: str = "epoch"
    y_label: str = "loss"
    logarithmic: bool = False


@dataclass(frozen=True)
class Restoration:
    """Windows that the reverse process restored; the last column is the clean window.

    Each row is a label and one (P, P, 3) or (P, P) float array per column; NaN is a masked token.
    """

    rows: Sequence[tuple[str, Sequence[np.ndarray]]]
    columns: Sequence[str] = ("visible, noised", "restored", "clean")


@dataclass(frozen=True, eq=False)
class ReportInput:
    """What a report can show; a part that is empty or None is left out."""

    title: str
    subtitle: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[ClassInfo] = ()
    composite: bytes | None = None  # PNG of `figure_composite`
    composite_caption: str = "Scene"
    reference: np.ndarray | None = None  # (H, W) class map of the labels, 0 = unlabelled
    predicted: np.ndarray | None = None  # (H, W) class map, 0 = nodata
    predicted_caption: str = "Predicted classes"
    areas: Sequence[Mapping[str, Any]] | None = None  # rows of `class_areas`
    rows: Sequence[Mapping[str, Any]] = ()  # rows of `evaluate --json`, with or without ``features``
    scores: Scores | None = None  # one run in detail: per-class accuracies and confusion matrix
    scores_caption: str = ""
    compare: tuple[str, Mapping[int, float]] | None = None  # a method and its accuracy per class
    curves: Sequence[CurvePanel] = ()
    restoration: Restoration | None = None
    timings: Mapping[str, float] = field(default_factory=dict)  # step -> seconds
    settings: Mapping[str, Any] = field(default_factory=dict)  # nested settings are flattened
    provenance: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[str] = ()
    files: Sequence[tuple[str | Path, str]] = ()  # path and what it is
    notes: Sequence[str] = ()


def write_report(path: str | Path, report: ReportInput) -> Path:
    """Write the page, whole or not at all. Raises UsageError or InputDataError for maps that do not fit the
    classes, ResourceError where the file cannot be written."""
    path = Path(path)
    rows = _labelled(report.rows)
    sections = [
        _maps(report),
        _figures(rows),
        _detail(report),
        _training(report),
        _record(report, path),
    ]
    page = _page(report, _headline(rows) + _notes(report.notes), "".join(sections))
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _page(report: ReportInput, top: str, body: str) -> str:
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    subtitle = f'<p class="subtitle">{escape(report.subtitle)}</p>' if report.subtitle else ""
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in ANCHORS.items() if f'id="{anchor}"' in body)
    nav = f"<nav>{links}</nav>" if links else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(report.title)}</title><style>{style}</style></head><body><main>"
        f'<header><p class="brand">fastdiffclip report</p><h1>{escape(report.title)}</h1>{subtitle}'
        f"{parts.definitions(report.facts, 'facts')}{nav}</header>"
        f"{top}{body}</main></body></html>\n"
    )


def _notes(notes: Sequence[str]) -> str:
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{lines}</ul>' if lines else ""


def _labelled(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with a ``label``: the method, and its features where it stands there with several sets of them."""
    features: dict[str, set[Any]] = {}
    for row in rows:
        features.setdefault(row["method"], set()).add(row.get("features"))
    return [
        {**row, "label": row["method"] + (f", {row['features']}" if len(features[row["method"]]) > 1 else "")}
        for row in rows
    ]


def _headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """The first row of ours under an honest split, else the first of ours."""
    ours = [row for row in rows if row["method"] == parts.OURS]
    if not ours:
        return ""
    row = next((row for row in ours if row["split"] != "random"), ours[0])
    alike = ("scene", "split", "shots")
    rivals = [other for other in rows if other is not row and all(other.get(key) == row.get(key) for key in alike)]
    seeds = row.get("seeds")
    over = f", mean of {seeds} seeds" if isinstance(seeds, int) and seeds > 1 else ""
    scene = f"{row['scene']}: " if row.get("scene") else ""
    words = escape(f"{scene}{parts.shots_words(row['shots'])}, {row['split']} split{over}")
    return f'<div class="headline"><p class="lead">{words}</p>{parts.headline(row, rivals)}</div>'


def _maps(report: ReportInput) -> str:
    """Prediction, scene and labels: the first large beside the others, wide scenes below each other."""
    cards = []
    maps = ((report.predicted, report.predicted_caption), (report.reference, "Reference labels"))
    for class_map, caption in maps:
        if class_map is not None:
            check_map(class_map, report.classes)
            cards.append((figure_class_map(class_map, report.classes), caption))
    if report.composite is not None:
        cards.insert(1 if report.predicted is not None else 0, (report.composite, report.composite_caption))
    if not cards:
        return ""
    shapes = [class_map.shape for class_map, _ in maps if class_map is not None]
    wide = bool(shapes) and shapes[0][1] > WIDE * shapes[0][0]
    layout = "wide" if wide else "leading" if len(cards) == 3 else ""
    figures = "".join(
        f"<figure>{parts.image(png, caption, 'pixels')}<figcaption>{escape(caption)}</figcaption></figure>"
        for png, caption in cards
    )
    body = f'<div class="maps {layout}">{figures}</div>{parts.legend(report.classes, report.areas)}'
    return parts.section("maps", "Map", body)


def _figures(rows: Sequence[Mapping[str, Any]]) -> str:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((str(row.get("scene", "")), str(row["split"])), []).append(row)
    blocks = []
    for (scene, split), members in groups.items():
        meaning = SPLITS.get(split, "")
        heading = f"<h3>{escape(f'{scene}, {split} split' if scene else f'{split} split')}</h3>"
        text = f'<p class="note">{escape(split.capitalize())}: {meaning}</p>' if meaning else ""
        blocks.append(f'<div class="block">{heading}{text}{parts.comparison_table(members)}{_learning(members)}</div>')
    return parts.section("figures", "Figures beside the baselines", "".join(blocks), SEEN)


def _learning(rows: Sequence[Mapping[str, Any]]) -> str:
    """Average accuracy over the number of labelled pixels, where there are several numbers."""
    counted = [row for row in rows if isinstance(row["shots"], int)]
    if len({row["shots"] for row in counted}) < 2:
        return ""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in sorted(counted, key=lambda row: row["shots"]):
        x, y = series.setdefault(row["label"], ([], []))
        x.append(row["shots"])
        y.append(row["aa_mean"])
    order = sorted(series, key=lambda label: label != parts.OURS)
    chart = figure_curves(
        {label: series[label] for label in order},
        x_label="labelled pixels per class",
        y_label="average accuracy, %",
        markers=True,
    )
    return f'<figure class="chart">{chart}</figure>'


def _detail(report: ReportInput) -> str:
    if report.scores is None:
        return ""
    bars = parts.class_bars(report.scores, report.classes, report.compare)
    matrix = parts.confusion_table(report.scores, report.classes)
    columns = "two" if len(report.scores.classes) <= BESIDE else ""
    body = (
        f'<div class="{columns}"><div class="block"><h3>Accuracy per class</h3>{bars}</div>'
        f'<div class="block"><h3>Confusion matrix</h3>{matrix}</div></div>'
    )
    return parts.section("classes", "Class by class", body, escape(report.scores_caption))


def _training(report: ReportInput) -> str:
    charts = ""
    for panel in report.curves:
        if panel.series:
            chart = figure_curves(
                panel.series, x_label=panel.x_label, y_label=panel.y_label, logarithmic=panel.logarithmic
            )
            caption = f"<figcaption>{escape(panel.title)}</figcaption>"
            charts += f'<figure class="chart">{caption}{chart}</figure>'
    body = f'<div class="charts">{charts}</div>' if charts else ""
    if report.restoration is not None:
        windows = _windows(report.restoration)
        body += f'<div class="block"><h3>Windows restored by the reverse process</h3>{windows}</div>'
    return parts.section("training", "Training", body)


def _windows(restoration: Restoration) -> str:
    heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in restoration.columns)
    body = ""
    for label, windows in restoration.rows:
        cells = "".join(
            f"<td>{parts.image(png, f'{label}: {column}', 'pixels window')}</td>"
            for png, column in zip(figure_windows(windows), restoration.columns, strict=True)
        )
        body += f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>'
    return (
        f'<div class="scroll"><table class="windows"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _record(report: ReportInput, path: Path) -> str:
    seconds = {step: f"{value:,.1f} s" for step, value in report.timings.items()}
    commands = escape("\n".join(report.commands))
    blocks = {
        "Files": _files(report.files, path.parent),
        "Time": parts.definitions(seconds, "pairs"),
        "Commands": f"<pre>{commands}</pre>" if commands else "",
        "Provenance": parts.definitions(parts.flatten(report.provenance), "pairs"),
        "Settings": parts.definitions(parts.flatten(report.settings), "pairs"),
    }
    body = "".join(f'<div class="block"><h3>{name}</h3>{html}</div>' for name, html in blocks.items() if html)
    return parts.section("record", "Record of the run", body)


def _files(listed: Sequence[tuple[str | Path, str]], folder: Path) -> str:
    """Files below the report's folder are links, so that the folder can be moved as a whole."""
    lines = ""
    for file, words in listed:
        try:
            relative = Path(file).absolute().relative_to(folder.absolute()).as_posix()
        except ValueError:  # elsewhere
            name = escape(str(file))
        else:
            name = f'<a href="{quote(relative)}">{escape(relative)}</a>'
        lines += f"<li><span>{name}</span><small>{escape(words)}</small></li>"
    return f'<ul class="files">{lines}</ul>' if lines else ""
