"""The command ``predict``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdiffclip.commands import options
from fastdiffclip.commands.options import Device, Json, Threads
from fastdiffclip.errors import UsageError

if TYPE_CHECKING:
    from fastdiffclip.infer.plan import Plan
    from fastdiffclip.scene.store import Scene

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def predict(
    scene: Annotated[
        str,
        typer.Argument(
            metavar="SCENE|FILE[:VAR]",
            help="A scene that ingest wrote, or the raster file of the model's first modality.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="MAP.tif", help="GeoTIFF of class values on the grid of the scene.")],
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run of train-flc; default: the newest of this scene.", show_default=False),
    ] = None,
    probabilities: Annotated[
        Path | None, typer.Option(metavar="P.tif", help="GeoTIFF with one band per class.", show_default=False)
    ] = None,
    confidence: Annotated[
        Path | None,
        typer.Option(metavar="C.tif", help="GeoTIFF of the largest class probability.", show_default=False),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="MAP.png", help="Picture with a legend.", show_default=False)
    ] = None,
    reject: Annotated[
        float | None,
        typer.Option(metavar="P", help="Below this probability a pixel is 'none of these'.", show_default=False),
    ] = None,
    bbox: Annotated[
        str | None,
        typer.Option(
            metavar="BOX",
            help="Only this part: XMIN,YMIN,XMAX,YMAX in the scene's CRS, or pixels:LEFT,TOP,RIGHT,BOTTOM.",
            show_default=False,
        ),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[:VAR]",
            help="Only pixels that are not 0 in this raster, or lie in these polygons; the rest is nodata.",
            show_default=False,
        ),
    ] = None,
    modality: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE[:VAR]", help="Raster of a further modality; repeatable.", show_default=False),
    ] = None,
    valid: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE[:VAR]", help="As for ingest, as are the next five.", show_default=False),
    ] = None,
    wavelengths: options.Wavelengths = None,
    bad_bands: options.BadBands = None,
    nodata: options.Nodata = None,
    scale: options.Scale = None,
    resample: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="Align rasters on other grids to the first.", show_default=False),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of the whole process at most, as 2GiB.", show_default=False),
    ] = None,
    device_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="GPU memory at most, as 8GiB.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted prediction of --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and how long it takes.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
    json_: Json = False,
) -> None:
    """Classify a whole scene of any size: a georeferenced map on its grid."""
    outputs = {"--out": out, "--probabilities": probabilities, "--confidence": confidence, "--png": png}
    options.require_writable(outputs)
    if reject is not None and not 0.0 < reject <= 1.0:
        raise UsageError(f"--reject takes a probability above 0 and at most 1; got {reject:g}")
    limits = memory_size(memory, "--memory"), memory_size(device_memory, "--device-memory")
    said = options.pairs(modality, "--modality"), options.pairs(valid, "--valid"), wavelengths, bad_bands
    numbers = options.numbers(nodata, "--nodata"), options.numbers(scale, "--scale")
    from fastdiffclip.commands import views, workflow
    from fastdiffclip.commands.terminal import progress_bars, say, say_json
    from fastdiffclip.infer.crew import Crew
    from fastdiffclip.infer.finish import Outputs
    from fastdiffclip.infer.interest import interest_of
    from fastdiffclip.infer.stream import open_job
    from fastdiffclip.runtime import set_threads

    set_threads(threads)
    leads = Crew.of_environment().rank == 0
    with _opened(scene, model, said, numbers, resample) as opened:
        folder = model or workflow.find_model(opened)
        files = Outputs(out, probabilities, confidence, png, reject)
        with open_job(opened, folder, files, interest_of(opened, bbox, mask), device) as job:
            plan = job.plan(*limits, measure=leads)
            if leads:
                show_plan(plan)
            if dry_run:
                summary = plan.summary() | {"model": str(folder), "out": str(out), "dry_run": True}
            else:
                with progress_bars() as progress:
                    result = job.run(plan, resume, progress)
                summary = {"plan": plan.summary()} | (views.show_prediction(result, folder) if leads else {})
    if leads and dry_run:
        say(f"Dry run: nothing was written; the map would be {out}")
    if leads and json_:
        say_json(summary)


@contextmanager
def _opened(
    spec: str, model: Path | None, said: tuple[Any, ...], numbers: tuple[Any, Any], resample: str | None
) -> Iterator[Scene]:
    """The scene at a path, or raster files as one."""
    modalities, valid, wavelengths, bad_bands = said
    is_file = Path(spec).is_file() or (":" in spec and not Path(spec).exists())
    if not is_file:
        if any(said) or any(part is not None for part in (*numbers, resample)):
            raise UsageError(f"{spec} is a scene and says itself what its bands are; leave out the options of files")
        from fastdiffclip.scene.store import open_scene

        yield open_scene(spec)
        return
    if model is None:
        raise UsageError(f"no model belongs to the file {spec}; give --model DIR, or the scene that ingest wrote")
    from fastdiffclip.checkpoint import load_run
    from fastdiffclip.infer.cog import bounded_cache
    from fastdiffclip.scene.ingest import IngestRequest
    from fastdiffclip.scene.raster_scene import open_raster_scene

    first = next(iter(entry["name"] for entry in load_run(model, "flc").manifest["front_end"]["modalities"]))
    request = IngestRequest(
        [(first, spec), *modalities], Path(), valid=dict(valid), wavelengths=wavelengths, bad_bands=bad_bands,
        nodata=numbers[0], scale=numbers[1], resample=resample,
    )  # fmt: skip
    with bounded_cache(), open_raster_scene(request) as scene:
        yield scene


def memory_size(text: str | None, option: str) -> int | None:
    """Bytes of ``2GiB``, ``512 MiB``, ``1.5G``; units of 1024. Raises :class:`UsageError`."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size == 0:
        raise UsageError(f"{option} takes a size such as 2GiB or 512MiB; got {text!r}")
    return size


def show_plan(plan: Plan) -> None:
    """What a prediction is about to do."""
    from fastdiffclip.commands.terminal import facts, say, size

    summary = plan.summary()
    height, width = summary["block"]
    where = f"{plan.device}, {plan.precision}" + (f", {plan.threads} threads" if plan.threads > 1 else "")
    lines = {
        "pixels": f"{plan.pixels} of {plan.tiling.height} x {plan.tiling.width}",
        "blocks": f"{summary['blocks']} of {height} x {width} pixels, {plan.windows} windows at a time",
        "computed on": where,
        "memory": f"at most {size(summary['memory']['sum'])} ({_parts(plan.memory)})",
    }
    if plan.device_memory:
        lines["GPU memory"] = f"at most {size(summary['device_memory']['sum'])} ({_parts(plan.device_memory)})"
    if plan.seconds is not None:
        lines["expected"] = _duration(plan.seconds)
    say("predict")
    facts(lines)


def _parts(memory: dict[str, int]) -> str:
    from fastdiffclip.commands.terminal import size

    return ", ".join(f"{name} {size(part)}" for name, part in memory.items() if part >= 1 << 20)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
