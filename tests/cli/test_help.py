"""Help is quick, light, and shows how a command is used."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMANDS = [
    [], ["demo"], ["ingest"], ["scene"], ["scene", "info"], ["scene", "verify"], ["train-umd"], ["train-flc"],
    ["predict"], ["suggest"], ["add-class"], ["evaluate"], ["study"], ["bench"], ["doctor"],
]  # fmt: skip
# Not pydantic: typer itself reads arguments with it, and it takes a twentieth of a second.
HEAVY = {"torch", "numpy", "rasterio", "numba", "sklearn", "scipy", "zarr", "matplotlib", "triton", "tokenizers"}
ALL_HELP = f"""
import sys
from fastdiffclip.cli import app
from fastdiffclip.commands import process
for command in {COMMANDS!r}:
    assert process.run(app, [*command, "--help"]) == 0
found = {HEAVY!r} & set(sys.modules)
sys.exit(f"help imports {{sorted(found)}}" if found else 0)
"""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_usage_options_and_examples(
    command: list[str], call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = call([*command, "--help"], tmp_path)
    assert result.code == 0 and result.err == ""
    assert "Usage:" in result.out and "--help" in result.out
    assert "Examples" in result.out and f"$ fastdiffclip {' '.join(command)}".rstrip() in result.out
    assert "<bool>" not in result.out and "<str>" not in result.out
    assert max(map(len, result.out.splitlines())) <= 80


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ALL_HELP], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_takes_less_than_half_a_second(real: Callable[..., Any], tmp_path: Path) -> None:
    real(["--version"], tmp_path)  # byte code is compiled once per installation
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert real(["train-flc", "--help"], tmp_path).code == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Time of the processor: what the command takes by itself, whatever else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_version(real: Callable[..., Any], tmp_path: Path) -> None:
    from fastdiffclip import __version__

    assert real(["--version"], tmp_path).out == f"fastdiffclip {__version__}\n"
    by_module = real(["--version"], tmp_path, [sys.executable, "-m", "fastdiffclip"])
    assert by_module.out == f"fastdiffclip {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["scene"]])
def test_a_command_that_is_missing_shows_what_there_is(
    arguments: list[str], call: Callable[..., Any], tmp_path: Path
) -> None:
    result = call(arguments, tmp_path)
    assert result.code == 2 and result.err == "" and "Commands" in result.out
