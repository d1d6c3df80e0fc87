"""A command imports what it needs: the time to the first step is part of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastdiffclip.scene.store import Scene

# Of the packages that are installed: what no training step on a stored scene needs.
UNNEEDED = {
    "deepspeed", "joblib", "matplotlib", "numba", "pandas", "PIL", "rasterio", "sklearn", "tensorboard", "tokenizers",
    "triton", "xarray", "xformers", "zarr",
}  # fmt: skip
RUN = """
import sys
from fastdiffclip.cli import app
from fastdiffclip.commands import process
code = process.run(app, sys.argv[2:])
found = sorted(set(sys.argv[1].split(",")) & set(sys.modules))
sys.exit(f"imported without need: {found}" if found else code)
"""
SMALL = ["umd.epochs=1", "umd.samples=8", "umd.batch=4", "model.window=3", "model.width=16", "model.heads=2",
         "model.depth=1", "model.decoder_width=16", "model.decoder_depth=1", "prepare=standard",
         "logistic.views=[means,tokens]"]  # fmt: skip


@pytest.mark.parametrize("dry_run", [True, False])
def test_pretraining_on_a_stored_scene_imports_nothing_else(dry_run: bool, small_scene: Scene, tmp_path: Path) -> None:
    # scipy finds the components of the front end mnf; the optimiser of torch imports its compiler, triton with it.
    unneeded = UNNEEDED | {"scipy"} if dry_run else UNNEEDED - {"triton"}
    command = ["train-umd", str(small_scene.path), "--device", "cpu", "--out", str(tmp_path / "run")]
    command += [text for setting in SMALL for text in ("--set", setting)] + ["--dry-run"] * dry_run
    done = subprocess.run(
        [sys.executable, "-c", RUN, ",".join(sorted(unneeded)), *command],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists() is not dry_run
