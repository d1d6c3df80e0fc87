"""Every Triton kernel compiled for GPUs that are not here, and what it takes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiffclip.bench import offline

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "triton"


def test_every_kernel_file_is_compiled() -> None:
    """Whoever adds an op finds it in the table, or this fails."""
    files = {path.stem for path in KERNELS.glob("*.py") if "def offline_cases" in path.read_text(encoding="utf-8")}
    assert files == set(offline.OPS)


@pytest.mark.parametrize("op", offline.OPS)
def test_kernels_fit_the_gpus(op: str) -> None:
    """In a process without the interpreter, which leaves nothing to compile."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastdiffclip.bench.offline", op]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith(f"| {op} |")]
    assert rows and all(line.count("|") == 11 for line in rows)
    print(done.stdout)


def test_what_does_not_fit_is_named() -> None:
    rows = [
        offline.Usage("op", "a case", "kernel", arch, 255, spilled, 1024, 128, "")
        for arch, spilled in ((80, 0), (90, 48))
    ]
    table = offline.table(rows).splitlines()
    assert len(table) == 3 and table[2] == "| op | a case | kernel | 128 | 255 | 0 | 1024 | 255 | 48 | 1024 |"
