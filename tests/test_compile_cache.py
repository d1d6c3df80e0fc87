"""Compiled code is kept between runs, and damage to it costs time, never a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastdiffclip import compile_cache, runtime
from fastdiffclip.compile_cache import SEAL, cache_folder, checksums, drop_damaged, seal

ENTRY = {"one/code.so": b"1" * 200, "one/source.cpp": b"int x;", "two/a/graph": b"2" * 50, "two/b/graph": b"3" * 50}


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A sealed cache of four files in three entries."""
    for name, data in ENTRY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    seal(tmp_path)
    return tmp_path


def test_what_is_whole_stays(filled: Path) -> None:
    drop_damaged(filled)
    assert set(checksums(filled)) == set(ENTRY)
    assert not list(filled.glob("*.tmp"))


@pytest.mark.parametrize("damage", [b"", b"1" * 199, b"1" * 199 + b"2"], ids=["empty", "truncated", "flipped"])
def test_a_damaged_file_goes_with_its_entry(filled: Path, damage: bytes) -> None:
    (filled / "one/code.so").write_bytes(damage)
    drop_damaged(filled)
    assert set(checksums(filled)) == {"two/a/graph", "two/b/graph"}


@pytest.mark.parametrize("text", ["", '{"one/code.so": "', "[]"])
def test_a_damaged_seal_trusts_nothing(filled: Path, text: str) -> None:
    (filled / SEAL).write_text(text)
    drop_damaged(filled)
    assert list(filled.iterdir()) == []


def test_a_file_on_no_list_stays_until_the_machine_has_gone_down(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (filled / "three").mkdir()
    for name in ("code.so", "source.cpp"):
        (filled / "three" / name).write_bytes(b"new")
    drop_damaged(filled)
    assert (filled / "three/code.so").exists()
    monkeypatch.setattr(compile_cache, "_booted", lambda: time.time() + 60)
    drop_damaged(filled)
    assert set(checksums(filled)) == set(ENTRY)


def test_a_folder_is_the_users_alone_or_none(tmp_path: Path) -> None:
    folder = cache_folder("triton", tmp_path / "new" / "base")
    assert folder is not None and folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("no folder")
    assert cache_folder("triton", tmp_path / "file") is None


def test_a_user_without_a_home_and_a_name_has_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with ``--user 12345``."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder("triton") is None and os.listdir(tmp_path) == []


def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache is named, and what the test names is forgotten after it."""
    for name in compile_cache.CACHES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_folders_are_set_unless_the_user_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = []
    monkeypatch.setattr("atexit.register", lambda call, *given: registered.append((call, *given)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    unset(monkeypatch)
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    for _ in range(2):
        compile_cache.keep_compiled_code()
    folder = tmp_path / "fastdiffclip" / "inductor"
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert registered == [(seal, folder)]


def test_without_a_folder_that_can_be_written_the_compilers_keep_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    unset(monkeypatch)
    compile_cache.keep_compiled_code()
    assert not set(compile_cache.CACHES) & set(os.environ)


@pytest.mark.parametrize(("compile", "kept"), [("on", True), ("auto", False), ("off", False)])
def test_a_run_that_compiles_keeps_what_it_compiles(compile: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(runtime, "keep_compiled_code", lambda: called.append(True))
    runtime.Compute.choose("cpu", compile=compile)
    assert bool(called) is kept


# Compiled for a GPU that need not be there; the second run finds it, the third finds it damaged.
COMPILE = """
from fastdiffclip.compile_cache import keep_compiled_code
keep_compiled_code()
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernel import add_one
source = ASTSource(add_one, {"x": "*fp32", "n": "constexpr"}, {(1,): 64})
print(len(triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]))
"""
KERNEL = """
import triton, triton.language as tl
@triton.jit
def add_one(x, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(x + i, tl.load(x + i) + 1)
"""


def test_triton_finds_its_code_again_and_survives_damage(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "kernel.py").write_text(KERNEL)
    ours = (*compile_cache.CACHES, "TRITON_INTERPRET")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}

    def compiled() -> tuple[str, dict[str, int]]:
        done = subprocess.run(
            [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        folder = tmp_path / "cache" / "fastdiffclip" / "triton"
        known = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        assert known == checksums(folder)
        return done.stdout, {name: (folder / name).stat().st_mtime_ns for name in known}

    first, second = compiled(), compiled()
    assert first == second and int(first[0]) > 0
    for suffix in (".json", ".cubin"):
        (damaged,) = (tmp_path / "cache").rglob(f"add_one{suffix}")
        damaged.write_bytes(damaged.read_bytes()[:100])
        again = compiled()
        assert again[0] == first[0] and set(again[1]) == set(first[1])
        assert all(again[1][name] > first[1][name] for name in first[1])


INDUCTOR = """
from fastdiffclip.compile_cache import keep_compiled_code
keep_compiled_code()
import torch
twice = torch.compile(lambda x: x.sin() * 2 + 1)
print(twice(torch.arange(8.0)).tolist())
"""


def test_torch_compile_survives_damage(tmp_path: Path) -> None:
    """Every file is cut short: graphs, sources, machine code."""
    environment = {key: value for key, value in os.environ.items() if key not in compile_cache.CACHES}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", INDUCTOR], capture_output=True, text=True, env=environment, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout)
        files = [path for path in (tmp_path / "fastdiffclip" / "inductor").rglob("*") if path.is_file()]
        assert {".so", ".cpp", ".py"} <= {path.suffix for path in files}
        for path in files:
            if path.name != SEAL:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert said[0] == said[1]
