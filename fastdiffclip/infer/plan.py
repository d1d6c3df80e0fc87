"""What a prediction will take, before it begins: how the scene is cut, how much memory that needs, how long it is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fastdiffclip.errors import ResourceError
from fastdiffclip.infer.cog import CACHE_BYTES
from fastdiffclip.infer.engine import Engine
from fastdiffclip.infer.interest import Interest
from fastdiffclip.infer.tiles import Block, Rect, Tiling, cut_blocks
from fastdiffclip.scene.store import Modality

STREAM_BYTES = 64 << 20  # what blocks take where nobody sets a limit; more makes nothing faster
LIBRARIES = 96 << 20  # what is imported, and what the allocator keeps, after the process was measured
MEBI = 1 << 20


class Readable(Protocol):
    """What prediction reads from: a stored scene, or raster files as one."""

    @property
    def name(self) -> str: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def modalities(self) -> Mapping[str, Modality]: ...

    def chunk_rows(self, modality: str) -> int: ...
    def valid_chunk_rows(self, modality: str) -> int: ...


@dataclass(frozen=True)
class Plan:
    """How a scene is predicted.

    Attributes:
        rows, cols: tiles of a block.
        memory: bytes of this process at most, by part. device_memory: likewise on the GPU; empty on a CPU.
        seconds: expected time of this process alone, None where it was not measured.
    """

    tiling: Tiling
    rows: int
    cols: int
    windows: int
    pixels: int
    memory: dict[str, int]
    device_memory: dict[str, int]
    device: str
    precision: str
    threads: int
    seconds: float | None = None

    @property
    def blocks(self) -> list[Block]:
        """The blocks, in the order in which they are read."""
        return cut_blocks(self.tiling, self.rows, self.cols)

    def summary(self) -> dict[str, Any]:
        """JSON-able."""
        blocks = self.blocks
        return {
            "pixels": self.pixels,
            "scene": [self.tiling.height, self.tiling.width],
            "blocks": len(blocks),
            "block": [blocks[0].rect.height, blocks[0].rect.width],
            "tile": [self.tiling.rows, self.tiling.cols],
            "batch": self.windows,
            "device": self.device,
            "precision": self.precision,
            "threads": self.threads,
            "memory": {**self.memory, "sum": sum(self.memory.values())},
            "device_memory": {**self.device_memory, "sum": sum(self.device_memory.values())},
            "expected_seconds": None if self.seconds is None else round(self.seconds, 2),
        }


def make_plan(
    scene: Readable,
    engine: Engine,
    interest: Interest,
    *,
    layer_bytes: int,
    memory: int | None = None,
    device_memory: int | None = None,
    seconds: float | None = None,
) -> Plan:
    """The largest blocks that the memory allows; what is computed together does not depend on it.

    Args:
        layer_bytes: of the results, per pixel. memory, device_memory: limits in bytes, None for none.
        seconds: per pixel, from :func:`seconds_per_pixel`.

    Raises:
        ResourceError: a limit is too small; the message says what would do.
    """
    tiling = Tiling.of(scene.height, scene.width, engine.batches.tile)
    need = _Need(scene, engine, tiling, interest, layer_bytes)
    limits = (memory, device_memory if engine.device.type == "cuda" else None)

    def fits(rows: int, cols: int, streamed: int | None) -> bool:
        parts, on_device = need.of(rows, cols)
        stream = parts["reading"] + (on_device or parts)["projected pixels"]
        sums = sum(parts.values()), sum(on_device.values())
        enough = all(limit is None or size <= limit for size, limit in zip(sums, limits, strict=True))
        return enough and (streamed is None or stream <= streamed)

    if not fits(1, 1, None):
        _refuse(need, limits)
    cols = _largest(tiling.across, lambda n: fits(1, n, STREAM_BYTES)) or 1
    rows = _largest(tiling.down, lambda n: fits(n, cols, STREAM_BYTES)) or 1
    parts, on_device = need.of(rows, cols)
    where = engine.classifier.where
    return Plan(
        tiling, rows, cols, engine.windows, interest.pixels, parts, on_device, str(where.device),
        str(where.precision).removeprefix("torch."), engine.threads,
        None if seconds is None else seconds * interest.pixels,
    )  # fmt: skip


def _largest(most: int, fits: Any) -> int:
    """The largest n of 1 to ``most`` that fits, where smaller ones do too; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _refuse(need: _Need, limits: tuple[int | None, int | None]) -> None:
    options = ("--memory", "--device-memory")
    for option, limit, parts in zip(options, limits, need.of(1, 1), strict=True):
        least = sum(parts.values())
        if limit is not None and least > limit:
            listed = ", ".join(f"{name} {-(-size // MEBI)}" for name, size in parts.items() if size)
            raise ResourceError(
                f"{option} {limit // MEBI}MiB is too small for this scene and model; the smallest that works is "
                f"{option} {-(-least // MEBI)}MiB ({listed})"
            )


class _Need:
    """Bytes that a cut takes, by part."""

    def __init__(self, scene: Readable, engine: Engine, tiling: Tiling, interest: Interest, layer_bytes: int) -> None:
        self.engine, self.tiling, self.layer_bytes = engine, tiling, layer_bytes
        self.points = 0 if interest.points is None else interest.points.nbytes
        used = [scene.modalities[name] for name in engine.names]
        self.stored = [m.bands * np.dtype(m.dtype).itemsize for m in used]
        self.chunks = [
            (scene.chunk_rows(m.name) * size, scene.valid_chunk_rows(m.name))
            for m, size in zip(used, self.stored, strict=True)
        ]
        self.bands = max(m.bands for m in used)
        self.base = _resident_bytes()

    def of(self, rows: int, cols: int) -> tuple[dict[str, int], dict[str, int]]:
        """On the host and on the GPU, for blocks of ``rows`` x ``cols`` tiles."""
        engine, tiling, radius = self.engine, self.tiling, self.engine.radius
        width = min(tiling.width, cols * tiling.cols + 2 * radius)
        height = min(tiling.height, rows * tiling.rows + 2 * radius)
        pixels, modalities = height * width, len(self.stored)
        # Two blocks are in memory, one being read and one being projected, and two rows of chunks to read from.
        reading = 2 * pixels * (sum(self.stored) + modalities)
        reading += 2 * width * sum(values + valid for values, valid in self.chunks)
        tokens = (pixels + 2 * radius * width) * engine.pixel_bytes
        tile = min(tiling.rows * tiling.cols, tiling.height * tiling.width)
        host = {
            "process": self.base + LIBRARIES + CACHE_BYTES,
            "reading": reading,
            "projected pixels": 2 * pixels * modalities,
            "results": 4 * tile * (2 * self.layer_bytes + 8 * len(engine.classifier.classes)) + self.points,
        }
        batches = activation_bytes(engine) * (engine.threads if engine.device.type == "cpu" else 1)
        channels = max(engine.classifier.front_end.channels.values())
        host["front end"] = engine.threads * tile * max(channels, self.bands) * 4 * 5
        if engine.device.type == "cpu":
            host |= {"projected pixels": host["projected pixels"] + tokens, "batches": batches}
            return host, {}
        weights = sum(p.numel() * p.element_size() for p in engine.classifier.model.parameters())
        return host, {"weights": weights, "projected pixels": tokens + 2 * pixels * modalities, "batches": batches}


def activation_bytes(engine: Engine) -> int:
    """Bytes of one batch: in the encoder about 12 numbers of 4 bytes per token and unit of width at the same time.

    Window means take their values and their sums, twice each, once per size.
    """
    model = engine.classifier.config.model
    means = 4 * (3 + 2 * len(engine.sizes)) * engine.batches.tile * sum(engine.classifier.front_end.channels.values())
    if not engine.reads_tokens:
        return means
    tokens = engine.windows * len(engine.names) * (1 + model.tokens)
    stem = engine.batches.stem * max(max(engine.classifier.front_end.channels.values()), model.width)
    hidden = max(3.0, 2 * model.mlp_ratio)
    return int(4 * max(tokens * model.width * (6 + 2 * hidden), 4 * stem)) + means * bool(engine.sizes)


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def seconds_per_pixel(engine: Engine) -> float:
    """Measured on windows of zeros, as many batches at once as there are threads; a fraction of a second on a CPU."""
    batches = engine.threads if engine.device.type == "cpu" else 1
    rect = Rect(0, batches, 0, engine.windows)
    region = engine.region(rect)
    for plane in region.planes:
        plane.zero_()
    for valid in region.valid:
        valid[:] = True
    wanted = np.ones((rect.height, rect.width), bool)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        engine.classify(region, rect, wanted)
        best = min(best, time.perf_counter() - began)
    return best / rect.pixels
