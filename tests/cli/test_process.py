"""From exceptions to exit codes, from results to strict JSON, and what a terminal sees that a pipe does not."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from fastdiffclip.commands import process, terminal, views
from fastdiffclip.errors import InputDataError, InterruptedRunError, ResourceError

from .console import WORDS, program


def app_that_raises(error: BaseException) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    def work() -> None:
        raise error

    return app


OUTCOMES: list[tuple[BaseException, int, str]] = [
    (InputDataError("the file is odd"), 3, "error: the file is odd"),
    (ResourceError("the disk is small"), 4, "error: the disk is small"),
    (InterruptedRunError("stopped at step 3", 143), 143, "stopped at step 3"),
    (KeyboardInterrupt(), 130, "interrupted; nothing was left half-written"),
    (process.Signalled(signal.SIGTERM), 143, "terminated; nothing was left half-written"),
    (MemoryError(), 4, "error: there is not enough memory"),
    (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        4,
        "error: there is not enough",
    ),
    (OSError(errno.ENOSPC, "No space left on device", "map.tif"), 4, "error: the disk is full: map.tif"),
    (PermissionError(errno.EACCES, "Permission denied", "map.tif"), 4, "error: Permission denied: map.tif"),
    (ZeroDivisionError("division by zero"), 1, "fault of fastdiffclip itself: ZeroDivisionError: division by zero"),
]


@pytest.mark.parametrize(("error", "code", "sentence"), OUTCOMES, ids=[type(item[0]).__name__ for item in OUTCOMES])
def test_every_error_ends_in_one_sentence_and_its_code(
    error: BaseException, code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert process.run(app_that_raises(error), []) == code
    err = capsys.readouterr().err
    assert sentence in err and len(err.splitlines()) == 1


def test_debug_adds_the_stack_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert process.run(app_that_raises(ZeroDivisionError("division by zero")), ["--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("resumable", [True, False])
def test_an_interrupted_run_says_what_it_left(resumable: bool, tmp_path: Path) -> None:
    empty, full = tmp_path / "runs" / "empty", tmp_path / "full"
    with pytest.raises(InterruptedRunError, match="terminated; nothing was left") as caught:  # noqa: SIM117
        with process.keeping("train-umd", empty, resumable):
            empty.mkdir(parents=True)
            raise process.Signalled(signal.SIGTERM)
    assert caught.value.exit_code == 143
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InterruptedRunError, match=f"--resume --out {full}" if resumable else f"lies in {full}"):  # noqa: SIM117
        with process.keeping("train-umd", full, resumable):
            full.mkdir()
            (full / "part").write_text("")
            raise KeyboardInterrupt
    assert (full / "part").exists()


@pytest.mark.parametrize(
    ("resumable", "end"), [(True, ", then continue with --resume --out "), (False, "; what was finished lies in ")]
)
def test_how_to_go_on_is_said_of_the_command_and_not_of_its_stage(resumable: bool, end: str, tmp_path: Path) -> None:
    full = f"the disk is full, then continue with --resume --out {tmp_path / 'umd'}"
    for said, expected in ((full, f"the disk is full{end}{tmp_path}"), ("the disk is full", "the disk is full")):
        with pytest.raises(ResourceError) as caught, process.keeping("evaluate", tmp_path, resumable):
            raise ResourceError(said)
        assert str(caught.value) == expected


def test_a_failed_run_leaves_no_empty_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "scene" / "umd"
    with pytest.raises(InputDataError), process.keeping("train-umd", folder):
        folder.mkdir(parents=True)
        raise InputDataError("no")
    assert list(tmp_path.iterdir()) == []


def test_json_is_strict_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say_json(
        {"nan": float("nan"), "inf": np.float32("inf"), "n": np.int64(3), "path": Path("a/b"), 5: (1, np.float32(0.5))}
    )
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"nan": None, "inf": None, "n": 3, "path": "a/b", "5": [1, 0.5]}


def test_names_with_brackets_stand_in_tables_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table("Classes [all]", ["name", "[n]"], [["[red] roof", "1"], [":house:", "2"]])
    out = capsys.readouterr().out
    assert "Classes [all]" in out and "[red] roof" in out and ":house:" in out and "[n]" in out


def test_classes_that_were_split_alike_share_a_line() -> None:
    report = [
        "Training and test windows of a random split overlap: its figures are too high.",
        "'grass': separated by connected component (3 for training, 4 for test); 2 training and 30 test pixels.",
        "'road; (old)': separated by connected component (1 for training, 1 for test); 2 training and 12 test pixels.",
        "'roof': separated by blocks of rows with a gap of 4 pixels; 2 training and 5 test pixels.",
        "'water': separated by scene (1 for training, 1 for test); 2 training and 0 test pixels: nothing is left.",
    ]
    assert views.condensed(report) == [
        report[0],
        report[4],
        "2 classes: separated by connected component; 4 training and 42 test pixels.",
        "1 class: separated by blocks of rows with a gap of 4 pixels; 2 training and 5 test pixels.",
    ]


def test_sizes_are_readable() -> None:
    assert [terminal.size(n) for n in (0, 1023, 1536, 3 * 2**20, 2**31)] == [
        "0 bytes", "1023 bytes", "1.5 KiB", "3.0 MiB", "2.0 GiB",
    ]  # fmt: skip


def test_no_progress_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress_bars() as progress:
        progress("work", 1, 2, "note")
        progress("work", 2, 2, "note")
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_leaves_early_is_no_error(ingested: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*program(), "scene", "info", "scene.zarr"], cwd=ingested, stdout=write, stderr=subprocess.PIPE, text=True,
        check=False,
    )  # fmt: skip
    os.close(write)
    assert done.returncode == 128 + signal.SIGPIPE and done.stderr == ""


def test_optional_packages_may_be_absent(real: Callable[..., Any], tmp_path: Path) -> None:
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in ("xformers", "deepspeed", "triton", "numba"))
    starter = tmp_path / "without.py"
    starter.write_text(f"import sys; {blocked}\nfrom fastdiffclip.cli import main\nmain()\n")
    result = real(["doctor", "--json"], tmp_path, [sys.executable, str(starter)])
    assert result.code == 0, result.err
    assert result.json["window_gather"]["backend"] == "numpy"
    assert "numba" in result.json["window_gather"]["reason"]


def test_doctor_says_what_is_used_and_why(call: Callable[..., Any], tmp_path: Path) -> None:
    result = call(["doctor", "--json"], tmp_path)
    assert result.code == 0 and result.err == ""
    found = result.json
    assert set(found["kernels"]) >= {"visible_noise", "masked_mse", "contrastive", "short_attention"}
    assert all(states["reference"] == "ok" for states in found["kernels"].values())
    assert (
        found["machine"]["cores"] >= 1 and found["versions"]["torch"] and found["precision"] in ("float32", "bfloat16")
    )
    for word in ("Machine", "What runs", "Ops", "Versions", "window gather", "native library", found["device"]):
        assert word in result.out


COLUMNS = ["shots", "method", "features", "OA %", "AA %", "kappa", "ECE %", "AUC %"]
ROW = ["20", "fastdiffclip", "window", *["100.0 ± 10.0"] * 4, "none"]


@pytest.mark.parametrize(
    ("columns", "tables", "gap"), [(101, 1, 3), (100, 1, 2), (87, 1, 1), (86, 2, 1), (45, 5, 2), (30, 1, 1)]
)
def test_a_table_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, tables: int, gap: int) -> None:
    """Blanks between columns go first, then columns stand in a table below, with the first ones again."""
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True)
    monkeypatch.setattr(terminal.sys, "stdout", shown)
    monkeypatch.setattr(terminal.shutil, "get_terminal_size", lambda: os.terminal_size((columns, 40)))
    terminal.table("Title", COLUMNS, [ROW] * 2, right=3)
    text = WORDS.sub("", shown.getvalue())
    lines = text.splitlines()
    assert max(map(len, lines)) <= columns
    heads = [line.split() for line in lines if line.strip().startswith("shots")]
    if columns > 30:  # else not even the first columns fit, and cells are folded
        assert len(heads) == tables and f"  20{' ' * (3 + gap)}fastdiffclip" in text
        assert all(head[:3] == COLUMNS[:3] for head in heads)
        assert sum(text.count(name) for name in ("OA %", "AA %", "kappa", "ECE %", "AUC %")) == 5


def test_calibration_stands_in_the_table_where_a_method_has_any() -> None:
    def row(method: str, ece: float | None) -> dict[str, Any]:
        figures = {f"{name}_{part}": 50.0 for name in ("oa", "aa", "kappa") for part in ("mean", "sd")}
        return {"shots": 2, "method": method, "features": "window", **figures, "ece_mean": ece, "ece_sd": ece}

    columns, cells = views.evaluation_table([row("fastdiffclip", 3.21), row("svm", None)])
    assert columns == ["shots", "method", "features", "OA %", "AA %", "kappa", "ECE %"]
    assert [line[-1] for line in cells] == ["3.2 ± 3.2", "none"]
    assert "ECE %" not in views.evaluation_table([row("svm", None)])[0]
