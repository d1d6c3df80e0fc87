"""A study made concrete for scenes and options: settings of every row, pieces of work, what each depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastdiffclip.config import Config, FlcConfig, LogisticConfig, ModelConfig, build_config, load_config
from fastdiffclip.errors import InputDataError, UsageError, nearest
from fastdiffclip.evaluate.contest import OURS
from fastdiffclip.scene.labelled import Labelled, labelled_pixels
from fastdiffclip.scene.splits import Split
from fastdiffclip.scene.store import Scene
from fastdiffclip.study.catalogue import ENCODED, RECIPE, Row, Study
from fastdiffclip.train.flc import class_prompts
from fastdiffclip.train.loop import fingerprint, settings_of

FEATURE_PIXELS = 100  # of a class in a picture of features
FORMAT = 3  # of the journal's entries and keys: raise it when results of the same settings change


@dataclass(frozen=True)
class Options:
    """What a user may say of a study; None leaves it to the study.

    Attributes:
        shots, seeds, first_seed, split, on_short, classes, test_limit: as :class:`fastdiffclip.evaluate.runner.Plan`.
        recipe, file, overrides: as :func:`fastdiffclip.config.load_config` takes them.
        umd_seeds: number of pretrainings that the draws take turns with.
        reference: label of the row that differences are taken to.
        only: labels of the rows to compute, none for all; splits are those of the whole study.
    """

    shots: tuple[int | None, ...] | None = None
    seeds: int | None = None
    first_seed: int = 0
    split: str | None = None
    prompts: str | None = None
    on_short: str = "error"
    classes: tuple[int, ...] | None = None
    test_limit: int | None = None
    recipe: str = "best"
    file: Path | None = None
    overrides: tuple[str, ...] = ()
    umd_seeds: int = 1
    reference: str | None = None
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """A row with its settings in full; ``prompts`` is the choice, ``texts`` one text per class."""

    row: Row
    config: Config
    prompts: str | None
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Pretraining:
    """A run of unsupervised mask diffusion that rows and draws share; ``key`` names its folder."""

    key: str
    config: Config
    seed: int


@dataclass(frozen=True)
class Piece:
    """One line on one draw. ``key`` is a fingerprint of all that its result depends on."""

    key: str
    line: int
    shots: int | None
    seed: int
    umd: str | None


@dataclass(frozen=True)
class Job:
    """All that a process needs to do any piece of a study.

    Attributes:
        window: side of the largest window of any line, for which the splits are disjoint.
        budget: bytes that prepared scenes may take in one process.
    """

    study: Study
    paths: tuple[Path, ...]
    lines: tuple[Line, ...]
    split: str
    on_short: str
    classes: tuple[int, ...] | None
    test_limit: int | None
    window: int
    out: Path
    device: str
    budget: int
    pretrainings: tuple[Pretraining, ...] = ()
    pieces: tuple[Piece, ...] = ()

    def draw(self, labelled: Labelled, shots: int | None, seed: int) -> Split:
        """The training and test pixels of a draw, the same for every line."""
        return labelled.split(self.split, shots, seed, self.window, self.on_short, self.test_limit)

    def umd_folder(self, key: str) -> Path:
        """Where a pretraining lies."""
        return self.out / "umd" / key


def make_job(
    study: Study, scenes: Sequence[Scene], options: Options, out: Path, device: str, budget: int
) -> tuple[Job, list[str]]:
    """Everything that a study consists of, checked: settings, prompts, splits. Also notes on what was left out.

    Raises:
        UsageError, InputDataError: an option, the scenes or their labels do not fit the study.
    """
    _check_kind(study, scenes)
    labelled = labelled_pixels(scenes, options.classes)
    lines, notes = _lines(study, scenes, labelled, options)
    split = options.split or _default_split(study, labelled)
    # Lines that see windows of different sizes are compared on the same pixels.
    window = max(line.config.model.window for line in lines)
    lines = _chosen(lines, options)
    limit = options.test_limit or (FEATURE_PIXELS if study.kind == "features" else None)
    job = Job(
        study, tuple(scene.path for scene in scenes), tuple(lines), split, options.on_short, options.classes,
        limit, window, out, device, budget,
    )  # fmt: skip
    shas = [scene.sha256 for scene in scenes]
    shots = study.shots if options.shots is None else options.shots
    first, count = options.first_seed, study.seeds if options.seeds is None else options.seeds
    umd: dict[str, Pretraining] = {}
    pieces = []
    for k in shots:
        for seed in range(first, first + count):
            if not len(job.draw(labelled, k, seed).test):  # what is wrong with the labels is said now
                raise InputDataError(
                    f"the split '{split}' with {'all' if k is None else k} shots leaves no test pixel; ask for fewer "
                    "--shots, or for --split disjoint"
                )
            for number, line in enumerate(lines):
                wanted = None
                if line.row.pretrained and line.row.method == OURS and line.config.reads_network:
                    found = _pretraining(line.config, first + (seed - first) % options.umd_seeds, shas, budget)
                    wanted = umd.setdefault(found.key, found).key
                pieces.append(_piece(job, number, k, seed, wanted, shas))
    turns = len({found.seed for found in umd.values()})
    if turns > 1:
        notes.append(f"The draws take turns with {turns} pretrainings.")
    return replace(job, pretrainings=tuple(umd.values()), pieces=tuple(pieces)), notes


def _check_kind(study: Study, scenes: Sequence[Scene]) -> None:
    exams = [scene.centre_only for scene in scenes]
    if study.exams and not all(exams):
        raise UsageError(
            f"{study.name} is about exams, scenes that are one window each, and {scenes[exams.index(False)].path} is a "
            "landscape; ingest exams with 'fastdiffclip ingest --preset mrnet DIR', or name no scene for generated ones"
        )
    if not study.exams and any(exams) and (study.kind == "maps" or any(panel == "window" for panel, _ in study.axes)):
        raise UsageError(
            f"{study.name} needs a landscape, and {scenes[exams.index(True)].path} is an exam, which is one window; "
            "name other scenes"
        )


def _default_split(study: Study, labelled: Labelled) -> str:
    return "official" if study.exams and labelled.train is not None else "disjoint"


def _lines(study: Study, scenes: Sequence[Scene], labelled: Labelled, options: Options) -> tuple[list[Line], list[str]]:
    lines: dict[str, Line] = {}
    notes = []
    plain = load_config(options.recipe, options.file, options.overrides)
    encoded = plain.recipe if plain.reads_encoder else f"{plain.recipe} + encoder"
    if encoded != plain.recipe and any(row.encoder for row in study.rows):
        notes.append(
            f"The recipe {plain.recipe} does not look through the encoder: rows that are about pretraining add the "
            "encoder's tokens to what its head sees, in place of `restored` where that is read."
        )
    side = (f"model.window={scenes[0].height}",) if all(scene.centre_only for scene in scenes) else ()
    for row in study.rows:
        if row.bands and plain.tokens != "bands":
            continue
        config = _settings(row, options, side)
        named = replace(row, label=row.label.replace(RECIPE, plain.recipe).replace(ENCODED, encoded))
        prompts = row.prompts or options.prompts
        try:
            texts = class_prompts(scenes, labelled, prompts)
        except InputDataError as error:
            if not row.optional:
                raise
            notes.append(f"{named.label} is left out: {error}.")
            continue
        lines.setdefault(named.label, Line(named, config, prompts, texts))
    return list(lines.values()), notes


def _settings(row: Row, options: Options, side: tuple[str, ...]) -> Config:
    own = () if row.recipe is None else (f"recipe={row.recipe}",)
    overrides = (*options.overrides, *own, *side, *row.settings)
    config = load_config(options.recipe, options.file, overrides)
    views = [view for view in config.logistic.views if view != "restored"]
    if row.encoder and not config.reads_encoder:
        views.append("tokens")
    elif row.network:
        return config
    return load_config(options.recipe, options.file, (*overrides, f"logistic.views=[{', '.join(views or ['means'])}]"))


def _chosen(lines: Sequence[Line], options: Options) -> list[Line]:
    """The lines of ``only``; the reference of the differences must be among them."""
    chosen = _known(options.only, [line.row.label for line in lines], "to compute")
    found = [line for line in lines if not chosen or line.row.label in chosen]
    _known([options.reference or found[0].row.label], [line.row.label for line in found], "to take differences to")
    return found


def _known(wanted: Sequence[str], labels: list[str], purpose: str) -> Sequence[str]:
    for label in wanted:
        if label not in labels:
            raise UsageError(
                f"there is no row {label!r} {purpose}{nearest(label, labels)}; there is: {'; '.join(labels)}"
            )
    return wanted


def _pretraining(config: Config, seed: int, shas: Sequence[str], budget: int) -> Pretraining:
    """The pretraining that a line needs: only what it depends on, so that lines with the same share it."""
    sizes, plain = config.model, ModelConfig()
    text = {name: getattr(plain, name) for name in ("embedding", "text_width", "text_depth", "text_heads")}
    tree: dict[str, Any] = config.model_dump(mode="python")
    tree |= {"recipe": "custom", "flc": FlcConfig().model_dump(), "logistic": LogisticConfig().model_dump()}
    if config.tokens == "bands":  # which the head's view asks for
        tree["flc"] |= {"head": "logistic", "encoder": "frozen"}
        tree["logistic"] |= {"views": ("restored",), "sizes": config.mean_sizes}
    tree |= {"model": sizes.model_dump() | text}
    tree["memory_gib"] = budget / 2**30
    if config.prepare == "standard":
        tree["components"] = Config().components
    found = build_config(tree)
    return Pretraining(fingerprint("umd", settings_of(found), seed, list(shas)), found, seed)


def _piece(job: Job, number: int, shots: int | None, seed: int, umd: str | None, shas: Sequence[str]) -> Piece:
    line = job.lines[number]
    # Not the recipe, which is a name, nor pretraining, which has a key of its own.
    unread = {"recipe", "umd", "bands", "logistic" if line.config.flc.head == "contrastive" else ""}
    settings = {name: part for name, part in settings_of(line.config).items() if name not in unread}
    if line.row.method != OURS:
        settings = {"window": line.config.model.window, "components": line.config.components}
    drawn = [job.split, shots, seed, job.window, job.on_short, job.classes, job.test_limit]
    what = [job.study.kind, line.row.method, line.row.features, line.row.stage]
    words = line.texts if line.row.method == OURS else None
    key = fingerprint(what, settings, words, umd, drawn, list(shas))
    return Piece(key, number, shots, seed, umd)
