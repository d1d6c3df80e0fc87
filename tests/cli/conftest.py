"""Small files as a user has them, and two ways to run a command: as a process of its own, and in this one."""

from __future__ import annotations

import logging
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from .console import (
    BANDS,
    FULL,
    HEIGHT,
    WIDTH,
    WORDS,
    Result,
    Stopped,
    default_signals,
    program,
    read_terminal,
)


@pytest.fixture(scope="session")
def real() -> Callable[..., Result]:
    """Run the command as users do, in a process of its own."""

    def run(arguments: Sequence[str], folder: Path, program: Sequence[str] = tuple(program())) -> Result:
        done = subprocess.run(
            [*program, *arguments], cwd=folder, capture_output=True, text=True, timeout=240, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Run the command in this process, which has the heavy libraries already."""
    from fastdiffclip.cli import app
    from fastdiffclip.commands import process

    def run(arguments: Sequence[str], folder: Path) -> Result:
        monkeypatch.chdir(folder)
        capsys.readouterr()
        code = process.run(app, [str(part) for part in arguments])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    yield run
    logging.captureWarnings(False)
    for name in ("fastdiffclip", "py.warnings"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture
def interrupt() -> Callable[..., Stopped]:
    """Start a command with a terminal as stderr, wait until that shows a text, send a signal."""

    def run(arguments: Sequence[str], folder: Path, when: str, number: int = signal.SIGINT) -> Stopped:
        mine, theirs = pty.openpty()
        child = subprocess.Popen(
            [*program(), *arguments], cwd=folder, stdout=subprocess.DEVNULL, stderr=theirs,
            preexec_fn=default_signals,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
        )  # fmt: skip
        os.close(theirs)
        seen, end, sent = "", "", 0.0
        try:
            while chunk := read_terminal(mine):
                if sent:
                    end += chunk
                    continue
                seen += chunk
                if re.search(when, WORDS.sub("", seen)):
                    child.send_signal(number)
                    sent = time.monotonic()
            code = child.wait(timeout=60)
        finally:
            child.kill()
            child.wait()
            os.close(mine)
        assert sent, f"the terminal never showed {when!r}: {WORDS.sub('', seen)[-500:]}"
        return Stopped(code, WORDS.sub("", seen), WORDS.sub("", end), time.monotonic() - sent)

    return run


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cube.mat (HSI), cube.npy, dsm.tif (georeferenced), gt.mat (gt), gt.npy, classes.csv: three classes in strips."""
    import rasterio
    from affine import Affine
    from scipy.io import savemat

    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    true = np.repeat(np.arange(HEIGHT) // 10, WIDTH).reshape(HEIGHT, WIDTH)
    spectra = rng.uniform(500, 4000, (3, BANDS))
    cube = (spectra[true] + rng.normal(0, 60, (HEIGHT, WIDTH, BANDS))).astype(np.uint16)
    heights = (true * 3 + rng.normal(0, 0.3, (HEIGHT, WIDTH))).astype(np.float32)
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    for strip in range(3):
        for col in (1, 14, 28):
            labels[strip * 10 + 3 : strip * 10 + 7, col : col + 4] = strip + 1
    np.save(folder / "cube.npy", cube)
    np.save(folder / "gt.npy", labels)
    savemat(folder / "cube.mat", {"HSI": cube, "other": np.zeros((3, 3))})
    savemat(folder / "gt.mat", {"gt": labels})
    (folder / "classes.csv").write_text("value,name,description\n1,grass,short grass\n2,road,asphalt\n3,roof,tiles\n")
    profile = {"driver": "GTiff", "height": HEIGHT, "width": WIDTH, "count": 1, "dtype": "float32"}
    with rasterio.open(
        folder / "dsm.tif", "w", crs="EPSG:32615", transform=Affine(2, 0, 3e5, 0, -2, 4e6), **profile
    ) as raster:
        raster.write(heights, 1)
    return folder


@pytest.fixture
def files(source: Path, tmp_path: Path) -> Path:
    """A folder of its own with the files of ``source``."""
    folder = tmp_path / "files"
    shutil.copytree(source, folder)
    return folder


@pytest.fixture(scope="session")
def ingested(source: Path, tmp_path_factory: pytest.TempPathFactory, real: Callable[..., Result]) -> Path:
    """A folder with scene.zarr, made by the real command; not to be changed."""
    folder = tmp_path_factory.mktemp("ingested") / "files"
    shutil.copytree(source, folder)
    assert real(FULL, folder).code == 0
    return folder


@pytest.fixture
def scene(ingested: Path, tmp_path: Path) -> Path:
    """A folder of its own with scene.zarr and the files it was made from."""
    folder = tmp_path / "work"
    shutil.copytree(ingested, folder)
    return folder
