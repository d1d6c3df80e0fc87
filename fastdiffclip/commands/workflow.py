"""What the commands do across stages: find scenes and models, pretrain when needed, train, judge, run the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fastdiffclip import checkpoint
from fastdiffclip.commands.new_classes import shots_of, unlabelled_classes
from fastdiffclip.config import Config
from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.evaluate.contest import held_out, predict_centres
from fastdiffclip.evaluate.metrics import Scores, score
from fastdiffclip.evaluate.runner import Evaluation, Plan, evaluate, scene_title
from fastdiffclip.runtime import Progress
from fastdiffclip.scene.labelled import Labelled, labelled_pixels
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.splits import Split
from fastdiffclip.scene.store import Scene, open_scene
from fastdiffclip.train.flc import FlcResult, Shots, check_fits, train_flc, window_source
from fastdiffclip.train.new_class import require_text_space
from fastdiffclip.train.umd import UmdResult, load_umd, train_umd
from fastdiffclip.train.world import World

RUNS = Path("runs")
FOLDS = 10
LEAVE_ONE_OUT = 20


def open_scenes(paths: Sequence[Path], root: Path = RUNS) -> list[Scene]:
    """Open scenes; a folder of scenes stands for all of them, no path at all for the built-in scene under ``root``.

    Raises:
        InputDataError: a path is no scene.
    """
    if not paths:
        return [open_scene(builtin_scene(root))]
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.zarr")) if path.is_dir() and not (path / "zarr.json").exists() else []
        found += inside or [path]
    return [open_scene(path) for path in found]


def builtin_scene(root: Path = RUNS) -> Path:
    """The built-in scene under ``root``/suburb, made when it is not there yet."""
    path = root / "suburb" / "suburb-0.zarr"
    if not path.exists():
        from fastdiffclip.scene.demo import write_demo

        path.parent.mkdir(parents=True, exist_ok=True)
        write_demo(path, 0)
    return path


def folder_name(scenes: Sequence[Scene]) -> str:
    """Name under ``runs/`` for one scene or a folder of scenes."""
    return scenes[0].name if len(scenes) == 1 else scenes[0].path.resolve().parent.name


def find_umd(scenes: Sequence[Scene], config: Config, choice: str | None) -> UmdResult | None:
    """The pretrained model that ``--umd`` names: a folder, or the newest run of these scenes that fits; None if none.

    Raises:
        InputDataError: the folder named is no UMD run, or does not fit ``config``.
    """
    if choice is not None:
        result = load_umd(Path(choice))
        check_fits(result, config)
        return result
    wanted = {scene.sha256 for scene in scenes}
    for path in checkpoint.find_runs(scenes[0].sha256, "umd", RUNS):
        result = load_umd(path)
        seen = {entry["sha256"] for entry in checkpoint.load_run(path, "umd").manifest["scenes"]}
        if seen == wanted and result.config.pretraining == config.pretraining:
            try:
                check_fits(result, config)
            except InputDataError:
                continue
            return result
    return None


def find_model(scene: Scene) -> Path:
    """The newest classifier trained on a scene. Raises :class:`UsageError` when there is none."""
    found = checkpoint.find_runs(scene.sha256, "flc", RUNS)
    if not found:
        raise UsageError(
            f"no trained model of {scene.path} is under {RUNS}/; give --model DIR, "
            f"or run 'fastdiffclip train-flc' first"
        )
    return found[0]


def window_of(model: Path) -> int:
    """Side of the windows of a trained model. Raises :class:`InputDataError` where it is none."""
    return checkpoint.load_run(model, "flc").config.model.window


def shots_in(model: Path, scene: Scene) -> np.ndarray:
    """Rows and columns ``(n, 2)`` of the pixels of a scene that a model was trained on."""
    manifest = checkpoint.load_run(model, "flc").manifest
    numbers = [number for number, entry in enumerate(manifest["scenes"]) if entry["sha256"] == scene.sha256]
    return np.array([shot[1:3] for shot in manifest["shots"] if shot[0] in numbers], np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class Trained:
    """A classifier with the figures of its held-out pixels."""

    result: FlcResult
    split: Split
    scores: Scores | None
    judged_by: str
    labelled: Labelled

    def summary(self) -> dict[str, Any]:
        """JSON-able figures."""
        figures = None if self.scores is None else self.scores.to_dict()
        return {"judged_by": self.judged_by, "train_pixels": len(self.split.train), "held_out": figures}


def train_classifier(
    scenes: Sequence[Scene],
    config: Config,
    *,
    umd: UmdResult | None,
    shots: int | None,
    split_kind: str,
    on_short: str,
    prompts: str | None,
    seed: int,
    out: Path | None,
    device: str,
    resume: bool,
    progress: Progress,
    tensorboard: bool = False,
    added: Mapping[str, tuple[str, float | None]] = MappingProxyType({}),
) -> Trained:
    """Draw the shots, train on them, and judge the model on pixels that it never saw.

    ``added``: description and share, by name, of classes without labelled pixels that the model is to know as well.
    """
    labelled = labelled_pixels(scenes)
    split = _split(labelled, config, shots, split_kind, seed, on_short)
    chosen = shots_of(scenes, labelled, split, prompts, added)
    extra = {
        "split": {
            "kind": split.kind,
            "shots": "all" if shots is None else shots,
            "report": list(split.report),
        }
    }
    source = window_source(scenes, config, umd)
    result = train_flc(
        scenes,
        chosen,
        config,
        umd=umd,
        source=source,
        seed=seed,
        out=out,
        device=device,
        resume=resume,
        tensorboard=tensorboard,
        extra=extra,
        progress=progress,
    )
    if len(split.test):
        scores: Scores | None = held_out(result, source, split, device)
        judged = f"{split.kind} split, {len(split.test)} test pixels"
    else:
        scores, judged = _cross_validate(scenes, source, chosen, config, umd, seed, device, progress)
    trained = Trained(result, split, scores, judged, labelled)
    if out is not None and World.from_environment().main:
        path = out / checkpoint.METRICS
        checkpoint.write_json(path, {**checkpoint.read_json(path), **trained.summary()})
    return trained


def _split(labelled: Labelled, config: Config, shots: int | None, kind: str, seed: int, on_short: str) -> Split:
    """The labelled pixels as ``--shots`` and ``--split`` part them; all are for training with ``--shots all``."""
    if shots is not None or kind == "official":
        return labelled.split(kind, shots, seed, config.model.window, on_short)
    nothing = np.empty((0, 3), np.int64), np.empty(0, np.int64)
    return Split("all", *labelled.centres(), *nothing, report=())


def _cross_validate(
    scenes: Sequence[Scene],
    source: WindowSource,
    shots: Shots,
    config: Config,
    umd: UmdResult | None,
    seed: int,
    device: str,
    progress: Progress,
) -> tuple[Scores | None, str]:
    """Judge a model that was trained on every label: leave one out, or ten folds where there are many labels."""
    _, counts = np.unique(shots.labels, return_counts=True)
    if counts.min() < 2:
        return None, "nothing: a class has a single labelled pixel, which training needs"
    one_out = len(shots.labels) <= LEAVE_ONE_OUT
    folds = _folds(shots.labels, len(shots.labels) if one_out else min(FOLDS, int(counts.min())), seed)
    predicted = np.zeros_like(shots.labels)
    for number in range(folds.max() + 1):
        inside = folds != number
        part = replace(shots, centres=shots.centres[inside], labels=shots.labels[inside])
        result = train_flc(scenes, part, config, umd=umd, source=source, seed=seed, device=device)
        predicted[~inside] = predict_centres(result, source, shots.centres[~inside], device)
        progress("held-out", number + 1, int(folds.max()) + 1, "")
    new = [item.info for item in shots.added]
    name = "leaving one out" if one_out else f"{folds.max() + 1} folds of pixels (windows of neighbours overlap)"
    return score(shots.labels, predicted, [item.value for item in (*shots.classes, *new)]), name


def _folds(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Fold of each pixel, every class spread evenly."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(labels))
    folds = np.empty(len(labels), dtype=np.int64)
    folds[order[np.argsort(labels[order], kind="stable")]] = np.arange(len(labels)) % count
    return folds


def pretrain(
    scenes: Sequence[Scene],
    config: Config,
    *,
    seed: int,
    out: Path | None,
    device: str,
    resume: bool,
    progress: Progress,
    tensorboard: bool = False,
) -> UmdResult:
    """Run ``train-umd`` into ``out``, or into its default folder."""
    out = out or checkpoint.new_run_path(folder_name(scenes), "umd", RUNS)
    return train_umd(
        scenes,
        config,
        seed=seed,
        out=out,
        device=device,
        resume=resume,
        tensorboard=tensorboard,
        progress=progress,
    )


def plan_umd(scenes: Sequence[Scene], config: Config) -> dict[str, Any]:
    """What ``train-umd --dry-run`` prints."""
    pixels = sum(scene.height * scene.width for scene in scenes)
    samples = min(config.pretraining.samples, pixels)
    batch = min(config.pretraining.batch, samples)
    steps = config.bands.steps if config.tokens == "bands" else config.umd.epochs * -(-samples // batch)
    return {
        "scenes": scene_title(scenes), "tokens": config.tokens, "pixels": pixels, "windows": samples, "batch": batch,
        "steps": steps, "window": config.model.window, "prepare": config.prepare, "recipe": config.recipe,
    }  # fmt: skip


def plan_flc(
    scenes: Sequence[Scene],
    config: Config,
    shots: int | None,
    split: str,
    on_short: str,
    prompts: str | None,
    seed: int,
    added: Mapping[str, tuple[str, float | None]],
) -> dict[str, Any]:
    """What ``train-flc --dry-run`` prints; raises what the run itself would raise of labels, shots and prompts."""
    if added:
        require_text_space(config, "--add-class was given with")
    labelled = labelled_pixels(scenes)
    chosen = shots_of(scenes, labelled, _split(labelled, config, shots, split, seed, on_short), prompts, added)
    new = [item.info for item in chosen.added]
    absent = unlabelled_classes(scenes, [*labelled.classes, *new])
    train = len(chosen.labels)
    batch = min(config.flc.batch, train)
    return {
        "scenes": scene_title(scenes), "classes": len(chosen.classes), "shots": "all" if shots is None else shots,
        "split": split, "windows": train, "head": config.flc.head,
        "steps": config.flc.epochs * -(-train // batch) if config.flc.head == "contrastive" else None,
        "window": config.model.window, "prepare": config.prepare,
        "encoder": config.flc.encoder if config.reads_encoder else None, "bands": config.tokens == "bands",
        "recipe": config.recipe, "added": [{"value": item.value, "name": item.name} for item in new],
        "unlabelled": [{"value": item.value, "name": item.name} for item in absent],
    }  # fmt: skip


def evaluate_scenes(
    scenes: Sequence[Scene],
    plan: Plan,
    config: Config,
    *,
    umd: str | None,
    out: Path | None,
    resume: bool,
    device: str,
    progress: Progress,
) -> Evaluation:
    """Run ``evaluate``, with the pretrained model that ``--umd`` names, the newest that fits, or a new one."""
    pretrained = None if umd == "none" else find_umd(scenes, config, umd)
    return evaluate(
        scenes,
        plan,
        config,
        umd=pretrained,
        pretrain=umd != "none",
        out=out,
        resume=resume,
        device=device,
        progress=progress,
    )


def judge_map(map_path: Path, labels_spec: str) -> tuple[Scores, dict[int, str]]:
    """Scores of a finished map against a label raster on the same grid, and the class names that the map knows.

    Raises:
        InputDataError: the grids differ, or the labels are empty.
    """
    from fastdiffclip.infer.raster import read_class_map
    from fastdiffclip.scene.georeference import Grid, require_same_grid
    from fastdiffclip.scene.labels import read_label_map
    from fastdiffclip.scene.readers import expand, open_raster

    found = read_class_map(map_path)
    files, variable = expand(labels_spec)
    if len(files) != 1:
        raise UsageError(f"{labels_spec} stands for {len(files)} files; a map is judged by one")
    with open_raster(files[0], variable) as source:
        labels = read_label_map(source)
        grid = Grid("labels", files[0], source.height, source.width, source.crs_wkt, source.affine_transform)
    height, width = found.values.shape
    require_same_grid([Grid("map", map_path, height, width, found.crs_wkt, found.affine_transform), grid])
    known = labels > 0
    if not known.any():
        raise InputDataError(f"{labels_spec} has no labelled pixel to judge the map by")
    classes = sorted({*np.unique(labels[known]).tolist(), *np.unique(found.values[found.values > 0]).tolist()})
    return score(labels[known].astype(np.int64), found.values[known].astype(np.int64), classes), found.names
