"""How a call is timed and its memory taken: medians over interleaved repeats, the peak of one call by itself."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from fastdiffclip import heap
from fastdiffclip.bench.setups import SkipCase
from fastdiffclip.runtime import cpu_has_bf16, versions

Key = TypeVar("Key", bound=Hashable)
FLUSH_BYTES = 256 << 20  # larger than the last-level cache of any GPU in use
MEBI = 2.0**20
SHORT_MS = 5.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over the repeats, and the memory that one call took on top of its inputs."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_mb: float | None
    repeats: int


def time_calls(
    calls: Mapping[Key, Callable[[], Any]],
    device: torch.device,
    seconds: float,
    fewest: int = 3,
    most: int = 200,
) -> dict[Key, Timing]:
    """Time every call by itself, in turns, so that a disturbance of the machine meets all of them.

    On a CPU a call of less than ``SHORT_MS`` is preceded by one that is not timed: it finds the caches as it leaves
    them itself, and does not pay for what another one has thrown out of them.

    Args:
        calls: what to time; each is called once to warm up and once for its memory first.
        device: where they compute; on CUDA the last-level cache is emptied before each repeat.
        seconds: time to spend on each call, ``fewest`` repeats at least and ``most`` at most.
    """
    gc.collect()
    peaks, samples, flush = {}, {}, _flush_buffer(device)
    for key, call in calls.items():
        call()
        peaks[key] = peak_of(call, device)
        samples[key] = [_once(call, device, flush)]
    wanted = {key: int(min(most, max(fewest, seconds * 1e3 / max(first[0], 1e-6)))) for key, first in samples.items()}
    short = {key for key, first in samples.items() if device.type == "cpu" and first[0] < SHORT_MS}
    for turn in range(1, max(wanted.values(), default=0)):
        for key, call in calls.items():
            if turn < wanted[key]:
                if key in short:
                    call()
                samples[key].append(_once(call, device, flush))
    timings = {}
    for key, values in samples.items():
        p20, median, p80 = (float(v) for v in np.percentile(values, [20, 50, 80]))
        timings[key] = Timing(median, p20, p80, peaks[key], len(values))
    return timings


def _flush_buffer(device: torch.device) -> torch.Tensor | None:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None


def _once(call: Callable[[], Any], device: torch.device, flush: torch.Tensor | None) -> float:
    """Milliseconds of one call."""
    if flush is None:
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3
    flush.zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end))


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``call`` recorded as a CUDA graph: what it takes where no host is waited for. Raises :class:`SkipCase`."""
    beside, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        for _ in range(3):  # compilations and work spaces are no part of a graph
            call()
    torch.cuda.current_stream(device).wait_stream(beside)
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        raise SkipCase(f"it cannot be recorded as a graph: {str(error).strip().splitlines()[0]}") from None
    return graph.replay


def peak_of(call: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that one call takes at most, beyond what is there before it; None where the system does not tell.

    On CUDA from torch's allocator. On a CPU the high-water mark of the resident set, which Linux lets a process reset.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MEBI
    before_kb = _reset_high_water()
    call()
    return None if before_kb is None else max(0, _status_kb("VmHWM") - before_kb) / 1024.0


def _reset_high_water() -> int | None:
    """Give freed memory back, reset the high-water mark; returns the resident set in KiB."""
    if platform.system() != "Linux":
        return None
    heap.give_back()  # another C library than glibc keeps what it has: peaks then come out too low, never too high
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_kb("VmRSS")
    except (OSError, KeyError):
        return None


def _status_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise KeyError(field)


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """What the figures were taken on, JSON-able: processor, device, threads, versions, commit. No paths."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "memory_gib": round(memory, 1),
        "cpu_bf16": cpu_has_bf16(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions(),
        "commit": _commit(),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {"capability": f"sm_{major}{minor}", "cuda": torch.version.cuda}
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    known = platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), known)


def _commit() -> str | None:
    """The commit of the checkout, ``+`` after it when files differ; None where there is no git or no commit."""
    here = Path(__file__).resolve().parent
    texts = []
    for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"]):
        try:
            done = subprocess.run(["git", "-C", str(here), *command], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        texts.append(done.stdout.strip())
    return texts[0] + ("+" if texts[1] else "")
