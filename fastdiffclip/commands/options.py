"""The options that commands share, and how their texts are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastdiffclip.errors import UsageError

SceneArg = Annotated[Path, typer.Argument(metavar="SCENE", help="A scene that ingest wrote.", show_default=False)]
SceneArgs = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[SCENE]...", help="Scenes, or a folder of scenes; none: the built-in scene.", show_default=False
    ),
]
Recipe = Annotated[
    str,
    typer.Option(metavar="best|paper|demo", help="best: what measures best; paper: as published; demo: small."),
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
Threads = Annotated[int, typer.Option(metavar="N", min=0, help="CPU threads; 0 takes all.")]
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
    typer.Option(metavar="p1..p5|NAME|FILE", help="Prompt style, shipped set or YAML file.", show_default=False),
]
OnShort = Annotated[
    str, typer.Option(metavar="error|use-all", help="What to do with a class that has fewer labels than shots.")
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


def examples(*lines: str) -> str:
    """The end of a help text: one command per line."""
    return "\n\n".join(["[bold]Examples[/bold]", *(line.replace("[", r"\[") for line in lines)])


def pairs(values: list[str] | None, option: str) -> list[tuple[str, str]]:
    """``NAME=TEXT`` of a repeatable option. Raises :class:`UsageError`."""
    found = []
    for text in values or []:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise UsageError(f"{option} takes NAME=FILE, for example {option} lidar=dsm.tif; got {text!r}")
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
