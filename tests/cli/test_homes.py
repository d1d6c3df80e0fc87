"""A home that is missing, elsewhere or read-only, and caches that were cut short: a run takes longer, and goes on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdiffclip import checkpoint, compile_cache

from .console import Result, contrastive, program
from .disks import small_disk

Call = Callable[..., Result]
FLC = ["train-flc", "scene.zarr", "--umd", "none", *contrastive("flc.batch=4")]
OURS = ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "TRITON_INTERPRET", *compile_cache.CACHES)


def without_home(**given: str) -> dict[str, str]:
    """The environment of a user, of whom nothing but ``given`` says where things are kept."""
    return {key: value for key, value in os.environ.items() if key not in OURS} | given


def started(scene: Path, environment: dict[str, str], command: list[str]) -> Result:
    """The command as a process with that environment alone."""
    done = subprocess.run(
        [*program(), *command], cwd=scene, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def expected(call: Call, scene: Path) -> bytes:
    """The model that a run with a home gives."""
    assert call([*FLC, "--out", "whole"], scene).code == 0
    return (scene / "whole" / checkpoint.MODEL).read_bytes()


@pytest.mark.parametrize("given", [{}, {"HOME": "/nonexistent/home"}], ids=["no HOME", "HOME nowhere"])
def test_without_a_home(scene: Path, expected: bytes, given: dict[str, str]) -> None:
    if not given:  # the system knows one by the user's number: nothing may be written there by a test
        given = {"XDG_CACHE_HOME": str(scene / "cache")}
    before = set(os.listdir(scene))
    done = started(scene, without_home(**given), [*FLC, "--out", "run"])
    assert done.code == 0 and done.err == "", done.err
    assert set(os.listdir(scene)) - before <= {"run", "cache"}
    assert (scene / "run" / checkpoint.MODEL).read_bytes() == expected


def test_a_home_that_is_read_only(scene: Path, expected: bytes) -> None:
    """A folder for caches is there, and nothing can be put into it."""
    with small_disk(scene / "home", "size=8m") as disk:
        (disk.root / ".cache" / "fastdiffclip" / "numba").mkdir(parents=True)
        disk.read_only()
        done = disk.run([*program(), *FLC, "--out", "run"], scene, without_home(HOME=str(disk.place)))
        assert done.code == 0 and done.err == "", done.err
        assert (scene / "run" / checkpoint.MODEL).read_bytes() == expected


def test_a_cache_of_numba_that_was_cut_short(scene: Path, expected: bytes) -> None:
    """Seal and all; what torch.compile and Triton keep is in tests/test_compile_cache.py."""
    cache = scene / "cache" / "fastdiffclip" / "numba"
    for name in ("first", "second"):
        done = started(scene, without_home(XDG_CACHE_HOME=str(scene / "cache")), [*FLC, "--out", name])
        assert done.code == 0 and done.err == "", done.err
        assert (scene / name / checkpoint.MODEL).read_bytes() == expected
        files = [path for path in cache.rglob("*") if path.is_file()]
        assert {".nbi", ".nbc", ".json"} <= {path.suffix for path in files}
        for path in files:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
