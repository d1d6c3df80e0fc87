"""Device, precision, threads and determinism of a run, and what the machine is."""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdiffclip.compile_cache import keep_compiled_code
from fastdiffclip.errors import InterruptedRunError, ResourceError, UsageError

if TYPE_CHECKING:
    import torch

CPU_MICRO_BATCH = 32
COMPILER = "inductor"
PACKAGES = (
    "torch", "triton", "xformers", "deepspeed", "numba", "zarr", "numcodecs", "typer", "rasterio", "scikit-learn",
    "tokenizers", "safetensors", "numpy",
)  # fmt: skip


def resolve_device(name: str = "auto") -> torch.device:
    """``auto`` takes CUDA when it is there. Raises :class:`UsageError` or :class:`ResourceError`."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and os.environ.get("LOCAL_RANK"):  # one of several processes, each with its own
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"there is no device {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"fastdiffclip does not run on the device {name!r}; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(f"the device {name!r} was asked for, but torch finds no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(f"there is no device {name!r}; torch finds {torch.cuda.device_count()} CUDA devices")
    return device


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return False
    return any(flag in flags.split() for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: bfloat16 where the processor has it, float32 otherwise and on request."""
    import torch

    if name == "fp32":
        return torch.float32
    if name == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


@dataclass(frozen=True)
class Compute:
    """Where a run computes, and in which precision its matrix products are taken."""

    device: torch.device
    precision: torch.dtype
    compile: bool = False

    @classmethod
    def choose(cls, device: str = "auto", precision: str = "auto", compile: str = "auto") -> Compute:
        """See :func:`resolve_device` and :func:`resolve_precision`; ``compile`` is auto, on or off.

        On a CPU the compiler gains this model nothing over eager code (bench/NOTES.md) and takes a minute to start.
        """
        where = resolve_device(device)
        on = compile == "on" or (compile == "auto" and where.type == "cuda")
        if on or where.type == "cuda":  # Triton compiles there in any case
            keep_compiled_code()
        return cls(where, resolve_precision(precision, where), on)

    def compile_module(self, module: Any) -> None:
        """Let the module's forward be compiled, as one graph of static shapes, where that pays."""
        if self.compile:
            module.compile(fullgraph=True, dynamic=False, backend=COMPILER)

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in bfloat16 when that is the precision; weights and sums stay float32."""
        import torch

        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def micro_batch(self, requested: int, batch: int) -> int:
        """Windows per forward pass: ``requested``, or cache-sized on a CPU and the whole batch on a GPU when 0."""
        return min(batch, requested or (CPU_MICRO_BATCH if self.device.type == "cpu" else batch))


def set_threads(count: int) -> int:
    """Use ``count`` threads in torch and numba; returns the number.

    0 takes ``OMP_NUM_THREADS`` where that is set, else as many as this process may run on.
    """
    import torch

    if count < 0:
        raise UsageError(f"--threads must be 0 or more; got {count}")
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    count = count or (int(wanted) if wanted.isdecimal() else 0) or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    if "numba" not in sys.modules:
        os.environ["NUMBA_NUM_THREADS"] = str(count)
    return count


def be_deterministic() -> None:
    """Let torch take only operations that give the same bytes every time; has to come before CUDA is used."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def seconds_since_start() -> float:
    """Seconds since this process was started, imports included."""
    with suppress(AttributeError, OSError, ValueError, IndexError):  # no Linux: psutil knows
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        # Both count from boot. psutil adds the time of the boot, which Linux tells in whole seconds.
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    import psutil

    return max(0.0, time.time() - psutil.Process().create_time())


def memory_budget(gib: float) -> int:
    """Bytes that scenes may take: ``gib``, or half of what is free when 0."""
    if gib > 0:
        return int(gib * 2**30)
    import psutil

    return int(psutil.virtual_memory().available // 2)


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter, ``"absent"`` where one is missing."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def machine() -> dict[str, Any]:
    """What this machine is, JSON-able: processor, cores, memory, devices."""
    import psutil
    import torch

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "cpu_bf16": cpu_has_bf16(),
        "cuda_devices": devices,
    }


Progress = Callable[[str, int, int, str], None]
"""``progress(task, done, total, note)``: called often and cheaply; ``done == total`` ends the task."""


def silent(task: str, done: int, total: int, note: str = "") -> None:
    """A :data:`Progress` that shows nothing."""


class StopRequest:
    """Whether a signal asked the run to stop; polled between steps, so that no step is left half done."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.heard = False

    def raise_if_set(self, message: str) -> None:
        """Raise :class:`InterruptedRunError` with exit code 130 (SIGINT) or 143 (SIGTERM) if a signal came."""
        if self.signal is not None:
            self.heard = True
            raise InterruptedRunError(message, 128 + self.signal)


@contextmanager
def deferred_signals() -> Iterator[StopRequest]:
    """Let the first SIGINT or SIGTERM set a flag; a second one ends the process at once.

    One that came too late for anybody to ask is sent again in the end.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, _: Any) -> None:
        if request.signal is not None:
            os._exit(128 + number)
        request.signal = number

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if request.signal is not None and not request.heard:
        os.kill(os.getpid(), request.signal)
