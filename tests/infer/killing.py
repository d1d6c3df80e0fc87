"""Run in a process of its own: predictions in forked children that are killed at chosen moments, and resumed.

``python killing.py SCENE MODEL OUT``; prints a JSON object: moment -> what was found.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdiffclip.infer import engine, finish, unfinished
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.infer.finish import Outputs
from fastdiffclip.infer.interest import interest_of
from fastdiffclip.infer.rawfile import RawFile
from fastdiffclip.infer.stream import open_job
from fastdiffclip.infer.unfinished import Unfinished
from fastdiffclip.scene.store import Scene, open_scene

NAMES = ("map.tif", "map.tif.aux.xml", "p.tif", "c.tif")


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nth(owner: Any, name: str, count: int, before: bool = True) -> None:
    """Let the process die at the call number ``count`` of a function, before or after it has done its work."""
    plain, seen = getattr(owner, name), [0]

    def call(*args: Any, **named: Any) -> Any:
        seen[0] += 1
        if seen[0] == count and before:
            die()
        result = plain(*args, **named)
        if seen[0] == count:
            die()
        return result

    setattr(owner, name, call)


def torn_line() -> None:
    """Die when a line of the journal is half written."""
    plain, seen = os.write, [0]

    def write(file: int, data: bytes) -> int:
        seen[0] += 1
        if seen[0] == 5:
            plain(file, bytes(data)[: len(data) // 2])
            die()
        return plain(file, data)

    os.write = write  # type: ignore[assignment]


MOMENTS: dict[str, Callable[[], None]] = {
    "folder is made, nothing said": lambda: nth(unfinished, "write_atomic", 1),
    "first tile": lambda: nth(RawFile, "write", 1),
    "tile written, not entered": lambda: nth(Unfinished, "commit", 4),
    "tiles entered": lambda: nth(Unfinished, "commit", 6, before=False),
    "half a line of the journal": torn_line,
    "raw files are complete": lambda: nth(finish, "remove_stale", 1),
    "probabilities half written": lambda: nth(finish, "write_confidence", 1),
    "GeoTIFF not renamed": lambda: nth(os, "replace", 3),
    "map renamed, names not": lambda: nth(os, "replace", 4, before=False),
    "all renamed": lambda: nth(unfinished, "discard", 1),
    "folder half removed": lambda: nth(unfinished.shutil, "rmtree", 2),
}


def predict(scene: Scene, classifier: Classifier, out: Path, resume: bool, rows: int) -> list[int]:
    """Write all outputs; returns how many tiles were done before, and how many there are."""
    outputs = Outputs(*(out / name for name in ("map.tif", "p.tif", "c.tif")))
    known: list[int] = []
    with open_job(scene, classifier, outputs, interest_of(scene), "cpu") as job:
        plain = Unfinished.verify

        def verify(state: Unfinished, tiles: Any) -> None:
            plain(state, tiles)
            known.append(len(state.done))

        Unfinished.verify = verify  # type: ignore[method-assign]
        job.run(replace(job.plan(), rows=rows, cols=1), resume)
        return [*(known or [0]), len(job.wanted_tiles)]


def forked(work: Callable[[], Any]) -> tuple[int, Any]:
    """Do it in a child; returns its wait status, and what it returned."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        code = 1
        try:
            os.write(theirs, json.dumps(work()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(theirs)
    with open(ours, "rb") as file:
        said = file.read()
    return os.waitpid(child, 0)[1], json.loads(said) if said else None


def main() -> None:
    scene, classifier, root = open_scene(sys.argv[1]), Classifier.load(Path(sys.argv[2]), "cpu"), Path(sys.argv[3])
    engine.BATCHES["cpu"] = engine.Batches(stem=64, tokens=144, tile=60)
    from fastdiffclip.infer import pipeline

    pipeline.COMMIT_SECONDS = -1.0
    predict(scene, classifier, root / "whole", False, 99)
    whole = {name: (root / "whole" / name).read_bytes() for name in NAMES}
    found: dict[str, Any] = {}
    for number, (moment, prepare) in enumerate(MOMENTS.items()):
        out = root / str(number)

        def killed(out: Path = out, prepare: Callable[[], None] = prepare) -> list[int]:
            prepare()
            return predict(scene, classifier, out, False, 1)

        status, _ = forked(killed)
        half = [name for name in NAMES if (out / name).exists() and (out / name).read_bytes() != whole[name]]
        again, said = forked(lambda out=out: predict(scene, classifier, out, True, 3))
        found[moment] = {
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "half there": half,
            "resumed": again,
            "tiles": said,
            "other bytes": [name for name in NAMES if (out / name).read_bytes() != whole[name]],
            "left": sorted(set(os.listdir(out)) - set(NAMES)),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
