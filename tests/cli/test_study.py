"""The command ``study``, as users type it: a table, an interrupted one, and what it refuses."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from .console import Result, Stopped, leftovers, tiny

Call = Callable[..., Result]
QUICK = ["--shots", "2", "--jobs", "1", *tiny("logistic.samples=64")]


def test_table1(call: Call, scene: Path) -> None:
    done = call(["study", "table1", "scene.zarr", "--seeds", "2", "--out", "out", *QUICK, "--json"], scene)
    assert done.code == 0, done.err
    assert {path.name for path in (scene / "out").iterdir()} == {
        "draws.jsonl", "table1.csv", "table1.json", "table1.md", "table1.png", "umd"
    }  # fmt: skip
    assert [row["label"] for row in done.json["rows"]][:6] == [
        "best", "best + encoder", "best + encoder, random weights", "paper", "clip", "linear"
    ]  # fmt: skip
    assert all(len(row["draws"]) == 2 for row in done.json["rows"]) and done.json["out"] == "out"
    written = json.loads((scene / "out" / "table1.json").read_text(encoding="utf-8"))
    assert written["rows"] == done.json["rows"]
    assert "table1: Few shots" in done.out and "svm, window" in done.out and "Written: out/table1.png" in done.out
    again = call(["study", "table1", "scene.zarr", "--seeds", "2", "--out", "out", "--resume", *QUICK, "--json"], scene)
    assert again.json["computed"] == 0 and again.json["rows"] == done.json["rows"]
    refused = call(["study", "table1", "scene.zarr", "--out", "out", *QUICK], scene)
    refused.one_sentence(2, "out is not empty", "--resume")


@pytest.mark.parametrize(("jobs", "number"), [("1", signal.SIGTERM), ("2", signal.SIGINT)])
def test_an_interrupted_study_goes_on(
    interrupt: Callable[..., Stopped], call: Call, scene: Path, jobs: str, number: int
) -> None:
    rows = ["--recipe", "paper", *tiny("flc.epochs=60"), "--shots", "2", "--seeds", "30", "--out", "out"]
    stopped = interrupt(
        ["study", "table4", "scene.zarr", *rows, "--jobs", jobs], scene, r"table4 .*[1-9]\d*/180", number
    )
    assert stopped.code == 128 + number, stopped.end
    assert stopped.seconds < 30.0 and "Traceback" not in stopped.end and leftovers(scene) == []
    assert re.search(r"table4 was (interrupted|terminated); continue with --resume --out out", stopped.end)
    found = len((scene / "out" / "draws.jsonl").read_text().splitlines()) - 1
    assert 0 < found < 180 and not (scene / "out" / "table4.md").exists()
    rows[rows.index("30")] = "1"
    ended = call(["study", "table4", "scene.zarr", *rows, "--jobs", "1", "--resume", "--json"], scene)
    assert ended.code == 0 and ended.json["pretrainings"] == 0 and ended.json["computed"] < 6


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["tabel3"], 2, ["no study 'tabel3'", "did you mean 'table3'?", "fig5"]),
        (["table6", "scene.zarr"], 2, ["table6 is about exams", "scene.zarr is a landscape"]),
        (["table1", "scene.zarr", "--resume"], 2, ["--out DIR"]),
        (["table1", "scene.zarr", "--shots", "two"], 2, ["whole number", "two"]),
        (["table1", "scene.zarr", "--shots", "4000"], 3, ["too few valid labelled pixels"]),
        (["table1", "scene.zarr", "--set", "umd.epoch=3"], 2, ["umd.epoch", "did you mean 'umd.epochs'?"]),
        (["table1", "scene.zarr", "--recipe", "bets"], 2, ["no recipe 'bets'", "'best'"]),
        (["table1", "scene.zarr", "--reference", "svm"], 2, ["no row 'svm'", "svm, pixel"]),
        (["table1", "scene.zarr", "--split", "official"], 2, ["train", "test"]),
        (["fig4", "none.zarr"], 3, ["none.zarr"]),
    ],
)
def test_bad_input(call: Call, scene: Path, arguments: list[str], code: int, words: list[str]) -> None:
    before = sorted(path.name for path in scene.iterdir())
    call(["study", *arguments], scene).one_sentence(code, *words)
    assert {path.name for path in scene.iterdir()} - set(before) <= {"runs"}
