"""What each table and figure of the paper consists of, as data: rows, numbers of shots, figures, axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fastdiffclip.errors import UsageError, nearest
from fastdiffclip.evaluate.contest import CLASSICAL, OURS

RECIPE = "{recipe}"  # in a label: the recipe that --recipe names
ENCODED = "{encoder}"  # in a label: that recipe, "+ encoder" where its head does not look through the encoder itself
FIGURES = {
    "oa": "OA", "aa": "AA", "kappa": "kappa", "acc": "ACC", "auc": "AUC", "se": "SE", "sp": "SP", "ece": "ECE",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of a table, one map or one point of a sweep: a method and what it changes.

    Attributes:
        label: its name; ``{recipe}`` stands for the recipe of ``--recipe``, ``{encoder}`` for it and its encoder.
        method, features: as :meth:`fastdiffclip.evaluate.contest.Contest.run` takes them.
        recipe: of this row, None for that of ``--recipe``. settings: laid over it, as ``--set`` takes them.
        encoder: its head looks through the encoder, whether or not the recipe's does: what pretraining is about.
        bands: it is about the network over bands (view `restored`), and left out where the recipe's head has none.
        network: False: its head reads no network, the views that need one are left out.
        pretrained: whether its network starts from unsupervised mask diffusion, else from random weights.
        prompts: what its classes are called, None for ``--prompts``.
        panel, value: the axis that a sweep moves along, and where on it this row stands.
        optional: left out, with a note, where the scene's classes lack what its prompts need.
        stage: of a feature picture: what is looked at, see :mod:`fastdiffclip.study.features`.
    """

    label: str
    method: str = OURS
    features: str = "window"
    recipe: str | None = None
    settings: tuple[str, ...] = ()
    encoder: bool = False
    bands: bool = False
    network: bool = True
    pretrained: bool = True
    prompts: str | None = None
    panel: str = ""
    value: float | None = None
    optional: bool = False
    stage: str = ""


@dataclass(frozen=True)
class Study:
    """A table or figure.

    Attributes:
        kind: ``scores`` of draws, ``maps`` of a whole scene, or ``features`` in two dimensions.
        shots: labelled windows per class when ``--shots`` does not say; None for all.
        seeds: number of draws when ``--seeds`` does not say.
        figures: keys of ``FIGURES``, the columns; ``judged_by`` is the one that differences are taken of.
        reference: label of the row that differences are taken to when ``--reference`` does not say; "" for the first.
        exams: it is about scenes that are one window each, as MRNet's exams are.
        axes: of a sweep: panel to the words under its axis.
        notes: what a reader has to know of it.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    shots: tuple[int | None, ...]
    kind: Literal["scores", "maps", "features"] = "scores"
    seeds: int = 10
    figures: tuple[str, ...] = ("oa", "aa", "kappa", "ece")
    judged_by: str = "aa"
    reference: str = ""
    exams: bool = False
    axes: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def _sweep(panel: str, setting: str, values: Sequence[float]) -> tuple[Row, ...]:
    """One row per value of a setting."""
    return tuple(
        Row(f"{panel} {value:g}", settings=(f"{setting}={value:g}",), encoder=True, panel=panel, value=value)
        for value in values
    )


OURS_ROW = Row(RECIPE)
ENCODER = Row(ENCODED, encoder=True)
RANDOM = Row(f"{ENCODED}, random weights", encoder=True, pretrained=False)
CONTROLS = (  # what the network over bands is worth
    Row(f"{RECIPE}, random weights", bands=True, pretrained=False),
    Row(f"{RECIPE} without a network", bands=True, network=False),
)
PAPER = Row("paper", recipe="paper")
CLIP = Row("clip", recipe="paper", pretrained=False, prompts="p1")
LINEAR = Row("linear", "linear")
CLASSICAL_ROWS = tuple(
    Row(f"{method}, {features}", method, features) for method in CLASSICAL for features in ("pixel", "window")
)
SAME_EPOCHS = "All numbers of windows are trained for the same number of epochs, so more windows are also more steps."
ABLATIONS = (
    "Without text: the text of a class is its number, and no prior on classes follows from it: the head keeps its size "
    "and loses the words.",
    "Without diffusion: visible tokens stay clean, only masking is left. Without mask: all tokens are visible and "
    "noised. Without UMD: the encoder starts from random weights.",
)

STUDIES = {
    study.name: study
    for study in (
        Study(
            "table1",
            "Few shots: both recipes, without pretraining, and what people use instead",
            (OURS_ROW, *CONTROLS, ENCODER, RANDOM, PAPER, CLIP, LINEAR, *CLASSICAL_ROWS),
            shots=(2, 8, 20),
            notes=("clip: the paper's baseline, image and text tower from scratch, plain class names (p1).",),
        ),
        Study(
            "table2",
            "Number of windows for pretraining",
            (replace(RANDOM, label="none (random weights)", panel="windows", value=0),)
            + _sweep("windows", "umd.samples", (100, 350, 700, 1400, 2800)),
            shots=(2,),
            axes=(("windows", "windows for pretraining"),),
            notes=(SAME_EPOCHS,),
        ),
        Study(
            "table3",
            "What each part is worth",
            (
                ENCODER,
                Row("without text", encoder=True, prompts="none", settings=("logistic.text=0",)),
                Row("without diffusion", encoder=True, settings=("umd.noise=false",)),
                Row("without mask", encoder=True, settings=("umd.mask_ratio=0",)),
                Row("without UMD", encoder=True, pretrained=False),
                OURS_ROW,
                *CONTROLS,
            ),
            shots=(2,),
            notes=ABLATIONS,
        ),
        Study(
            "table4",
            "Prompts",
            (
                *(Row(style, prompts=style, optional=True) for style in ("p1", "p2", "p3", "p4", "p5")),
                Row("no words", prompts="none", settings=("logistic.text=0",)),
            ),
            shots=(2,),
            notes=("No words: the text of a class is its number.",),
        ),
        Study(
            "table5",
            "Forty shots against all training labels",
            (OURS_ROW, PAPER, LINEAR, *CLASSICAL_ROWS),
            shots=(40, None),
            seeds=3,
            notes=("All: every labelled pixel of the training side of the split, as supervised methods are given.",),
        ),
        Study(
            "table6",
            "Knee exams",
            (OURS_ROW, *CONTROLS, ENCODER, RANDOM, PAPER, CLIP, LINEAR, *CLASSICAL_ROWS),
            shots=(5, 10),
            figures=("acc", "auc", "se", "sp", "ece"),
            judged_by="auc",
            exams=True,
            notes=("Ten exams train the paper's model; they are five shots of each of the two classes.",),
        ),
        Study(
            "fig3",
            "Class maps of one draw",
            (OURS_ROW, PAPER, CLIP, LINEAR, Row("svm, window", "svm"), Row("extratrees, window", "extratrees")),
            shots=(5,),
            kind="maps",
            seeds=1,
            notes=("OA and AA are of the test pixels of the draw; the maps show every pixel of the first scene.",),
        ),
        Study(
            "fig4",
            "Mask ratio and side of the window",
            _sweep("mask ratio", "umd.mask_ratio", (0.1, 0.3, 0.5, 0.7, 0.9))
            + _sweep("window", "model.window", (3, 5, 7, 9, 11)),
            shots=(2,),
            seeds=5,
            reference="mask ratio 0.7",
            axes=(("mask ratio", "mask ratio"), ("window", "side of the window, pixels")),
            notes=("All rows share their splits, which are disjoint for the largest window.",),
        ),
        Study(
            "fig5",
            "Features of test pixels before and after",
            (
                Row("pixels, standardised", stage="pixel", settings=("prepare=standard",), pretrained=False),
                Row("front end of {recipe}", stage="pixel", pretrained=False),
                Row("encoder, random weights", stage="encoder", encoder=True, pretrained=False),
                Row("encoder, pretrained", stage="encoder", encoder=True),
                Row("classifier", stage="classifier"),
            ),
            shots=(5,),
            kind="features",
            seeds=1,
            notes=("Nearest shot: share of the test pixels whose nearest shot, in all dimensions, is of their class.",),
        ),
    )
}


def find_study(name: str) -> Study:
    """A study by name. Raises :class:`UsageError` that names the nearest one."""
    if name not in STUDIES:
        known = tuple(STUDIES)
        raise UsageError(f"there is no study {name!r}{nearest(name, known)}; there is: {', '.join(known)}")
    return STUDIES[name]
