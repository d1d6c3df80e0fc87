"""The options of ``train-umd`` and ``train-flc``; the work is in ``training``, which is imported when it starts."""

from __future__ import annotations

from typing import Annotated

import typer

from fastdiffclip.commands import options
from fastdiffclip.commands.options import (
    AddClass,
    ConfigFile,
    Device,
    DryRun,
    Json,
    OnShort,
    Out,
    Prompts,
    Recipe,
    Resume,
    SceneArgs,
    Seed,
    Set,
    Shares,
    SplitOption,
    Threads,
    UmdOption,
)

Engine = Annotated[
    str | None,
    typer.Option(
        metavar="single|ddp|deepspeed", help="How processes work together; default ddp under torchrun.",
        show_default=False,
    ),
]  # fmt: skip
Zero = Annotated[
    int | None, typer.Option(metavar="0|1|2|3", help="ZeRO stage of --engine deepspeed.", show_default=False)
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="The same bytes every time, on a GPU too, at some cost in speed.")
]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events beside log.csv.")]


def train_umd(
    scenes: SceneArgs = None,
    recipe: Recipe = "best",
    config: ConfigFile = None,
    set_: Set = None,
    seed: Seed = 0,
    out: Out = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    device: Device = "auto",
    threads: Threads = 0,
    engine: Engine = None,
    zero: Zero = None,
    deterministic: Deterministic = False,
    tensorboard: TensorBoard = False,
    json_: Json = False,
) -> None:
    """Pretrain without labels: unsupervised mask diffusion."""
    options.require_out(out, resume)
    from fastdiffclip.commands.terminal import say_json
    from fastdiffclip.config import load_config

    # What is wrong here is said before the heavy imports.
    settings = load_config(recipe, config, [*(set_ or []), *_engine(engine, zero)])
    from fastdiffclip.commands import training

    job = training.Job(settings, seed, out, resume, dry_run, device, threads, deterministic, tensorboard)
    summary = training.umd(job, scenes or [])
    if json_:
        say_json(summary)


def train_flc(
    scenes: SceneArgs = None,
    shots: Annotated[str, typer.Option(metavar="K|all", help="Labelled windows per class.")] = "2",
    split: SplitOption = "disjoint",
    umd: UmdOption = None,
    prompts: Prompts = None,
    on_short: OnShort = "error",
    add_class: AddClass = None,
    share: Shares = None,
    recipe: Recipe = "best",
    config: ConfigFile = None,
    set_: Set = None,
    seed: Seed = 0,
    out: Out = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    device: Device = "auto",
    threads: Threads = 0,
    engine: Engine = None,
    zero: Zero = None,
    deterministic: Deterministic = False,
    tensorboard: TensorBoard = False,
    json_: Json = False,
) -> None:
    """Train the classifier on a few labels per class, and judge it on held-out pixels."""
    count, added = options.shots_of(shots), options.classes_to_add(add_class, share)
    options.require_out(out, resume)
    from fastdiffclip.commands.terminal import say_json
    from fastdiffclip.config import load_config

    # What is wrong here is said before the heavy imports.
    settings = load_config(recipe, config, [*(set_ or []), *_engine(engine, zero)])
    from fastdiffclip.commands import training

    job = training.Job(settings, seed, out, resume, dry_run, device, threads, deterministic, tensorboard)
    summary = training.flc(job, scenes or [], training.Labels(count, split, on_short, prompts, added), umd)
    if json_:
        say_json(summary)


def _engine(engine: str | None, zero: int | None) -> list[str]:
    """The two options as settings."""
    given = {"engine": engine, "zero": zero}
    return [f"{key}={value}" for key, value in given.items() if value is not None]
