"""The floors that times are held against: rates of this machine, measured in the same run.

A floor is the larger of FLOPs over matrix rate and bytes over copy bandwidth. An op that also draws normals cannot
overlap them with the copy on a CPU, so there the two add up; on a GPU the slower of the two counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastdiffclip.bench.measure import time_calls

LARGEST_COPY = 256 << 20
WINDOW = 11


@dataclass(frozen=True)
class Work:
    """What a call has to do at least: matrix FLOPs, bytes read and written, normals drawn."""

    flops: float = 0.0
    bytes: float = 0.0
    normals: float = 0.0


class Floors:
    """Measures rates when they are first asked for, and keeps them."""

    def __init__(self, device: torch.device, quick: bool = False) -> None:
        self.device, self.seconds = device, 0.01 if quick else 0.4
        self.sides = (256,) if quick else (4096, 8192) if device.type == "cuda" else (256, 512, 1024)
        self._rates: dict[str, float] = {}

    def of(self, work: Work, dtype: str) -> float:
        """Seconds that ``work`` takes at least, its matrix products in ``dtype``."""
        matrix = work.flops / self.matrix_rate(dtype) if work.flops else 0.0
        moved = work.bytes / self.copy_rate(work.bytes) if work.bytes else 0.0
        drawn = work.normals / self.normal_rate() if work.normals else 0.0
        return max(matrix, moved + drawn) if self.device.type == "cpu" else max(matrix, moved, drawn)

    def known(self) -> dict[str, float]:
        """The rates that were asked for, per second: FLOPs, bytes (read plus written), normals."""
        return dict(sorted(self._rates.items()))

    def matrix_rate(self, dtype: str) -> float:
        """FLOP/s of the best square matrix product in ``dtype``; on a CPU by torch's own library and by oneDNN."""
        return self._keep(f"matrix_{dtype}", lambda: self._measure_matrix(getattr(torch, dtype)))

    def copy_rate(self, moved: float) -> float:
        """Bytes/s, read plus written, of a plain copy that moves as many bytes, so that caches count for both."""
        half, largest = int(moved) // 2, LARGEST_COPY if self.seconds > 0.1 else 1 << 22
        size = min(largest, max(1 << 16, 1 << half.bit_length()))
        return self._keep(f"copy_{size >> 10}KiB", lambda: self._measure_copy(size))

    def normal_rate(self) -> float:
        """Normals/s: the best of torch's generator and of this project's implementations when they only draw."""
        return self._keep("normals", self._measure_normals)

    def _keep(self, name: str, measure: Callable[[], float]) -> float:
        if name not in self._rates:
            self._rates[name] = measure()
        return self._rates[name]

    def _best(self, calls: dict[str, Callable[[], Any]]) -> float:
        if self.device.type == "cuda":
            return min(timing.p20_ms for timing in time_calls(calls, self.device, self.seconds).values()) * 1e-3
        # The same buffers again and again: what fits a cache stays there, as it does for the op. The best of all
        # repeats counts, since whatever else runs on the machine only ever makes a rate look lower than it is.
        return min(_shortest(call, self.seconds) for call in calls.values())

    def _measure_matrix(self, dtype: torch.dtype) -> float:
        return max(self._measure_product(dtype, side) for side in self.sides)

    def _measure_product(self, dtype: torch.dtype, side: int) -> float:
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        calls: dict[str, Callable[[], Any]] = {"torch": lambda: F.linear(a, b)}
        if self.device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
            opaque_a, opaque_b = a.to_mkldnn(), b.to_mkldnn()
            calls["onednn"] = lambda: F.linear(opaque_a, opaque_b)
        return 2.0 * side**3 / self._best(calls)

    def _measure_copy(self, size: int) -> float:
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2.0 * size / self._best({"copy": lambda: target.copy_(source)})

    def _measure_normals(self) -> float:
        from fastdiffclip.kernels import implementations

        rows, channels = (2, 16) if self.seconds < 0.1 else (76, 144)
        out = torch.empty(rows * WINDOW**2, channels, device=self.device)
        calls: dict[str, Callable[[], Any]] = {"torch": out.normal_}
        for impl, state in implementations(self.device)["visible_noise"].items():
            if impl != "reference" and state == "ok":
                calls[impl] = _draw_only(rows, channels, self.device, impl)
        return out.numel() / self._best(calls)


def _draw_only(rows: int, channels: int, device: torch.device, impl: str) -> Callable[[], Any]:
    """``visible_noise`` with nothing to choose and one pixel to read: it draws, scales and stores."""
    from fastdiffclip.kernels import FlatScene, philox, visible_noise

    scene = FlatScene(
        torch.zeros(1, channels, device=device),
        torch.ones(channels, device=device),
        torch.zeros(channels, device=device),
        None,
        torch.tensor([[0, 1, 1]], device=device),
    )
    centres = torch.zeros(rows, 3, dtype=torch.int64, device=device)
    times, schedule = torch.zeros(rows, dtype=torch.int64, device=device), torch.ones(1, 2, device=device)
    rng = philox.rng_state(0, device=device)
    return lambda: visible_noise(scene, centres, times, schedule, rng, window=WINDOW, visible=WINDOW**2, impl=impl)


def _shortest(call: Callable[[], Any], seconds: float) -> float:
    call()
    best, calls, end = float("inf"), 0, time.perf_counter() + seconds
    while calls < 5 or time.perf_counter() < end:
        calls += 1
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best
