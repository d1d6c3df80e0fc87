"""Device, precision, threads, and signals that wait for a step to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiffclip
from fastdiffclip import runtime
from fastdiffclip.errors import (
    FastDiffCLIPError,
    InputDataError,
    InterruptedRunError,
    ResourceError,
    UsageError,
    nearest,
)
from fastdiffclip.runtime import Compute, deferred_signals

CPU = torch.device("cpu")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.resolve_device("auto") == CPU == runtime.resolve_device("cpu")
    with pytest.raises(ResourceError, match="no CUDA device"):
        runtime.resolve_device("cuda")
    for name in ("gpu", "mps", "meta", "cuda:x"):
        with pytest.raises(UsageError, match="device"):
            runtime.resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert runtime.resolve_device("auto").type == "cuda"
    assert runtime.resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ResourceError, match="finds 1 CUDA"):
        runtime.resolve_device("cuda:1")


@pytest.mark.parametrize("has", [True, False])
def test_precision(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: has)
    assert runtime.resolve_precision("auto", CPU) == (torch.bfloat16 if has else torch.float32)
    assert runtime.resolve_precision("fp32", CPU) == torch.float32
    assert runtime.resolve_precision("bf16", CPU) == torch.bfloat16


def test_autocast_touches_products_only() -> None:
    a = torch.ones(2, 2)
    for precision in (torch.float32, torch.bfloat16):
        with Compute(CPU, precision).autocast():
            assert (a @ a).dtype == precision
            assert (a + a).dtype == torch.float32


def test_micro_batches() -> None:
    cpu, cuda = Compute(CPU, torch.float32), Compute(torch.device("cuda"), torch.float32)
    assert (cpu.micro_batch(0, 256), cpu.micro_batch(0, 5), cpu.micro_batch(8, 256)) == (runtime.CPU_MICRO_BATCH, 5, 8)
    assert (cuda.micro_batch(0, 256), cuda.micro_batch(300, 256)) == (256, 256)


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert runtime.set_threads(1) == 1 == torch.get_num_threads()
        assert runtime.set_threads(0) == len(os.sched_getaffinity(0)) == torch.get_num_threads()
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert runtime.set_threads(0) == 1 == torch.get_num_threads()
        with pytest.raises(UsageError, match="--threads"):
            runtime.set_threads(-1)
    finally:
        torch.set_num_threads(before)


GATHER = """
import numpy as np, torch
from fastdiffclip.scene.prepare import PreparedModality, pack_valid
from fastdiffclip.scene.windows import gather_backend, gather_windows
torch.set_num_threads(1)
one = np.ones(3, np.float32)
scene = PreparedModality(np.zeros((100, 3), np.float32), one, one, pack_valid(np.ones(100, bool)))
for _ in range(2):
    gather_windows(scene, np.array([[0, 10, 10]]), np.array([[0, 1, 1]]), 3)
    assert torch.get_num_threads() == 1, torch.get_num_threads()
assert gather_backend()[0] == "numba"
import numba
assert numba.get_num_threads() == 1
"""


def test_the_gather_leaves_torch_its_threads() -> None:
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", GATHER], check=True, env=environment, timeout=120)


def test_memory_budget() -> None:
    assert runtime.memory_budget(0.5) == 2**29
    assert 0 < runtime.memory_budget(0.0) < 2**50


STARTED = """
import time
from fastdiffclip import runtime
def refuse(*given, **more):
    raise FileNotFoundError
time.sleep(0.3)
print(runtime.seconds_since_start())
runtime.open = refuse  # as where there is no /proc
print(runtime.seconds_since_start())
"""


def test_seconds_since_the_process_was_started() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", STARTED], capture_output=True, text=True, timeout=60, check=True)
    elapsed = time.monotonic() - began
    first, second = (float(line) for line in done.stdout.split())
    # The system counts a start in ticks of 10 ms, psutil the time of the boot in seconds.
    assert 0.3 <= first <= elapsed + 0.02
    assert 0.0 <= second <= elapsed + 1.02


def test_what_the_machine_is() -> None:
    assert runtime.versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert runtime.machine()["cores"] >= 1


def test_a_signal_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with deferred_signals() as stop:
            stop.raise_if_set("not yet")
            os.kill(os.getpid(), number)
            with pytest.raises(InterruptedRunError, match="stopped") as raised:
                stop.raise_if_set("stopped")
        assert raised.value.exit_code == code
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), deferred_signals():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) == before


def test_signals_stay_with_the_main_thread() -> None:
    seen: list[int | None] = []

    def work() -> None:
        with deferred_signals() as stop:
            seen.append(stop.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]


SECOND = """
import os, signal, sys
from fastdiffclip.runtime import deferred_signals
with deferred_signals() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    print("went on", stop.signal, flush=True)
    os.kill(os.getpid(), signal.{second})
    print("never", flush=True)
"""


@pytest.mark.parametrize(("second", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_second_signal_ends_the_process(second: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SECOND.format(second=second)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (code, "went on 2\n")


def test_errors() -> None:
    codes = {
        error.__name__: error.exit_code for error in FastDiffCLIPError.__subclasses__() if "Run" not in error.__name__
    }
    assert codes == {"UsageError": 2, "InputDataError": 3, "ResourceError": 4}
    assert nearest("windwo", ["window", "width"]) == " (did you mean 'window'?)"
    assert nearest("zzz", ["window"]) == ""


def test_public_names() -> None:
    from fastdiffclip.evaluate.runner import evaluate

    assert fastdiffclip.open_scene.__module__ == "fastdiffclip.scene.store"
    assert {fastdiffclip.train_umd.__name__, fastdiffclip.train_flc.__name__} == {"train_umd", "train_flc"}
    assert fastdiffclip.predict.__name__ == "predict"
    for _ in range(2):  # the package of the same name is callable
        with pytest.raises(InputDataError, match="no labelled pixel"):
            fastdiffclip.evaluate([])
    assert fastdiffclip.evaluate.runner.evaluate is evaluate
    with pytest.raises(AttributeError, match="no attribute 'train_everything'"):
        _ = fastdiffclip.train_everything


def test_nothing_heavy_at_import() -> None:
    code = "import fastdiffclip, sys; print(sorted({'torch', 'zarr', 'numba', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_bf16_is_read_from_the_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for flags, expected in (("fpu avx512f avx512_bf16", True), ("fpu avx2 avx512f", False)):
        info = tmp_path / "cpuinfo"
        info.write_text(f"processor : 0\nflags\t\t: {flags}\n")
        monkeypatch.setattr("builtins.open", lambda *a, _path=info, **k: _path.open())
        assert runtime.cpu_has_bf16() is expected
    monkeypatch.undo()
    assert np.isin(runtime.cpu_has_bf16(), [True, False])
