"""What is installed is what the checkout holds, under the names that are promised."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
from pathlib import Path

import fastdiffclip

ROOT = Path(__file__).parents[1]


def test_version_has_one_source() -> None:
    assert importlib.metadata.version("fastdiffclip") == fastdiffclip.__version__


def test_configs_are_installed_as_data() -> None:
    installed = importlib.resources.files("fastdiffclip.configs")
    names = {str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml")}
    assert "paper.yaml" in names
    for name in names:
        assert installed.joinpath(name).read_bytes() == (ROOT / "configs" / name).read_bytes()


def test_kernels_are_found_only_inside_the_package() -> None:
    code = "import fastdiffclip.kernels; import kernels"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.search(r"ImportError: .*'fastdiffclip\.kernels'", done.stderr), done.stderr


def test_import_loads_nothing_heavy() -> None:
    code = "import fastdiffclip, sys; print(sorted({'torch', 'numpy', 'numba', 'zarr'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_command_is_installed() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="fastdiffclip")
    assert entry.value == "fastdiffclip.cli:main"


def test_constraints_cover_every_requirement() -> None:
    pinned = re.findall(r"^([A-Za-z0-9_.-]+)==[^+\s]+$", (ROOT / "constraints.txt").read_text(), flags=re.M)
    known = {name.lower().replace("_", "-") for name in pinned}
    required = importlib.metadata.requires("fastdiffclip") or []
    names = {re.split(r"[ <>=;\[!~]", line, maxsplit=1)[0].lower().replace("_", "-") for line in required}
    assert names <= known, f"constraints.txt lacks {sorted(names - known)}"
