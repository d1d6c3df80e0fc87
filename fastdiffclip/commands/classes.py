"""The commands ``suggest`` and ``add-class``: what a trained model says of labels and classes to come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastdiffclip.commands import options
from fastdiffclip.commands.options import Device, Json, Threads
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
    scenes: Annotated[
        list[Path],
        typer.Argument(metavar="SCENE", help="Scenes that have the class, or a folder of scenes.", show_default=False),
    ],
    name: Annotated[str, typer.Option(metavar="NAME", help="Of the new class.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the model that knows it, new or empty.")],
    description: Annotated[
        str, typer.Option(metavar="TEXT", help="What it looks like; default: as the class table of SCENE has it.")
    ] = "",
    value: Annotated[
        int | None,
        typer.Option(
            metavar="V",
            help="Its value in maps; default: the class table's, else above the largest.",
            show_default=False,
        ),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Share of SCENE that it covers, 0 to 1; default: as of the average class. With shots they say it; "
            "give it only where it is well known.",
            show_default=False,
        ),
    ] = None,
    shots_from: Annotated[
        str | None,
        typer.Option(
            metavar="SCENE|FILE[:VAR]",
            help="Labelled pixels of it: a scene, or labels on the grid of SCENE as ingest --labels takes them.",
            show_default=False,
        ),
    ] = None,
    shots: Annotated[
        str, typer.Option(metavar="K|all", help="How many of them to learn from; the rest is for judging.")
    ] = "all",
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the draw of shots.")] = 0,
    threads: Threads = 0,
    json_: Json = False,
) -> None:
    """Teach a trained model one more class, from its description or a few pixels, the others left as they are."""
    if not name.strip():
        raise UsageError("the new class has no name; give --name")
    count = options.shots_of(shots)
    if shots_from is None and count is not None:
        raise UsageError(f"--shots {shots} says how many to take of --shots-from, which is not given")
    from fastdiffclip.commands import new_classes, views, workflow
    from fastdiffclip.commands.terminal import say_json
    from fastdiffclip.files import require_free
    from fastdiffclip.runtime import set_threads
    from fastdiffclip.train.add_class import add_class as added

    set_threads(threads)
    require_free(out, resume=None)
    opened, drawn = workflow.open_scenes(scenes), None
    if shots_from is not None:
        drawn = new_classes.draw_shots(shots_from, opened, name, count, workflow.window_of(model), seed)
    entry = added(model, opened, out, name, description, value, share, None if drawn is None else drawn.shots)
    if drawn is not None:
        entry |= new_classes.judged(out, drawn, entry["value"])
    views.show_added(entry, out)
    if json_:
        say_json(entry | {"model": str(out)})
