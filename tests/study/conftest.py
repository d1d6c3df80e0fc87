"""A tiny model as overrides, and a study run on the small scene."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdiffclip.scene.store import Scene
from fastdiffclip.study.catalogue import Study, find_study
from fastdiffclip.study.job import Options
from fastdiffclip.study.runner import StudyResult, run_study

TINY = (
    "model.window=3", "model.width=16", "model.depth=1", "model.heads=2", "model.decoder_width=16",
    "model.decoder_depth=1", "model.embedding=16", "model.text_width=16", "model.text_depth=1", "model.text_heads=2",
    "umd.epochs=2", "umd.samples=40", "umd.batch=20", "flc.epochs=3", "flc.batch=8", "components=4", "precision=fp32",
    "logistic.samples=64", "logistic.views=[means,neighbours,components,pixel]",
)  # fmt: skip


@pytest.fixture
def study(small_scene: Scene, tmp_path: Path) -> Callable[..., StudyResult]:
    """Run a study on the small scene; two draws unless told otherwise."""

    def run(name: str | Study, out: str = "out", **settings: Any) -> StudyResult:
        wishes = {key: settings.pop(key) for key in list(settings) if key in Options.__dataclass_fields__}
        options = Options(**({"seeds": 2, "shots": (2,), "overrides": TINY} | wishes))
        chosen = find_study(name) if isinstance(name, str) else name
        where = {"device": "cpu", "out": tmp_path / out} | settings
        return run_study(chosen, [small_scene], options, **where)

    return run
