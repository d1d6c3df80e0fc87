"""Events are what TensorBoard itself reads back."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdiffclip.errors import ResourceError, UsageError
from fastdiffclip.tensorboard import EventLog

Read = Callable[[str], list[tuple[int, float]]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """(step, value) pairs of a name in the folder, by TensorBoard's own reader."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def scalars(name: str) -> list[tuple[int, float]]:
        events = accumulator.EventAccumulator(str(tmp_path / "events"), size_guidance={"scalars": 0}).Reload()
        return [(event.step, event.value) for event in events.Scalars(name)]

    return scalars


def test_scalars_are_read_back(tmp_path: Path, read: Read) -> None:
    log = EventLog(tmp_path / "events")
    for step in range(2000):
        log.scalar("loss", 1.0 / (step + 1), step)
    log.scalar("windows_per_s", 1234.5, 2**40)
    log.scalar("windows_per_s", math.inf, 2**40 + 1)
    log.close()
    losses = read("loss")
    assert [step for step, _ in losses] == list(range(2000))
    assert [value for _, value in losses] == pytest.approx([1.0 / (n + 1) for n in range(2000)], rel=1e-7)
    assert read("windows_per_s") == [(2**40, 1234.5), (2**40 + 1, math.inf)]


def test_a_resumed_run_goes_on_where_it_was_stopped(tmp_path: Path, read: Read) -> None:
    for first, last in ((0, 8), (5, 10)):  # stopped at 8, the checkpoint was of 5
        log = EventLog(tmp_path / "events", first)
        for step in range(first, last):
            log.scalar("loss", 100.0 * first + step, step)
        log.close()
    assert read("loss") == [(s, float(s)) for s in range(5)] + [(s, 500.0 + s) for s in range(5, 10)]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ResourceError, match="TensorBoard folder .*file.* cannot be written"):
            EventLog(folder)


def test_without_the_package_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'fastdiffclip\[log\]'"):
        EventLog(tmp_path)


def test_nothing_is_imported_before_a_log_is_asked_for() -> None:
    code = "import fastdiffclip.tensorboard, sys; print(sorted({'torch', 'tensorboard'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
