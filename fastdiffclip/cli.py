"""The command line. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from fastdiffclip import __version__
from fastdiffclip.errors import FastDiffCLIPError, InputDataError, UsageError

app = typer.Typer(
    name="fastdiffclip",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Few-shot, language-driven classification of multimodal remote-sensing scenes: from a cube, a LiDAR raster, "
    "a few labels and class names to a georeferenced class map.",
    epilog="Start with: fastdiffclip demo",
)
scene_app = typer.Typer(no_args_is_help=True, help="Look at a stored scene.")
app.add_typer(scene_app, name="scene")

F = TypeVar("F", bound=Callable[..., None])
SceneArgs = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[SCENE]...",
        help="Scenes, or a folder of scenes; none: the built-in scene.",
        show_default=False,
    ),
]
Recipe = Annotated[str, typer.Option(help="best: what measures best; paper: as published; demo: small.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file of settings.", show_default=False)
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="One setting, for example umd.epochs=20; repeatable.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.")]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Output folder; default runs/<scene>/<stage>-<time>.", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, then stop.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes all.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on the last line of stdout.")]
SplitOption = Annotated[str, typer.Option("--split", help="disjoint, random or official.")]
Prompts = Annotated[
    str | None,
    typer.Option(metavar="p1..p5|NAME|FILE", help="Prompt style, shipped set or YAML file.", show_default=False),
]
OnShort = Annotated[str, typer.Option(help="A class with fewer labels than shots: error or use-all.")]
UmdOption = Annotated[
    str | None,
    typer.Option(
        "--umd",
        metavar="DIR|none",
        help="Pretrained run, or none; default: the newest that fits, else pretrain.",
        show_default=False,
    ),
]
DEBUG = "--debug"


def reported(command: F) -> F:
    """Turn our errors into one sentence and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except FastDiffCLIPError as error:
            if DEBUG in sys.argv:
                raise
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("interrupted; nothing was left half-written", file=sys.stderr)
            raise typer.Exit(130) from None
        except MemoryError:
            print("error: out of memory; use a smaller scene, or lower --set memory_gib", file=sys.stderr)
            raise typer.Exit(4) from None

    return run  # type: ignore[return-value]


def main() -> None:
    """Entry point of the ``fastdiffclip`` command."""
    import logging
    import signal

    def end(number: int, _: Any) -> None:
        from fastdiffclip.errors import InterruptedRunError

        raise InterruptedRunError("terminated; nothing was left half-written", 128 + number)

    signal.signal(signal.SIGTERM, end)
    logging.basicConfig(level=logging.DEBUG if DEBUG in sys.argv else logging.WARNING, format="%(message)s")
    app(args=[argument for argument in sys.argv[1:] if argument != DEBUG])


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fastdiffclip {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every command: --help, --debug (log and stack traces)."""


def _pairs(values: list[str] | None, option: str, default_key: str | None = None) -> list[tuple[str, str]]:
    pairs = []
    for text in values or []:
        key, equals, value = text.partition("=")
        if not equals and default_key is None:
            raise UsageError(f"{option} takes NAME=FILE, for example {option} lidar=dsm.tif; got {text!r}")
        pairs.append((key, value) if equals else (str(default_key), text))
    return pairs


def _numbers(values: list[str] | None, option: str) -> float | dict[str, float] | None:
    try:
        if values and len(values) == 1 and "=" not in values[0]:
            return float(values[0])
        return {key: float(value) for key, value in _pairs(values, option)} or None
    except ValueError:
        raise UsageError(f"{option} takes a number or NAME=NUMBER; got {' '.join(values or [])!r}") from None


def _shots(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--shots takes a whole number of 1 or more, or all; got {text!r}")
    return int(text)


@app.command(epilog="Example: fastdiffclip demo --out suburb")
@reported
def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the scene, the models, the map and the report.")
    ] = Path("runs/demo"),
    seed: Seed = 0,
    shots: Annotated[str, typer.Option(help="Labelled windows per class.")] = "5",
    set_: Set = None,
    device: Device = "auto",
    threads: Threads = 0,
    json_: Json = False,
) -> None:
    """The whole job on the built-in scene: a map, honest figures, a report."""
    from fastdiffclip.commands import demonstration
    from fastdiffclip.commands.terminal import say_json
    from fastdiffclip.config import load_config
    from fastdiffclip.runtime import set_threads

    set_threads(threads)
    result = demonstration.run(Path(out), load_config("demo", None, set_ or []), _shots(shots), seed, device)
    if json_:
        say_json(result)


@app.command(
    epilog="Example: fastdiffclip ingest --hsi cube.mat:HSI --modality lidar=dsm.tif --labels gt.mat --out scene.zarr"
)
@reported
def ingest(
    out: Annotated[Path, typer.Option(metavar="SCENE", help="The scene to write; a folder when a glob makes several.")],
    hsi: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[:VAR]",
            help="Hyperspectral cube; a glob makes one scene per file.",
            show_default=False,
        ),
    ] = None,
    modality: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE[:VAR]", help="Another modality; repeatable.", show_default=False),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(metavar="[train=|test=]FILE[:VAR]", help="Label map; repeatable.", show_default=False),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="Class table: value,name[,description][,colour].", show_default=False),
    ] = None,
    valid: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE[:VAR]", help="Validity mask of a modality, 0 = invalid.", show_default=False),
    ] = None,
    wavelengths: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Wavelengths of the first modality.", show_default=False),
    ] = None,
    bad_bands: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Bad bands of the first modality.", show_default=False)
    ] = None,
    nodata: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]V", help="Nodata value.", show_default=False)
    ] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]S", help="Physical value of one stored unit.", show_default=False),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the scene.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing scene.")] = False,
    json_: Json = False,
) -> None:
    """Turn rasters and labels into a scene."""
    from fastdiffclip.commands.terminal import progress_bars, say, say_json
    from fastdiffclip.scene.ingest import IngestRequest
    from fastdiffclip.scene.ingest import ingest as run

    modalities = ([("hsi", hsi)] if hsi else []) + _pairs(modality, "--modality")
    if not modalities:
        raise UsageError("ingest needs a raster: give --hsi FILE[:VAR], or --modality NAME=FILE[:VAR]")
    request = IngestRequest(
        modalities, out, _label_specs(labels), classes, dict(_pairs(valid, "--valid")), wavelengths, bad_bands,
        _numbers(nodata, "--nodata"), _numbers(scale, "--scale"), name, overwrite,
    )  # fmt: skip
    with progress_bars() as progress:
        report = run(request, lambda share, note: progress("ingest", round(100 * share), 100, note))
    for line in report.lines:
        say(line)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if json_:
        say_json({"scenes": [str(path) for path in report.scenes], "warnings": report.warnings})


def _label_specs(values: list[str] | None) -> list[tuple[str, str]]:
    known = ("labels", "train", "test")
    return [
        (text.split("=", 1)[0], text.split("=", 1)[1])
        if text.split("=", 1)[0] in known and "=" in text
        else ("labels", text)
        for text in values or []
    ]


@scene_app.command("info", epilog="Example: fastdiffclip scene info scene.zarr")
@reported
def scene_info(scene: Path, json_: Json = False) -> None:
    """Size, modalities, wavelengths, grid, classes of a scene."""
    from fastdiffclip.commands import views
    from fastdiffclip.commands.terminal import say_json
    from fastdiffclip.scene.store import open_scene, scene_summary

    summary = scene_summary(open_scene(scene))
    views.show_scene(summary)
    if json_:
        say_json(summary)


@scene_app.command("verify", epilog="Example: fastdiffclip scene verify scene.zarr")
@reported
def scene_verify(scene: Path, json_: Json = False) -> None:
    """Read every chunk of a scene against its checksums."""
    from fastdiffclip.commands.terminal import say, say_json
    from fastdiffclip.scene.store import verify_scene

    report = verify_scene(scene)
    if json_:
        say_json({"chunks": report.chunks, "bytes": report.bytes, "problems": report.problems})
    if not report.ok:
        raise InputDataError(f"{scene} is damaged: {'; '.join(report.problems[:5])}")
    if not json_:
        say(f"{scene}: {report.chunks} chunks, {report.bytes / 2**20:.1f} MiB, all whole")


@app.command("train-umd", epilog="Example: fastdiffclip train-umd scene.zarr --set umd.epochs=50")
@reported
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
    json_: Json = False,
) -> None:
    """Pretrain without labels: unsupervised mask diffusion."""
    from fastdiffclip.commands import views, workflow
    from fastdiffclip.commands.terminal import progress_bars, say_json
    from fastdiffclip.config import load_config
    from fastdiffclip.runtime import set_threads

    settings = load_config(recipe, config, set_ or [])
    set_threads(threads)
    opened = workflow.open_scenes(scenes or [])
    plan = workflow.plan_umd(opened, settings)
    views.show_plan("train-umd", plan)
    if not dry_run:
        with progress_bars() as progress:
            result = workflow.pretrain(
                opened, settings, seed=seed, out=out, device=device, resume=resume, progress=progress
            )
        plan |= views.show_umd(result)
    if json_:
        say_json(plan)


@app.command("train-flc", epilog="Example: fastdiffclip train-flc scene.zarr --shots 2")
@reported
def train_flc(
    scenes: SceneArgs = None,
    shots: Annotated[str, typer.Option(metavar="K|all", help="Labelled windows per class.")] = "2",
    split: SplitOption = "disjoint",
    umd: UmdOption = None,
    prompts: Prompts = None,
    on_short: OnShort = "error",
    recipe: Recipe = "best",
    config: ConfigFile = None,
    set_: Set = None,
    seed: Seed = 0,
    out: Out = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    device: Device = "auto",
    threads: Threads = 0,
    json_: Json = False,
) -> None:
    """Train the classifier on a few labels per class, and judge it on held-out pixels."""
    from fastdiffclip import checkpoint
    from fastdiffclip.commands import views, workflow
    from fastdiffclip.commands.terminal import progress_bars, say, say_json
    from fastdiffclip.config import load_config
    from fastdiffclip.runtime import set_threads

    settings, count = load_config(recipe, config, set_ or []), _shots(shots)
    set_threads(threads)
    opened = workflow.open_scenes(scenes or [])
    plan = workflow.plan_flc(opened, settings, count, split, on_short, prompts, seed)
    views.show_plan("train-flc", plan)
    if not dry_run:
        with progress_bars() as progress:
            pretrained = None if umd == "none" else workflow.find_umd(opened, settings, umd)
            if pretrained is None and umd != "none":
                say("No pretrained model of these scenes and settings was found: pretraining first (train-umd).")
                pretrained = workflow.pretrain(
                    opened, settings, seed=seed, out=None, device=device, resume=False, progress=progress
                )
            if pretrained is not None:
                say(f"Pretrained encoder: {pretrained.folder}")
            folder = out or checkpoint.new_run_path(workflow.folder_name(opened), "flc", workflow.RUNS)
            trained = workflow.train_classifier(
                opened, settings, umd=pretrained, shots=count, split_kind=split, on_short=on_short, prompts=prompts,
                seed=seed, out=folder, device=device, resume=resume, progress=progress,
            )  # fmt: skip
        plan |= views.show_trained(trained)
    if json_:
        say_json(plan)


@app.command(epilog="Example: fastdiffclip predict scene.zarr --out map.tif --png map.png")
@reported
def predict(
    scene: Path,
    out: Annotated[Path, typer.Option(metavar="MAP.tif", help="GeoTIFF of class values.")],
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run of train-flc; default: the newest of this scene.", show_default=False),
    ] = None,
    probabilities: Annotated[
        Path | None,
        typer.Option(metavar="P.tif", help="GeoTIFF with one band per class.", show_default=False),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="MAP.png", help="Picture with a legend.", show_default=False)
    ] = None,
    device: Device = "auto",
    threads: Threads = 0,
    json_: Json = False,
) -> None:
    """Classify a whole scene: a georeferenced map on its grid."""
    from fastdiffclip.commands import views, workflow
    from fastdiffclip.commands.terminal import progress_bars, say_json
    from fastdiffclip.infer.stream import predict as run
    from fastdiffclip.runtime import set_threads
    from fastdiffclip.scene.store import open_scene

    set_threads(threads)
    opened = open_scene(scene)
    folder = model or workflow.find_model(opened)
    with progress_bars() as progress:
        result = run(opened, folder, out, probabilities=probabilities, png=png, device=device, progress=progress)
    summary = views.show_prediction(result, folder)
    if json_:
        say_json(summary)


@app.command(epilog="Example: fastdiffclip evaluate scene.zarr --shots 2,8,20 --seeds 10")
@reported
def evaluate(
    scenes: SceneArgs = None,
    shots: Annotated[str, typer.Option(metavar="K,K,...", help="Shots per class, comma-separated.")] = "2",
    seeds: Annotated[int, typer.Option(min=1, help="Number of draws.")] = 10,
    split: SplitOption = "disjoint",
    baselines: Annotated[
        str, typer.Option(help="Comma-separated: svm, extratrees, 1nn, linear, clip; or none.")
    ] = "svm,extratrees,1nn,linear",
    umd: UmdOption = None,
    prompts: Prompts = None,
    on_short: OnShort = "error",
    classes: Annotated[
        str | None, typer.Option(metavar="V,V,...", help="Keep only these class values.", show_default=False)
    ] = None,
    test_limit: Annotated[
        int | None, typer.Option(min=1, help="At most that many test pixels per class.", show_default=False)
    ] = None,
    recipe: Recipe = "best",
    config: ConfigFile = None,
    set_: Set = None,
    seed: Seed = 0,
    out: Out = None,
    resume: Resume = False,
    map_: Annotated[
        Path | None,
        typer.Option("--map", metavar="MAP.tif", help="Judge a map instead, with --labels.", show_default=False),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", metavar="FILE[:VAR]", help="Labels for --map.", show_default=False),
    ] = None,
    device: Device = "auto",
    threads: Threads = 0,
    json_: Json = False,
) -> None:
    """Repeat over many draws: mean and spread of our method and the baselines, in one table."""
    from fastdiffclip.commands import views, workflow
    from fastdiffclip.commands.terminal import progress_bars, say_json
    from fastdiffclip.config import load_config
    from fastdiffclip.evaluate.runner import Plan
    from fastdiffclip.runtime import set_threads

    if map_ is not None or labels is not None:
        if map_ is None or labels is None:
            raise UsageError("--map and --labels go together: give the map and the labels to judge it by")
        summary = views.show_scores(workflow.judge_map(map_, labels), f"{map_} against {labels}")
    else:
        settings = load_config(recipe, config, set_ or [])
        set_threads(threads)
        plan = Plan(
            tuple(_shots(part) for part in shots.split(",")), seeds, split,
            () if baselines in ("", "none") else tuple(baselines.split(",")), prompts, on_short, seed,
            None if classes is None else _values(classes), test_limit,
        )  # fmt: skip
        with progress_bars() as progress:
            result = workflow.evaluate_scenes(
                workflow.open_scenes(scenes or []),
                plan,
                settings,
                umd=umd,
                out=out,
                resume=resume,
                device=device,
                progress=progress,
            )
        summary = views.show_evaluation(result, out)
    if json_:
        say_json(summary)


def _values(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--classes takes class values, for example 1,3,4; got {text!r}") from None


@app.command(epilog="Example: fastdiffclip bench --suite kernels --threads 1")
@reported
def bench(
    suite: Annotated[str, typer.Option(help="kernels, io, train, infer or all.")] = "kernels",
    threads: Threads = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for JSON, tables and plots.", show_default=False),
    ] = None,
    device: Device = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes: does it run?")] = False,
    json_: Json = False,
) -> None:
    """Time kernels, stages, prediction and reading, against plain torch and the machine's own limits."""
    from fastdiffclip import bench as benches
    from fastdiffclip.commands.terminal import progress_bars, say, say_json

    with progress_bars() as progress:
        result = benches.run(suite, threads=threads, out=out, device=device, quick=quick, progress=progress)
    say(benches.render(result))
    if json_:
        say_json(result)


@app.command(epilog="Example: fastdiffclip doctor")
@reported
def doctor(json_: Json = False) -> None:
    """What this machine offers, what will be used, and why the rest will not."""
    from fastdiffclip.commands import views
    from fastdiffclip.commands.terminal import say_json

    found = views.show_doctor()
    if json_:
        say_json(found)


if __name__ == "__main__":
    main()
