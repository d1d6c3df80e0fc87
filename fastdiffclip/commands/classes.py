"""The commands ``suggest`` and ``add-class``: what a trained model says of labels and classes to come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastdiffclip.commands import options
from fastdiffclip.commands.options import Device, Json, SceneArgs, Threads
from fastdiffclip.errors import UsageError


def suggest(
    scene: Annotated[Path, typer.Argument(metavar="SCENE", help="A scene that ingest wrote.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="POINTS.geojson", help="Points, best first, as GeoJSON.")],
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run of train-flc; default: the newest of this scene.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="How many points at most.")] = 20,
    device: Device = "auto",
    threads: Threads = 0,
    json_: Json = False,
) -> None:
    """Say which pixels to label next: where the model is unsure, and unlike what it knows."""
    options.require_writable({"--out": out})
    from fastdiffclip.commands import workflow
    from fastdiffclip.commands.terminal import say, say_json, table
    from fastdiffclip.files import write_atomic
    from fastdiffclip.infer.classifier import Classifier
    from fastdiffclip.infer.suggest import geojson
    from fastdiffclip.infer.suggest import suggest as suggestions_of
    from fastdiffclip.runtime import memory_budget, set_threads
    from fastdiffclip.scene.store import open_scene

    set_threads(threads)
    opened = open_scene(scene)
    folder = model or workflow.find_model(opened)
    classifier = Classifier.load(folder, device)
    known = workflow.shots_in(folder, opened)
    found = suggestions_of(opened, classifier, count, known, memory_budget(classifier.config.memory_gib))
    write_atomic(out, (json.dumps(geojson(opened, found), indent=1, ensure_ascii=False) + "\n").encode())
    rows = [[str(item.row), str(item.col), item.name, f"{item.confidence:.2f}"] for item in found]
    table(f"To be labelled next, by {folder}", ["row", "column", "taken for", "confidence"], rows)
    say(f"Written: {out}")
    if json_:
        say_json({"model": str(folder), "file": str(out), "points": len(found), "labelled": len(known)})


def add_class(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Run of train-flc.", show_default=False)],
    scenes: SceneArgs,
    name: Annotated[str, typer.Option(metavar="NAME", help="Of the new class.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the model that knows it, new or empty.")],
    description: Annotated[str, typer.Option(metavar="TEXT", help="What it looks like; the better, the better.")] = "",
    value: Annotated[
        int | None,
        typer.Option(metavar="V", help="Its value in maps; default: one above the largest.", show_default=False),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Share of the scene that it covers, 0 to 1; default: as of the average class.",
            show_default=False,
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Teach a trained model one more class by its description: no pixel, no training."""
    if not name.strip():
        raise UsageError("the new class has no name; give --name")
    from fastdiffclip.commands import workflow
    from fastdiffclip.commands.terminal import facts, say, say_json
    from fastdiffclip.train.add_class import add_class as added

    entry = added(model, workflow.open_scenes(scenes or []), out, name, description, value, share)
    alike = sorted(entry["likeness"].items(), key=lambda item: -item[1])[:3]
    say(f"The class {entry['name']!r} has the value {entry['value']}")
    facts({"most like": ", ".join(f"{other} ({share:.2f})" for other, share in alike), "model": str(out)})
    say("No pixel of it was seen: look at the map before you rely on it, and label some where it matters.")
    if json_:
        say_json(entry | {"model": str(out)})
