"""The commands that write and read scenes: ``ingest``, ``scene info``, ``scene verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdiffclip.commands import options
from fastdiffclip.commands.options import Json, SceneArg
from fastdiffclip.errors import InputDataError, UsageError

if TYPE_CHECKING:
    from fastdiffclip.scene.ingest import IngestReport

_SHOWN = 50
_BARE = "--resample"
scene_app = typer.Typer(
    cls=options.Group,
    no_args_is_help=True,
    help="Look at a stored scene.",
    epilog=options.examples("fastdiffclip scene info scene.zarr", "fastdiffclip scene verify scene.zarr --json"),
)


class IngestCommand(options.Command):
    """``ingest``, whose ``--resample`` may stand alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, ``--resample`` without a method as ``--resample auto``."""
        full = []
        for word, following in zip(args, [*args[1:], "--"], strict=True):
            full += [word, "auto"] if word == _BARE and following.startswith("-") else [word]
        return super().parse_args(ctx, full)


def ingest(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Folder of the files of --preset.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="SCENE",
            help="The scene to write; a folder when a glob makes several. With --preset: NAME.zarr, mrnet: mrnet.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="houston2013|trento|muufl|mrnet",
            help="Find the files of this data set in DIR; instead of the options that name files.",
            show_default=False,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="For the preset mrnet: task=abnormal|acl|meniscus; also window=11, slices=16, block=8. Repeatable.",
            show_default=False,
        ),
    ] = None,
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
            help="Label raster (0 = unlabelled), polygons (FILE.gpkg:ATTRIBUTE) or ENVI regions (.txt); MAP: labels, "
            "or train and test for official ones.",
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
    wavelengths: options.Wavelengths = None,
    bad_bands: options.BadBands = None,
    nodata: options.Nodata = None,
    scale: options.Scale = None,
    resample: Annotated[
        str | None,
        typer.Option(
            metavar="[nearest|bilinear|average|cubic]",
            help="Align rasters on other grids to the first modality; alone: bilinear, labels always nearest.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the scene; default: that of --out.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing scene.")] = False,
    json_: Json = False,
) -> None:
    """Turn rasters, point clouds and labels (MATLAB, GeoTIFF, ENVI, .npy, LAS, GeoPackage, ...) into a scene."""
    files = (hsi, modality, labels, classes, valid, wavelengths, bad_bands, nodata, scale, resample)
    if preset is not None:
        _ingest_preset(preset, folder, out, _preset_options(option), any(files), name, overwrite, json_)
        return
    if folder is not None or option or out is None:
        raise UsageError(
            "ingest needs --out SCENE" if out is None else "DIR and --option go with --preset; give files as --hsi FILE"
        )
    from fastdiffclip.commands.terminal import progress_bars
    from fastdiffclip.scene.ingest import IngestRequest
    from fastdiffclip.scene.ingest import ingest as run

    modalities = ([("hsi", hsi)] if hsi else []) + options.pairs(modality, "--modality")
    if not modalities:
        raise UsageError("ingest needs a raster: give --hsi FILE[:VAR], or --modality NAME=FILE[:VAR]")
    request = IngestRequest(
        modalities, out, options.label_specs(labels), classes, dict(options.pairs(valid, "--valid")), wavelengths,
        bad_bands, options.numbers(nodata, "--nodata"), options.numbers(scale, "--scale"), name, overwrite, resample,
    )  # fmt: skip
    with progress_bars() as progress:
        report = run(request, lambda share, note: progress("ingest", round(100 * share), 100, note))
    _show_report(report, json_)


def _preset_options(texts: list[str] | None) -> dict[str, str]:
    return dict(options.pairs(texts, "--option", "KEY=VALUE", "task=acl"))


def _ingest_preset(
    preset: str,
    folder: Path | None,
    out: Path | None,
    given: dict[str, str],
    files: bool,
    name: str | None,
    overwrite: bool,
    json_: bool,
) -> None:
    """``ingest --preset``."""
    if folder is None:
        raise UsageError(f"--preset {preset} needs the folder that holds its files: ingest --preset {preset} DIR")
    if files:
        raise UsageError("--preset finds the files by itself: leave out --hsi, --labels and what describes them")
    from fastdiffclip.commands.terminal import progress_bars
    from fastdiffclip.scene.presets import MRNET, ingest_preset

    with progress_bars() as progress:
        report = ingest_preset(
            preset, folder, out or Path(MRNET if preset == MRNET else f"{preset}.zarr"), options=given,
            scene_name=name, overwrite=overwrite,
            progress=lambda share, note: progress("ingest", round(100 * share), 100, note),
        )  # fmt: skip
    _show_report(report, json_)


def _show_report(report: IngestReport, json_: bool) -> None:
    from fastdiffclip.commands.terminal import complain, say, say_json

    for line in report.lines:
        say(line)
    for warning in report.warnings:
        complain(f"warning: {warning}")
    for path in report.scenes[:_SHOWN]:
        say(f"Written: {path}")
    if len(report.scenes) > _SHOWN:
        say(f"Written: {len(report.scenes) - _SHOWN} more in {report.scenes[0].parent}")
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
