"""Small files laid out as the data sets of the paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.ingest import IngestReport
from fastdiffclip.scene.presets import ingest_preset
from fastdiffclip.scene.store import Scene, open_scene

RNG = np.random.default_rng(5)


def mat(path: Path, **variables: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, variables)


def run(name: str, folder: Path, **options: object) -> tuple[Scene, IngestReport]:
    report = ingest_preset(name, folder, folder.parent / f"{folder.name}-out.zarr", **options)  # type: ignore[arg-type]
    return open_scene(report.scenes[0]), report


def refused(name: str, folder: Path) -> str:
    with pytest.raises(InputDataError) as raised:
        ingest_preset(name, folder, folder.parent / "none.zarr")
    assert "\n" not in str(raised.value) and not [path for path in folder.parent.glob("*none.zarr*")]
    return str(raised.value)
