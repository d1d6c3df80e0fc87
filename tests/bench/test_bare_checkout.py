"""Bench and GPU check run from a checkout in an environment that has torch and numpy and little else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiffclip.bench import gpu_check

ROOT = Path(__file__).resolve().parents[2]
# The child neither sees an installed fastdiffclip nor the packages that only set-up brings.
BARE = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in "pydantic typer zarr psutil rasterio matplotlib tokenizers numba".split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
sys.meta_path[:] = [Absent(), *(f for f in sys.meta_path if "kbuild" not in type(f).__name__)]
module, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BARE, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_gpu_check_rehearses_on_the_cpu_and_names_what_is_missing(tmp_path: Path) -> None:
    done = bare("bench.gpu_check", "--cpu", "--out", str(tmp_path / "check.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert found["green"] and found["suites"]["kernels"] == "done"
    assert {v["case"] for v in found["gate"]} >= {"visible_noise", "masked_mse", "contrastive", "short_attention"}
    assert sorted(found["with_triton"] + found["without_triton"]) == sorted(found["ops"])
    assert {t["verdict"] for t in found["training"]} == {"not run: the package pydantic is not installed"}
    reasons = {(s["case"], s["reason"]) for s in found["skipped"]}
    assert ("umd_step", "the package pydantic is not installed") in reasons
    assert str(ROOT) not in json.dumps(found)


def test_bench_prints_its_rows_as_json_on_the_last_line() -> None:
    done = bare("bench", "--suite", "io", "--quick", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"machine", "rows"} <= set(found)
    assert any(s["case"] == "scene_read" and "zarr is not installed" in s["reason"] for s in found["skipped"])


def test_without_a_cuda_device_the_check_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main([]) == 4
    assert "--cpu rehearses" in capsys.readouterr().err
