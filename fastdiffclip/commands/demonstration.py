"""The whole job on the built-in scene: scene, pretraining, few-shot training, evaluation, map, report."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiffclip import __version__
from fastdiffclip.commands import views, workflow
from fastdiffclip.commands.terminal import progress_bars, say
from fastdiffclip.config import Config
from fastdiffclip.errors import UsageError
from fastdiffclip.evaluate.contest import as_classifier
from fastdiffclip.evaluate.report import CurvePanel, ReportInput, Restoration, write_report
from fastdiffclip.evaluate.report_figures import composite_bands, figure_composite
from fastdiffclip.evaluate.runner import Evaluation, Plan, evaluate
from fastdiffclip.files import open_folder
from fastdiffclip.infer.restore import restore_windows
from fastdiffclip.infer.stream import Prediction, predict
from fastdiffclip.model.mask_diffusion import MaskDiffusion
from fastdiffclip.runtime import memory_budget, versions
from fastdiffclip.scene.demo import write_demo
from fastdiffclip.scene.store import Scene, open_scene
from fastdiffclip.train.data import umd_data
from fastdiffclip.train.umd import UmdResult

SEEDS = 5
NOTE = "The demo pretrains for a short while (configs/demo.yaml); the recipes best and paper train longer."


def free_folder() -> Path:
    """``runs/demo``, or the first of ``runs/demo-2``, ``-3``, ... that holds nothing yet."""
    for number in itertools.count(1):
        folder = workflow.RUNS / ("demo" if number == 1 else f"demo-{number}")
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return folder
    raise AssertionError("count() has no end")


def run(out: Path, config: Config, shots: int | None, seed: int, device: str) -> dict[str, Any]:
    """Run the demo into ``out``; returns the figures and paths.

    Raises:
        UsageError: ``out`` is not empty, or the settings pretrain over bands, which the demo has no picture of.
    """
    if config.tokens == "bands":
        raise UsageError("the demo shows how pixels are restored; take the view `restored` out of logistic.views")
    began = time.monotonic()
    open_folder(out, resume=None)
    times: dict[str, float] = {}
    with progress_bars() as progress:
        say("1/5  ingest     the built-in scene: a suburb, 144 bands and LiDAR")
        scene = open_scene(_timed(times, "ingest", lambda: write_demo(out / "suburb.zarr", seed)))
        say("2/5  train-umd  masked, noised windows are restored; no label is read")
        umd = _timed(
            times,
            "train-umd",
            lambda: workflow.pretrain(
                [scene], config, seed=seed, out=out / "umd", device=device, resume=False, progress=progress
            ),
        )
        say(f"3/5  train-flc  {shots or 'all'} labelled windows per class and one sentence about each class")
        trained = _timed(
            times,
            "train-flc",
            lambda: workflow.train_classifier(
                [scene],
                config,
                umd=umd,
                shots=shots,
                split_kind="disjoint",
                on_short="use-all",
                prompts=None,
                seed=seed,
                out=out / "flc",
                device=device,
                resume=False,
                progress=progress,
            ),
        )
        say(f"4/5  evaluate   {SEEDS} other draws of the labels, baselines on the same pixels")
        plan = Plan((shots,), SEEDS, "disjoint", on_short="use-all", first_seed=seed + 1)
        result = _timed(
            times,
            "evaluate",
            lambda: evaluate([scene], plan, config, umd=umd, out=out / "evaluation", device=device, progress=progress),
        )
        say("5/5  predict    every pixel of the scene")
        classifier = as_classifier(trained.result, device)
        prediction = _timed(
            times,
            "predict",
            lambda: predict(scene, classifier, out / "map.tif", png=out / "map.png", progress=progress),
        )
    say()
    summary = views.show_evaluation(result, out / "evaluation")
    times["all"] = time.monotonic() - began
    report = _report(out, scene, config, umd, trained, result, prediction, times)
    say(NOTE)
    say()
    say(f"Map      {out / 'map.tif'}  {out / 'map.png'}")
    say(f"Report   {report}")
    say(f"Model    {out / 'flc'}")
    say(f"{times['all']:.0f} s in all")
    return {
        "out": str(out),
        "report": str(report),
        "map": str(out / "map.tif"),
        "seconds": times,
        **summary,
        "held_out": trained.summary(),
    }


def _timed(times: dict[str, float], name: str, work: Any) -> Any:
    began = time.monotonic()
    result = work()
    times[name] = time.monotonic() - began
    return result


def _report(
    out: Path, scene: Scene, config: Config, umd: UmdResult, trained: workflow.Trained, result: Evaluation,
    prediction: Prediction, times: dict[str, float],
) -> Path:  # fmt: skip
    first = next(iter(scene.modalities))
    bands, caption = composite_bands(scene.modalities[first].wavelengths, scene.modalities[first].bands)
    epochs = umd.config.umd.epochs
    report = ReportInput(
        title=f"{scene.name}: few-shot classification",
        subtitle=f"{scene.height} x {scene.width} pixels, {', '.join(scene.modalities)}; fastdiffclip {__version__}",
        facts={
            "classes": len(trained.labelled.classes),
            "labelled windows": len(trained.split.train),
            "split": trained.split.kind,
        },
        classes=trained.labelled.classes,
        composite=figure_composite(scene.read(first)[:, :, list(bands)].astype(np.float32), scene.read_valid(first)),
        composite_caption=caption,
        reference=trained.labelled.labels[0],
        predicted=prediction.class_map,
        areas=prediction.areas,
        rows=result.rows(),
        scores=trained.scores,
        scores_caption=f"One draw, {trained.judged_by}",
        curves=[
            CurvePanel("Pretraining (train-umd)", {"restoration loss": _curve(umd.losses, epochs)}, logarithmic=True),
            CurvePanel(
                "Classifier (train-flc)",
                {f"{config.flc.head} loss": _head_curve(trained.result.losses, config)},
            ),
        ],
        restoration=_restoration(scene, umd, config),
        timings=times,
        settings=config.model_dump(),
        provenance={"scene sha256": scene.sha256, **versions()},
        commands=["fastdiffclip demo"],
        files=[
            (out / "map.tif", "class map"),
            (out / "map.png", "picture"),
            (out / "flc", "classifier"),
            (out / "umd", "pretrained model"),
        ],
        notes=[views.TRANSDUCTIVE, NOTE],
    )
    return write_report(out / "report.html", report)


def _head_curve(losses: list[float], config: Config) -> tuple[list[float], list[float]]:
    """Loss of the classifier: by epoch, or by iteration of the fit of the logistic head."""
    return _curve(losses, config.flc.epochs if config.flc.head == "contrastive" else len(losses))


def _curve(losses: list[float], epochs: int) -> tuple[list[float], list[float]]:
    """Mean loss of each epoch; a short last batch makes single steps jump."""
    means = np.array(losses).reshape(epochs, -1).mean(axis=1)
    return [float(number) for number in range(1, epochs + 1)], means.tolist()


def _restoration(scene: Scene, umd: UmdResult, config: Config, count: int = 3) -> Restoration:
    """A few windows of the first modality as the reverse process restores them, in three channels of the front end."""
    assert isinstance(umd.model, MaskDiffusion)
    device = next(umd.model.parameters()).device
    data = umd_data([scene], umd.front_end, count, config.model.window, 1, memory_budget(config.memory_gib), device)
    found = restore_windows(umd.model.eval(), data.flat, data.centres, config)
    side = config.model.window

    def picture(windows: torch.Tensor, row: int) -> np.ndarray:
        channels = min(3, windows.shape[2])
        values = windows[row, :, :channels].cpu().numpy().reshape(side, side, channels)
        return values if channels == 3 else values[:, :, 0]

    rows = [
        (
            f"window {row + 1}",
            [picture(part, row) for part in (found.noised[0], found.restored[0], found.clean[0])],
        )
        for row in range(len(data.centres))
    ]
    return Restoration(rows)
