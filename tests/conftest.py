"""Fixtures of the whole suite: real scenes where they are present, a small scene to train on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real scenes, or a skip that says what to set."""
    folder = Path(os.environ.get("FASTDIFFCLIP_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "README.md").is_file():
        pytest.skip("no real scenes: FASTDIFFCLIP_REAL_DATA is unset and ../shared/data is not there")
    return folder
