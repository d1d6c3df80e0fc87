"""Imports go one way: scene -> kernels -> model -> train -> infer -> evaluate -> study -> cli, and never back."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"errors", "config", "files", "heap", "locks", "runtime", "compile_cache", "__version__"}
STAGE = BASE | {"scene", "model", "kernels", "checkpoint"}
MAY_IMPORT = {
    "errors": set(), "config": {"errors", "files"}, "files": {"errors", "locks"}, "heap": set(), "locks": set(),
    "configs": set(),
    "compile_cache": set(), "runtime": {"errors", "config", "compile_cache"}, "tensorboard": {"errors"},
    "scene": BASE, "kernels": BASE, "model": BASE | {"kernels"}, "checkpoint": BASE | {"model"},
    "train": STAGE | {"tensorboard"}, "infer": STAGE, "evaluate": BASE | {"scene", "train", "infer"},
    "study": BASE | {"scene", "model", "train", "infer", "evaluate"},
}  # fmt: skip


def parts_imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write imports of ours out in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("fastdiffclip."))


@pytest.mark.parametrize("folder", ["fastdiffclip", "kernels", "configs"])
def test_imports_go_one_way(folder: str) -> None:
    for file in sorted((ROOT / folder).rglob("*.py")):
        inside = file.relative_to(ROOT / folder).parts[0].removesuffix(".py")
        part = inside if folder == "fastdiffclip" else folder
        found = set(parts_imported(file)) - {part}
        # What the table does not name is the command line's: it may know all, but bench only in cli.py.
        wrong = found - MAY_IMPORT.get(part, found - {"bench"} if part != "cli" else found)
        assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}, which {part} must not know"
