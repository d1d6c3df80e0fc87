"""The child process that decodes untrusted files: it crashes, hangs and starves here, and the session goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import scipy.io

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers import guard, open_raster
from fastdiffclip.scene.readers.source import RasterSource

CUBE = np.random.default_rng(0).integers(0, 9999, (12, 10, 6)).astype(np.uint16)


@pytest.fixture
def cube_file(tmp_path: Path) -> Path:
    with h5py.File(tmp_path / "cube.h5", "w") as file:
        file.create_dataset("cube", data=CUBE, chunks=(4, 5, 3), compression="gzip")
    return tmp_path / "cube.h5"


@pytest.fixture(autouse=True)
def fresh_child() -> Iterator[None]:
    """Tests that lower a limit or stop the child leave none behind."""
    yield
    guard.stop()


def whole(source: RasterSource) -> np.ndarray:
    return source.read_rows(slice(0, source.height))


def child_pid() -> int:
    pid = guard.process_id()
    assert pid is not None
    return pid


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_one_child_serves_several_files_and_formats(tmp_path: Path, cube_file: Path) -> None:
    scipy.io.savemat(tmp_path / "x.mat", {"cube": CUBE})
    with open_raster(cube_file) as one, open_raster(tmp_path / "x.mat") as other:
        first = child_pid()
        np.testing.assert_array_equal(whole(one), whole(other))
    with open_raster(cube_file) as again:
        np.testing.assert_array_equal(whole(again), CUBE)
    assert child_pid() == first


def test_a_killed_child_is_replaced_and_the_open_file_reads_on(cube_file: Path) -> None:
    with open_raster(cube_file) as source:
        before = child_pid()
        np.testing.assert_array_equal(source.read_rows(slice(0, 5)), CUBE[:5])
        os.kill(before, signal.SIGKILL)
        assert wait_until(lambda: not alive(before))
        np.testing.assert_array_equal(source.read_rows(slice(5, 12)), CUBE[5:])
        assert child_pid() != before


def test_a_child_that_dies_at_work_is_one_sentence(cube_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_raster(cube_file) as source:
        pid, converse = child_pid(), guard._converse
        os.kill(pid, signal.SIGSTOP)

        def kill_at_work(*arguments: object) -> object:
            os.kill(pid, signal.SIGSEGV)
            os.kill(pid, signal.SIGCONT)
            return converse(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(guard, "_converse", kill_at_work)
        with pytest.raises(InputDataError, match=r"cube\.h5:/cube cannot be read .* signal SIGSEGV.* copy it again"):
            whole(source)
        monkeypatch.undo()
        np.testing.assert_array_equal(whole(source), CUBE)


def test_a_child_that_hangs_is_stopped(cube_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_raster(cube_file) as source:
        pid = child_pid()
        os.kill(pid, signal.SIGSTOP)
        monkeypatch.setattr(guard, "DATA_TIME_S", 0.3)
        with pytest.raises(InputDataError, match=r"cube\.h5:/cube could not be read .* within 0\.3 s.* convert it"):
            whole(source)
        assert not alive(pid)
        monkeypatch.undo()
        np.testing.assert_array_equal(whole(source), CUBE)


def test_a_header_that_hangs_is_stopped_sooner(cube_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_raster(cube_file).close()
    os.kill(child_pid(), signal.SIGSTOP)
    monkeypatch.setattr(guard, "HEADER_TIME_S", 0.3)
    with pytest.raises(InputDataError, match=r"cube\.h5 could not be read .* within 0\.3 s"):
        open_raster(cube_file)


def test_a_file_that_eats_memory_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scipy.io.savemat(tmp_path / "x.mat", {"cube": np.zeros((500, 500, 100), np.uint16)}, do_compression=True)
    scipy.io.savemat(tmp_path / "small.mat", {"cube": CUBE})
    monkeypatch.setattr(guard, "MEMORY_LIMIT", 100 * 2**20)
    with pytest.raises(InputDataError, match=r"x\.mat cannot be read .* within 100 MiB of memory.*convert"):
        open_raster(tmp_path / "x.mat")
    with open_raster(tmp_path / "small.mat") as source:
        np.testing.assert_array_equal(whole(source), CUBE)
    monkeypatch.undo()
    with open_raster(tmp_path / "x.mat") as source:  # the limit was what stopped it
        assert source.bands == 100


def test_a_block_is_all_that_a_large_array_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """240 MB within 150 MiB, 60 of which the libraries take, in chunks as tall as the array."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        cube = file.create_dataset("cube", (600, 400, 250), "f4", chunks=(600, 10, 10), compression="lzf")
        for x, band in ((0, 0), (390, 240)):
            cube[:, x : x + 10, band : band + 10] = np.arange(600)[:, None, None]
    monkeypatch.setattr(guard, "MEMORY_LIMIT", 150 * 2**20)
    with open_raster(tmp_path / "x.h5") as source:
        for start in (0, 40, 80, 560):
            block = source.read_rows(slice(start, start + 40))
            for pixel in (block[:, 7, 0], block[:, 399, 249]):
                np.testing.assert_array_equal(pixel, np.arange(start, start + 40))
            assert block[:, 10:390].max() == 0


def test_threads_take_turns(tmp_path: Path, cube_file: Path) -> None:
    scipy.io.savemat(tmp_path / "x.mat", {"cube": CUBE})

    def read(number: int) -> bool:
        with open_raster(cube_file if number % 2 else tmp_path / "x.mat") as source:
            return all(np.array_equal(source.read_rows(slice(r, r + 3)), CUBE[r : r + 3]) for r in range(0, 12, 3))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(12)))


def test_an_interrupt_leaves_no_half_read_answer(cube_file: Path) -> None:
    with open_raster(cube_file) as source:
        os.kill(child_pid(), signal.SIGSTOP)
        previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                whole(source)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, previous)
        np.testing.assert_array_equal(whole(source), CUBE)


def run_script(code: str, file: Path) -> subprocess.Popen[str]:
    setup = (
        "import os, sys, time, signal\nfrom pathlib import Path\n"
        "from fastdiffclip.scene.readers import guard, open_raster\nsource = open_raster(Path(sys.argv[1]))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", setup + code, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("stopped", [False, True])
def test_the_child_dies_with_a_killed_parent(cube_file: Path, stopped: bool) -> None:
    hang = "os.kill(guard.process_id(), signal.SIGSTOP)\n" if stopped else ""
    with run_script(hang + "print(guard.process_id(), flush=True)\ntime.sleep(60)", cube_file) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.kill()
    assert wait_until(lambda: not alive(child))


def test_no_child_outlives_a_session_that_ends(cube_file: Path) -> None:
    with run_script("print(guard.process_id())", cube_file) as parent:
        out, err = parent.communicate(timeout=60)
    assert parent.returncode == 0 and err == ""
    assert wait_until(lambda: not alive(int(out)))


def test_a_fork_makes_a_child_of_its_own(cube_file: Path) -> None:
    code = """
first = guard.process_id()
pid = os.fork()
rows = source.read_rows(slice(0, 12))
print(rows.sum(), guard.process_id() == first, flush=True)
if pid:
    os.waitpid(pid, 0)
    print(source.read_rows(slice(0, 12)).sum(), guard.process_id() == first)
"""
    with run_script(code, cube_file) as parent:
        out, err = parent.communicate(timeout=60)
    assert parent.returncode == 0, err
    assert sorted(out.splitlines()) == sorted([f"{CUBE.sum()} {kept}" for kept in (True, False, True)])


def test_closed_standard_streams_do_no_harm(cube_file: Path) -> None:
    code = """
guard.stop()
for stream in (0, 2):
    os.close(stream)
print(source.read_rows(slice(0, 12)).sum())
"""
    with run_script(code, cube_file) as parent:
        out, _ = parent.communicate(timeout=60)
    assert out.split() == [str(CUBE.sum())]
