"""The commands that write and read scenes: ``ingest``, ``scene info``, ``scene verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastdiffclip.commands import options
from fastdiffclip.commands.options import Json, SceneArg
from fastdiffclip.errors import InputDataError, UsageError

scene_app = typer.Typer(
    cls=options.Group,
    no_args_is_help=True,
    help="Look at a stored scene.",
    epilog=options.examples("fastdiffclip scene info scene.zarr", "fastdiffclip scene verify scene.zarr --json"),
)


def ingest(
    out: Annotated[Path, typer.Option(metavar="SCENE", help="The scene to write; a folder when a glob makes several.")],
    hsi: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[:VAR]", help="Hyperspectral cube; a glob makes one scene per file.", show_default=False
        ),
    ] = None,
    modality: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE[:VAR]", help="Another modality; repeatable.", show_default=False),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MAP=]FILE[:VAR]",
            help="Label map, 0 = unlabelled; MAP: labels, or train and test for official ones.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="Class table with the columns value, name and, if you like, description, colour.",
            show_default=False,
        ),
    ] = None,
    valid: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE[:VAR]", help="Validity mask of a modality, 0 = invalid.", show_default=False),
    ] = None,
    wavelengths: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Wavelengths of the first modality.", show_default=False)
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
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the scene; default: that of --out.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing scene.")] = False,
    json_: Json = False,
) -> None:
    """Turn rasters and labels (MATLAB, GeoTIFF, .npy, .npz) into a scene."""
    from fastdiffclip.commands.terminal import complain, progress_bars, say, say_json
    from fastdiffclip.scene.ingest import IngestRequest
    from fastdiffclip.scene.ingest import ingest as run

    modalities = ([("hsi", hsi)] if hsi else []) + options.pairs(modality, "--modality")
    if not modalities:
        raise UsageError("ingest needs a raster: give --hsi FILE[:VAR], or --modality NAME=FILE[:VAR]")
    request = IngestRequest(
        modalities, out, options.label_specs(labels), classes, dict(options.pairs(valid, "--valid")), wavelengths,
        bad_bands, options.numbers(nodata, "--nodata"), options.numbers(scale, "--scale"), name, overwrite,
    )  # fmt: skip
    with progress_bars() as progress:
        report = run(request, lambda share, note: progress("ingest", round(100 * share), 100, note))
    for line in report.lines:
        say(line)
    for warning in report.warnings:
        complain(f"warning: {warning}")
    for path in report.scenes:
        say(f"Written: {path}")
    if json_:
        say_json({"scenes": report.scenes, "warnings": report.warnings, "lines": report.lines})


@scene_app.command(
    "info",
    cls=options.Command,
    epilog=options.examples("fastdiffclip scene info scene.zarr", "fastdiffclip scene info scene.zarr --json"),
)
def scene_info(scene: SceneArg, json_: Json = False) -> None:
    """Size, modalities, wavelengths, grid and classes of a scene."""
    from fastdiffclip.commands import views
    from fastdiffclip.commands.terminal import say_json
    from fastdiffclip.scene.store import open_scene, scene_summary

    summary = scene_summary(open_scene(scene))
    views.show_scene(summary)
    if json_:
        say_json(summary)


@scene_app.command("verify", cls=options.Command, epilog=options.examples("fastdiffclip scene verify scene.zarr"))
def scene_verify(scene: SceneArg, json_: Json = False) -> None:
    """Read every chunk of a scene against its checksums."""
    from fastdiffclip.commands.terminal import say, say_json, size
    from fastdiffclip.scene.store import verify_scene

    report = verify_scene(scene)
    if report.ok:
        say(f"{scene}: {report.chunks} chunks, {size(report.bytes)}, all whole")
    if json_:
        say_json({"ok": report.ok, "chunks": report.chunks, "bytes": report.bytes, "problems": report.problems})
    if not report.ok:
        more = f" and {len(report.problems) - 5} more" if len(report.problems) > 5 else ""
        raise InputDataError(f"{scene} is damaged: {'; '.join(report.problems[:5])}{more}; ingest it again")
