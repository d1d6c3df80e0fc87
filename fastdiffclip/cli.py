"""The command line. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastdiffclip import __version__
from fastdiffclip.commands import classes, options, prediction, process, scenes, stages
from fastdiffclip.commands.options import (
    ConfigFile,
    Device,
    Json,
    KeptClasses,
    OnShort,
    Out,
    Prompts,
    Recipe,
    Resume,
    SceneArgs,
    Seed,
    Set,
    SplitOption,
    TestLimit,
    Threads,
    UmdOption,
)
from fastdiffclip.errors import UsageError

app = typer.Typer(
    name=process.PROGRAM,
    cls=options.Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Few-shot, language-driven classification of multimodal remote-sensing scenes: from a cube, a LiDAR raster, "
    "a few labels and class names to a georeferenced class map.",
    epilog=options.examples(
        "fastdiffclip demo",
        "fastdiffclip ingest --hsi cube.mat:HSI --modality lidar=dsm.tif --labels gt.mat --out scene.zarr",
        "fastdiffclip train-umd scene.zarr",
        "fastdiffclip train-flc scene.zarr --shots 5",
        "fastdiffclip predict scene.zarr --out map.tif --png map.png",
    ),
)


def main() -> None:
    """Entry point of the ``fastdiffclip`` command."""
    sys.exit(process.main(app))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fastdiffclip {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(process.DEBUG, help="With any command: the log, and stack traces of errors.")
    ] = False,
) -> None:
    """Options before the command; ``process.run`` itself looks for --debug."""


@app.command(
    cls=options.Command, epilog=options.examples("fastdiffclip demo", "fastdiffclip demo --out suburb --shots 10")
)
def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the scene, the models, the map and the report; default runs/demo.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    shots: Annotated[str, typer.Option(metavar="K|all", help="Labelled windows per class.")] = "5",
    set_: Set = None,
    device: Device = "auto",
    threads: Threads = 0,
    json_: Json = False,
) -> None:
    """The whole job on the built-in scene: a map, honest figures, a report."""
    count = options.shots_of(shots)
    from fastdiffclip.commands.terminal import say_json
    from fastdiffclip.config import load_config

    settings = load_config("demo", None, set_ or [])
    from fastdiffclip.commands import demonstration
    from fastdiffclip.runtime import set_threads

    set_threads(threads)
    folder = out or demonstration.free_folder()
    with process.keeping("demo", folder, resumable=False):
        result = demonstration.run(folder, settings, count, seed, device)
    if json_:
        say_json(result)


app.command(
    cls=scenes.IngestCommand,
    epilog=options.examples(
        "fastdiffclip ingest --hsi cube.mat:HSI --modality lidar=dsm.tif --labels gt.mat --out scene.zarr",
        "fastdiffclip ingest --hsi cube.npy --labels train=a.tif --labels test=b.tif --classes c.csv --out s.zarr",
        "fastdiffclip ingest --hsi 'plots/*_hsi.tif' --modality lidar='plots/*_chm.tif' --out plots",
        "fastdiffclip ingest --hsi cube.hdr --modality lidar=cloud.laz --labels plots.gpkg:species --out s.zarr",
        "fastdiffclip ingest --hsi cube.hdr --modality lidar=dsm.tif --resample bilinear --out s.zarr",
        "fastdiffclip ingest --preset trento downloads/Trento --out trento.zarr",
    ),
)(scenes.ingest)
app.add_typer(scenes.scene_app, name="scene")


app.command(
    "train-umd",
    cls=options.Command,
    epilog=options.examples(
        "fastdiffclip train-umd scene.zarr",
        "fastdiffclip train-umd scene.zarr --set umd.epochs=50 --out runs/long",
        "fastdiffclip train-umd scene.zarr --set umd.epochs=50 --out runs/long --resume",
        "torchrun --nproc-per-node 4 -m fastdiffclip train-umd scene.zarr --engine deepspeed --zero 2",
    ),
)(stages.train_umd)
app.command(
    "train-flc",
    cls=options.Command,
    epilog=options.examples(
        "fastdiffclip train-flc scene.zarr --shots 5",
        "fastdiffclip train-flc scene.zarr --shots all --on-short use-all",
        "fastdiffclip train-flc plots/ --shots 2 --umd runs/plots/umd-20260101-120000 --prompts p3",
        "fastdiffclip train-flc scene.zarr --shots 5 --add-class Vineyard='rows of vines on bare soil' --share 0.05",
    ),
)(stages.train_flc)


app.command(
    cls=options.Command,
    epilog=options.examples(
        "fastdiffclip predict scene.zarr --out map.tif --png map.png",
        "fastdiffclip predict scene.zarr --model runs/scene/flc-20260101-120000 --out map.tif --probabilities p.tif",
        "fastdiffclip predict line.hdr --modality lidar=dsm.tif --model runs/scene/flc-20260101-120000 --out map.tif",
        "fastdiffclip predict scene.zarr --out map.tif --memory 2GiB --dry-run",
        "torchrun --nproc-per-node 2 -m fastdiffclip predict scene.zarr --out map.tif --resume",
    ),
)(prediction.predict)
app.command(
    cls=options.Command,
    epilog=options.examples(
        "fastdiffclip suggest scene.zarr --out points.geojson",
        "fastdiffclip suggest scene.zarr --model runs/scene/flc-20260101-120000 --count 50 --out points.geojson",
    ),
)(classes.suggest)
app.command(
    "add-class",
    cls=options.Command,
    epilog=options.examples(
        "fastdiffclip add-class runs/scene/flc-20260101-120000 scene.zarr --name Vineyard --share 0.05 "
        "--description 'rows of vines with bare soil between them' --out runs/scene/with-vineyard",
        "fastdiffclip add-class runs/scene/flc-20260101-120000 scene.zarr --name Vineyard "
        "--shots-from vineyards.gpkg:kind --shots 5 --out runs/scene/with-vineyard",
    ),
)(classes.add_class)


@app.command(
    cls=options.Command,
    epilog=options.examples(
        "fastdiffclip evaluate scene.zarr --shots 2,8,20 --seeds 10",
        "fastdiffclip evaluate scene.zarr --shots 5 --baselines svm,clip --out runs/mine",
        "fastdiffclip evaluate --map map.tif --labels gt.mat:gt",
    ),
)
def evaluate(
    scenes: SceneArgs = None,
    shots: Annotated[str, typer.Option(metavar="K,K,...", help="Shots per class, comma-separated; or all.")] = "2",
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Number of draws.")] = 10,
    split: SplitOption = "disjoint",
    baselines: Annotated[
        str, typer.Option(metavar="NAME,NAME,...", help="Out of svm, extratrees, 1nn, linear, clip; or none.")
    ] = "svm,extratrees,1nn,linear",
    umd: UmdOption = None,
    prompts: Prompts = None,
    on_short: OnShort = "error",
    classes: KeptClasses = None,
    test_limit: TestLimit = None,
    recipe: Recipe = "best",
    config: ConfigFile = None,
    set_: Set = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the first draw; the next add 1 each.")] = 0,
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
    options.require_out(out, resume)
    if map_ is not None or labels is not None:
        _judge(map_, labels, scenes, json_)
        return
    counts = tuple(options.shots_of(part) for part in shots.split(","))
    kept = None if classes is None else options.class_values(classes)
    others = () if baselines in ("", "none") else tuple(part.strip() for part in baselines.split(","))
    from fastdiffclip.commands.terminal import say_json
    from fastdiffclip.config import load_config

    settings = load_config(recipe, config, set_ or [])
    from fastdiffclip.commands import training
    from fastdiffclip.evaluate.runner import Plan

    plan = Plan(counts, seeds, split, others, prompts, on_short, seed, kept, test_limit)
    job = training.Job(settings, seed, out, resume, False, device, threads)
    summary = training.evaluation(job, scenes or [], plan, umd)
    if json_:
        say_json(summary)


def _judge(map_path: Path | None, labels: str | None, scenes: list[Path] | None, json_: bool) -> None:
    """``evaluate --map --labels``."""
    if map_path is None or labels is None:
        raise UsageError("--map and --labels go together: give the map and the labels to judge it by")
    if scenes:
        raise UsageError("--map judges a map against --labels and takes no scene; leave out one of the two")
    from fastdiffclip.commands import views, workflow
    from fastdiffclip.commands.terminal import say_json

    scores, names = workflow.judge_map(map_path, labels)
    summary = views.show_scores(scores, f"{map_path} against {labels}", names)
    if json_:
        say_json(summary)


@app.command(
    cls=options.Command,
    epilog=options.examples(
        "fastdiffclip study table1 scene.zarr",
        "fastdiffclip study table3 scene.zarr --shots 2,5 --seeds 10 --out studies/scene",
        "fastdiffclip study fig4 scene.zarr --out studies/scene --resume --jobs 4",
        "fastdiffclip study table6",
    ),
)
def study(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="table1 to table6, fig3, fig4 or fig5.", show_default=False),
    ],
    scenes: SceneArgs = None,
    shots: Annotated[
        str | None,
        typer.Option(
            metavar="K,K,...", help="Shots per class, or all; default: the paper's of this study.", show_default=False
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Number of draws; default 1 to 10.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the first draw; the next add 1 each.")] = 0,
    umd_seeds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of pretrainings that the draws take turns with.")
    ] = 1,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="disjoint|random|official", help="Default disjoint; official for exams.", show_default=False
        ),
    ] = None,
    prompts: Prompts = None,
    on_short: OnShort = "error",
    classes: KeptClasses = None,
    test_limit: TestLimit = None,
    row: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROW", help="Compute this row alone, of the table as it is printed; repeatable.", show_default=False
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="ROW", help="Row that differences are taken to; default: the first.", show_default=False),
    ] = None,
    recipe: Recipe = "best",
    config: ConfigFile = None,
    set_: Set = None,
    out: Out = None,
    resume: Resume = False,
    jobs: Annotated[int, typer.Option(metavar="N", min=0, help="Processes; 0: one per core, one on a GPU.")] = 0,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """A table or figure of the paper on your scenes, the published rows beside ours."""
    options.require_out(out, resume)
    counts = None if shots is None else tuple(options.shots_of(part) for part in shots.split(","))
    kept = None if classes is None else options.class_values(classes)
    from fastdiffclip.commands.terminal import say_json
    from fastdiffclip.study.catalogue import find_study

    chosen = find_study(name)
    from fastdiffclip.commands import study as studies
    from fastdiffclip.study.job import Options

    wishes = Options(
        counts, seeds, seed, split, prompts, on_short, kept, test_limit, recipe, config, tuple(set_ or []), umd_seeds,
        reference, tuple(row or []),
    )  # fmt: skip
    summary = studies.run(chosen, scenes or [], wishes, out=out, resume=resume, jobs=jobs, device=device)
    if json_:
        say_json(summary)


@app.command(
    cls=options.Command,
    epilog=options.examples(
        "fastdiffclip bench --suite kernels --threads 1", "fastdiffclip bench --suite all --out bench-results"
    ),
)
def bench(
    suite: Annotated[str, typer.Option(metavar="kernels|io|train|infer|all|curves", help="What to time.")] = "kernels",
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


@app.command(cls=options.Command, epilog=options.examples("fastdiffclip doctor", "fastdiffclip doctor --json"))
def doctor(json_: Json = False) -> None:
    """What this machine offers, what will be used, and why the rest will not."""
    from fastdiffclip.commands import views
    from fastdiffclip.commands.terminal import say_json

    found = views.show_doctor()
    if json_:
        say_json(found)


if __name__ == "__main__":
    main()
