"""The options that commands share, and how their texts are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from fastdiffclip.errors import ResourceError, UsageError, nearest

SceneArg = Annotated[Path, typer.Argument(metavar="SCENE", help="A scene that ingest wrote.", show_default=False)]
SceneArgs = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="SCENE", help="Scenes, or a folder of scenes; none: the built-in scene.", show_default=False
    ),
]
Recipe = Annotated[
    str,
    typer.Option(
        metavar="best|paper|demo|NAME",
        help="best: what measures best; paper: as published; demo: small; houston2013, trento, muufl, mrnet: the paper "
        "on that data set.",
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file of settings.", show_default=False)
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="One setting, as in umd.epochs=20; repeatable.", show_default=False
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Seed of everything random.")]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Output folder; default runs/<scene>/<stage>-<time>.", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where to compute.")]
Threads = Annotated[int, typer.Option(metavar="N", min=0, help="CPU threads; 0: OMP_NUM_THREADS, else all.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on the last line of stdout.")]
SplitOption = Annotated[
    str,
    typer.Option(
        "--split",
        metavar="disjoint|random|official",
        help="How training and test pixels are parted; random leaks between neighbours.",
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="p1..p5|none|NAME|FILE", help="Prompt style, no words, shipped set or YAML file.", show_default=False
    ),
]
Wavelengths = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Wavelengths of the first modality.", show_default=False)
]
BadBands = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Bad bands of the first modality.", show_default=False)
]
Nodata = Annotated[list[str] | None, typer.Option(metavar="[NAME=]V", help="Nodata value.", show_default=False)]
Scale = Annotated[
    list[str] | None, typer.Option(metavar="[NAME=]S", help="Physical value of one stored unit.", show_default=False)
]
KeptClasses = Annotated[
    str | None, typer.Option(metavar="V,V,...", help="Keep only these class values.", show_default=False)
]
TestLimit = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="At most that many test pixels per class.", show_default=False)
]
OnShort = Annotated[
    str, typer.Option(metavar="error|use-all", help="What to do with a class that has fewer labels than shots.")
]
AddClass = Annotated[
    list[str] | None,
    typer.Option(
        "--add-class",
        metavar="NAME[=TEXT]",
        help="A class without labelled pixels, mapped from its description (TEXT, or that of the class table); "
        "repeatable.",
        show_default=False,
    ),
]
Shares = Annotated[
    list[str] | None,
    typer.Option(
        "--share",
        metavar="[NAME=]S",
        help="Share of the scene that it covers, 0 to 1; default: as of the average class.",
        show_default=False,
    ),
]
UmdOption = Annotated[
    str | None,
    typer.Option(
        "--umd",
        metavar="DIR|none",
        help="Pretrained run, or none; default: the newest that fits, else pretrain first.",
        show_default=False,
    ),
]


class _Plain:
    """Shows of arguments and flags what a user types, not the types that typer sees."""

    def get_params(self, ctx: Any) -> list[Any]:
        found: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in found:
            if parameter.param_type_name == "argument":
                parameter.display_type_rich = lambda ctx: ""
            elif parameter.is_flag and parameter.metavar is None:
                parameter.metavar = ""
        return found


class Command(_Plain, TyperCommand):
    """A command of ours."""


class Group(_Plain, TyperGroup):
    """A group of commands of ours."""


def examples(*lines: str) -> str:
    """The end of a help text: one command per line."""
    return "\n".join(["[bold]Examples[/bold]", *("$ " + line.replace("[", r"\[") for line in lines)])


def pairs(
    values: list[str] | None, option: str, form: str = "NAME=FILE", example: str = "lidar=dsm.tif"
) -> list[tuple[str, str]]:
    """``NAME=TEXT`` of a repeatable option. Raises :class:`UsageError`."""
    found = []
    for text in values or []:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise UsageError(f"{option} takes {form}, for example {option} {example}; got {text!r}")
        found.append((key, value))
    return found


def numbers(values: list[str] | None, option: str) -> float | dict[str, float] | None:
    """One plain number, or numbers by name; None without values. Raises :class:`UsageError`."""
    try:
        if values and len(values) == 1 and "=" not in values[0]:
            return float(values[0])
        return {key: float(value) for key, value in (text.split("=", 1) for text in values or [])} or None
    except ValueError:
        raise UsageError(f"{option} takes a number or NAME=NUMBER; got {' '.join(values or [])!r}") from None


def classes_to_add(values: list[str] | None, shares: list[str] | None) -> dict[str, tuple[str, float | None]]:
    """Description and share by name, of ``--add-class`` and ``--share``. Raises :class:`UsageError`."""
    found: dict[str, str] = {}
    for text in values or []:
        name, _, description = (part.strip() for part in text.partition("="))
        if not name:
            raise UsageError(f"--add-class takes NAME or NAME=TEXT, for example --add-class Vineyard; got {text!r}")
        if name in found:
            raise UsageError(f"--add-class names {name!r} twice; give each class once")
        found[name] = description
    given = numbers(shares, "--share")
    if given is not None and not found:
        raise UsageError("--share is that of a class without labelled pixels; name it with --add-class")
    by_name = given if isinstance(given, dict) else {} if given is None else dict.fromkeys(found, given)
    for name, share in by_name.items():
        if name not in found:
            raise UsageError(
                f"--share is given for {name!r}{nearest(name, list(found))}, which --add-class does not name"
            )
        if not 0.0 < share < 1.0:
            raise UsageError(f"--share takes a share above 0 and below 1; got {share:g}")
    if sum(by_name.values()) >= 1.0:
        raise UsageError(f"the shares of --share are {sum(by_name.values()):g} in all; leave some to the other classes")
    return {name: (description, by_name.get(name)) for name, description in found.items()}


def label_specs(values: list[str] | None) -> list[tuple[str, str]]:
    """(map, file) of ``--labels``; the map is ``labels`` unless ``train=`` or ``test=`` stands before the file."""
    found = []
    for text in values or []:
        key, equals, value = text.partition("=")
        named = equals and key in ("labels", "train", "test")
        found.append((key, value) if named else ("labels", text))
    return found


def shots_of(text: str) -> int | None:
    """``--shots``: a number of 1 or more, None for ``all``. Raises :class:`UsageError`."""
    if text == "all":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UsageError(f"--shots takes a whole number of 1 or more, or all; got {text!r}")
    return int(text)


def class_values(text: str) -> tuple[int, ...]:
    """``--classes`` of an evaluation. Raises :class:`UsageError`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--classes takes class values, for example 1,3,4; got {text!r}") from None


def require_out(out: Path | None, resume: bool) -> None:
    """Raise :class:`UsageError` for ``--resume`` without the folder that it goes on in."""
    if resume and out is None:
        raise UsageError("--resume goes on with the run in --out DIR; say which folder")


def require_writable(files: Mapping[str, Path | None]) -> None:
    """Raise :class:`UsageError` or :class:`ResourceError` now rather than after the work that the files are for."""
    seen: dict[Path, str] = {}
    for option, path in files.items():
        if path is None:
            continue
        if path.is_dir():
            raise UsageError(f"{option} {path} is a folder; give the name of a file")
        if path.resolve() in seen:
            raise UsageError(f"{seen[path.resolve()]} and {option} both name {path}; give each its own file")
        seen[path.resolve()] = option
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ResourceError(f"{option} {path} cannot be written: {folder} is no folder one may write in")
