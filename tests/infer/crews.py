"""Run in a process of its own: one prediction by forked processes as torchrun would start them; one may die.

``python crews.py SCENE MODEL OUT``; prints a JSON object of what was found.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdiffclip.errors import FastDiffCLIPError
from fastdiffclip.infer import engine, pipeline, stream
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.infer.crew import Claims
from fastdiffclip.infer.finish import Outputs
from fastdiffclip.infer.interest import interest_of
from fastdiffclip.infer.stream import open_job
from fastdiffclip.scene.store import Scene, open_scene


def predict(scene: Scene, classifier: Classifier, out: Path, resume: bool = False) -> dict[str, Any]:
    """One process's part; which tiles it computed."""
    computed: list[int] = []
    outputs = Outputs(out / "map.tif", out / "p.tif")
    plain = stream.Task._tile

    def counted(task: stream.Task, number: int, region: Any) -> Any:
        computed.append(number)
        time.sleep(0.02)  # so that the others get a share
        return plain(task, number, region)

    stream.Task._tile = counted  # type: ignore[method-assign]
    with open_job(scene, classifier, outputs, interest_of(scene), "cpu") as job:
        result = job.run(replace(job.plan(), rows=1, cols=1), resume)
        return {"tiles": computed, "files": len(result.files), "pixels": result.pixels}


def started(size: int, work: Callable[[int], Any]) -> list[tuple[int, Any]]:
    """Do it in ``size`` processes with ranks; exit status and answer of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ours)
            names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
            code = 1
            try:
                answer = work(rank)
                os.write(theirs, json.dumps(answer).encode())
                code = 0
            except FastDiffCLIPError as error:
                os.write(theirs, json.dumps(str(error)).encode())
            finally:
                os._exit(code)
        os.close(theirs)
        children.append((child, ours))
    answers = []
    for child, ours in children:
        with open(ours, "rb") as file:
            said = file.read()
        answers.append((os.waitpid(child, 0)[1], json.loads(said) if said else None))
    return answers


def dies_after_its_first_claim(rank: int) -> None:
    """Let rank 1 die when it has taken a block and computed nothing of it."""
    if rank != 1:
        return
    plain = Claims.take

    def take(claims: Claims, block: int) -> bool:
        if plain(claims, block):
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    Claims.take = take  # type: ignore[method-assign]


def main() -> None:
    scene, classifier, root = open_scene(sys.argv[1]), Classifier.load(Path(sys.argv[2]), "cpu"), Path(sys.argv[3])
    engine.BATCHES["cpu"] = engine.Batches(stem=64, tokens=144, tile=60)
    pipeline.COMMIT_SECONDS = -1.0
    predict(scene, classifier, root / "alone")
    whole = {name: (root / "alone" / name).read_bytes() for name in ("map.tif", "p.tif")}

    def one_dies(rank: int) -> Any:
        dies_after_its_first_claim(rank)
        return predict(scene, classifier, root / "one dies")

    def another_model(rank: int) -> Any:
        own = replace(classifier, text_embeddings=classifier.text_embeddings + rank)
        return predict(scene, own, root / "another model")

    (root / "file").write_text("")
    cases: dict[str, tuple[int, Callable[[int], Any]]] = {
        "three": (3, lambda rank: predict(scene, classifier, root / "three")),
        "one dies": (3, one_dies),
        "another model": (2, another_model),
        "leader fails": (2, lambda rank: predict(scene, classifier, root / "file" / "out")),
    }
    found: dict[str, Any] = {}
    for name, (size, work) in cases.items():
        answers, out = started(size, work), root / name
        found[name] = {
            "status": [status for status, _ in answers],
            "said": [said for _, said in answers],
            "equal": [file for file, data in whole.items() if out.exists() and (out / file).read_bytes() == data],
            "left": sorted(set(os.listdir(out)) - {*whole, "map.tif.aux.xml"}) if out.exists() else [],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
