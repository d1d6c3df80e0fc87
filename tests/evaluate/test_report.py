"""The report page: well-formed, self-contained, faithful to its figures, and whole with any part left out."""

from __future__ import annotations

import dataclasses
import os
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.evaluate.metrics import score
from fastdiffclip.evaluate.report import CurvePanel, ReportInput, Restoration, write_report
from fastdiffclip.evaluate.report_figures import (
    composite_bands,
    figure_class_map,
    figure_composite,
    figure_curves,
    figure_windows,
)
from fastdiffclip.infer.raster import class_areas
from fastdiffclip.scene.store import ClassInfo

CLASSES = [
    ClassInfo(1, "grass & <weeds>", "short & green"),
    ClassInfo(2, "water"),
    ClassInfo(7, "never seen"),
]
VOID = {"meta", "img", "br", "link", "input", "hr"}


def row(method: str, shots: int | str, oa: float, split: str = "disjoint", **more: object) -> dict[str, object]:
    figures = {
        "oa_mean": oa,
        "oa_sd": 1.5,
        "aa_mean": oa - 1,
        "aa_sd": 2.5,
        "kappa_mean": oa - 9,
        "kappa_sd": 3.5,
    }
    return {
        "scene": "field",
        "split": split,
        "shots": shots,
        "method": method,
        **figures,
        "seeds": 10,
        **more,
    }


def full_report(folder: Path) -> ReportInput:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (20, 30)).astype(np.uint8)
    predicted = np.where(rng.random(labels.shape) < 0.8, np.maximum(labels, 1), 7).astype(np.uint8)
    window = rng.random((5, 5, 3))
    masked = np.where(rng.random((5, 5, 1)) < 0.7, np.nan, window)
    known = labels > 0
    return ReportInput(
        title="A <b>field</b>",
        subtitle="two & more",
        facts={"Size": "20 × 30"},
        classes=CLASSES,
        composite=figure_composite(rng.random((20, 30, 3))),
        reference=labels,
        predicted=predicted,
        areas=class_areas(predicted, CLASSES),
        rows=[
            row("fastdiffclip", 2, 81.25),
            row("svm", 2, 70.0, features="pixel"),
            row("svm", 2, 75.5, features="window"),
            row("fastdiffclip", 5, 88.0),
            row("fastdiffclip", 2, 99.0, "random"),
        ],  # fmt: skip
        scores=score(labels[known], predicted[known], [1, 2, 7]),
        scores_caption="seed 0",
        compare=("svm", {1: 50.0, 2: 60.0}),
        curves=[
            CurvePanel(
                "UMD",
                {"all": ([0, 1, 2], [3.0, 2.0, 1.0]), "hsi": ([0, 1, 2], [1.5, 1.0, 0.5])},
                logarithmic=True,
            )
        ],
        restoration=Restoration([("t = 5", [masked, window, window])]),
        timings={"train": 12.34},
        settings={"umd": {"epochs": 3, "weights": [1.0, 0.5]}, "prepare": "mnf"},
        provenance={"seed": 0, "git": None},
        commands=["fastdiffclip demo --set a=<b>"],
        files=[(folder / "maps" / "a map.tif", "map"), ("/elsewhere/x.json", "figures")],
        notes=["mind <this>"],
    )


class Page(HTMLParser):
    """Fails on tags that do not nest; keeps text, ids and addresses."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.ids |= {values["id"] or ""} if "id" in values else set()
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_full_page(tmp_path: Path) -> None:
    path = write_report(tmp_path / "new" / "report.html", full_report(tmp_path / "new"))
    page = Page(path)
    assert {"maps", "figures", "classes", "training", "record"} <= page.ids
    for words in (
        "A <b>field</b>",
        "grass & <weeds>",
        "mind <this>",
        "--set a=<b>",
        "seed 0",
        "umd.weights",
        "1, 0.5",
    ):
        assert words in page.text
    assert "saw the pixels of the whole scene" in page.text
    assert "disjoint split" in page.text and "random split" in page.text and "flatter" in page.text
    assert os.listdir(path.parent) == ["report.html"]


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    path = write_report(tmp_path / "report.html", full_report(tmp_path))
    outside = [address for address in Page(path).addresses if not address.startswith(("#", "data:image/png;base64,"))]
    assert outside == ["maps/a%20map.tif"]
    source = path.read_text(encoding="utf-8")
    assert "<script" not in source and "@import" not in source
    assert re.findall(r"url\((?!#)", source) == []


def test_headline_is_the_honest_split_against_the_best_rival(tmp_path: Path) -> None:
    text = Page(write_report(tmp_path / "r.html", full_report(tmp_path))).text
    assert "field: 2 labelled pixels per class, disjoint split, mean of 10 seeds" in text
    assert "81.2 ± 1.5 +5.8 against svm, window" in text


def test_a_better_rival_is_shown_as_such(tmp_path: Path) -> None:
    rows = [row("fastdiffclip", "all", 70.0, oa_sd=None, seeds=1), row("linear", "all", 72.0)]
    text = Page(write_report(tmp_path / "r.html", ReportInput(title="t", rows=rows))).text
    assert "field: all labelled pixels, disjoint split Overall accuracy 70.0 −2.0 against linear" in text


def test_best_of_each_column_is_bold(tmp_path: Path) -> None:
    source = write_report(tmp_path / "r.html", full_report(tmp_path)).read_text(encoding="utf-8")
    table = source.partition('<table class="figures">')[2].partition("</table>")[0]
    assert re.findall(r'<td class="[^"]*best">([\d.]+)', table) == [
        "81.2",
        "80.2",
        "72.2",
        "88.0",
        "87.0",
        "79.0",
    ]
    assert "svm, pixel" in table and table.count("–") == 6  # no svm at five shots


def test_confusion_matrix_says_what_was_counted(tmp_path: Path) -> None:
    scores = score(np.array([1, 1, 1, 2]), np.array([1, 1, 2, 0]), [1, 2, 7])
    source = write_report(tmp_path / "r.html", ReportInput(title="t", scores=scores, classes=CLASSES)).read_text()
    cells = re.findall(r'<td class="(hit|miss)( deep)?" style="--share:(\d+)%"[^>]*>(\d*)</td>', source)
    assert [cell[3] for cell in cells] == ["2", "1", "", "", "", "", "", "", ""]
    assert cells[0] == ("hit", " deep", "67", "2") and cells[1][2] == "33"
    assert "1 test pixels were given no class" in source and "no test pixel" in source


@pytest.mark.parametrize(
    "left_out",
    [None, *(f.name for f in dataclasses.fields(ReportInput) if f.name not in ("title", "classes"))],
)
def test_any_part_can_be_left_out(tmp_path: Path, left_out: str | None) -> None:
    full = full_report(tmp_path)
    empty = ReportInput(title="Only a title")
    report = empty if left_out is None else dataclasses.replace(full, **{left_out: getattr(empty, left_out)})
    page = Page(write_report(tmp_path / "r.html", report))
    assert left_out is not None or page.ids == set()


def test_a_map_without_its_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputDataError, match=r"\[9\]"):
        write_report(
            tmp_path / "r.html",
            ReportInput(title="t", classes=CLASSES, predicted=np.full((2, 2), 9, np.uint8)),
        )
    assert os.listdir(tmp_path) == []


def read_png(png: bytes) -> np.ndarray:
    from matplotlib.image import imread

    return np.round(255 * imread(BytesIO(png), format="png")).astype(int)


def test_composite_is_stretched_and_knows_its_gaps() -> None:
    block = np.linspace(100, 4000, 1200).reshape(20, 20, 3)
    block[0, 0, 1] = np.nan
    valid = np.ones((20, 20), bool)
    valid[0, 1] = False
    pixels = read_png(figure_composite(block, valid))
    assert pixels.shape == (20, 20, 4)
    assert (pixels[..., 3] == 0).sum() == 2 and pixels[0, 0, 3] == pixels[0, 1, 3] == 0
    assert pixels[0, 2, :3].max() == 0 and pixels[-1, -1, :3].min() == 255
    assert read_png(figure_composite(np.full((3, 3), 5.0))).shape == (3, 3, 4)
    assert (read_png(figure_composite(np.full((3, 3, 3), np.nan)))[..., 3] == 0).all()
    assert read_png(figure_composite(np.ones((3000, 1000, 3), np.uint8))).shape == (1500, 500, 4)


def test_class_map_picture_is_pixel_for_pixel() -> None:
    pixels = read_png(
        figure_class_map(np.array([[0, 1, 2]], np.uint8), [ClassInfo(1, "a", colour=(1, 2, 3)), CLASSES[1]])
    )
    assert pixels[0, 0, 3] == 0 and pixels[0, 1].tolist() == [1, 2, 3, 255] and pixels[0, 2, 3] == 255


def test_windows_share_the_stretch_of_the_clean_one() -> None:
    clean = np.linspace(0, 1, 9).reshape(3, 3)
    noised = clean + 5
    noised[0, 0] = np.nan
    first, last = (read_png(png) for png in figure_windows([noised, clean]))
    assert first[0, 0, 3] == 0 and (first[1:, 1:, :3] == 255).all()
    assert last[0, 0].tolist() == [0, 0, 0, 255] and last[1, 1, 0] == 128


@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("markers", [False, True])
def test_curves_are_valid_svg_in_the_colours_of_the_page(count: int, markers: bool) -> None:
    series = {f"a & <{n}>": ([2, 5, 20], [n + 1.0, n + 2.0, n + 3.0]) for n in range(count)}
    svg = figure_curves(series, x_label="x", y_label="y", logarithmic=not markers, markers=markers)
    ElementTree.fromstring(svg)
    assert "var(--series-1)" in svg and "var(--muted)" in svg and "#0101" not in svg
    assert "DejaVu" not in svg and svg == figure_curves(
        series, x_label="x", y_label="y", logarithmic=not markers, markers=markers
    )
    with pytest.raises(UsageError):
        figure_curves({}, x_label="x", y_label="y")


def test_bands_of_a_composite() -> None:
    bands, caption = composite_bands(tuple(np.linspace(380, 1050, 144)), 144)
    assert "True colour" in caption and list(bands) == sorted(bands, reverse=True)
    assert "False colour (2" in composite_bands((1000.0, 1500.0, 2000.0, 2400.0), 4)[1]
    assert composite_bands(None, 1) == ((0, 0, 0), "False colour (bands 1, 1, 1)")
    assert composite_bands(None, 6)[0] == (5, 3, 1)
