"""From a point of a curve to a call that can be timed, and to what it has to do: FLOPs, bytes, memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fastdiffclip.bench.counts import count_work, kept_bytes
from fastdiffclip.bench.jobs import engine_step, predict_setup, read_blocks, stored_scene
from fastdiffclip.bench.setups import Sizes, SkipCase, flc_setup, umd_setup
from fastdiffclip.runtime import Compute, memory_budget

if TYPE_CHECKING:
    from fastdiffclip.config import Config

HEAD_WIDTH = 16  # of every attention head, at any width of the model
COUNTED_SIDE = 32  # larger scenes do the same for each pixel
FIT_PIXELS = 2_000_000  # a front end is fitted on as many, evenly spaced, at most
BLOCK_COPIES = 5  # of a row of chunks in work: as stored, and twice in float32
SAMPLES = 700
SCENE_COPIES = 8  # in float32, that the calls on one scene hold at once, generously
HOST = Compute(torch.device("cpu"), torch.float32)


@dataclass(frozen=True)
class CurveSizes(Sizes):
    """Shape of a point; attention heads grow with the width, and the text tower keeps the width of the image's."""

    def config(self, micro_batch: int = 0) -> Config:
        """See :meth:`Sizes.config`."""
        config, heads = super().config(micro_batch), max(1, self.width // HEAD_WIDTH)
        model = config.model.model_copy(update={"heads": heads, "text_heads": heads})
        return config.model_copy(update={"model": model})


@dataclass(frozen=True)
class Need:
    """What a call has to do, by counting.

    Attributes:
        flops: of matrix products. bytes: through all tensors when nothing is fused.
        floor_bytes: of weights, optimiser state and scene alone, which no fusing saves.
        memory: bytes that the call cannot do without, from the least to the most that its mathematics allows; None
            where they follow from the implementation alone.
    """

    flops: float
    bytes: float
    floor_bytes: float
    memory: tuple[float, float] | None


@dataclass(frozen=True)
class Point:
    """One call and what it needs."""

    call: Callable[[], Any]
    need: Need


def stored_bytes(sizes: Sizes) -> int:
    """Bytes of a pixel on disk: uint16 where a modality has several bands, else float32."""
    return sum(bands * (2 if bands > 1 else 4) for bands in sizes.bands)


# --- one optimiser step ---------------------------------------------------------------------------------------------


def step_point(case: str, sizes: CurveSizes, device: torch.device, dtype: str) -> Point:
    """``umd_step`` or ``flc_step`` of the engine."""
    make: Callable[..., Any] = umd_setup if case == "umd_step" else flc_setup
    return Point(engine_step(make, sizes, device, dtype), step_need(case, sizes, device))


def step_need(case: str, sizes: CurveSizes, device: torch.device) -> Need:
    """Counted on batches of two and four windows: everything is a constant and a multiple of the windows."""
    batch = sizes.umd_batch if case == "umd_step" else sizes.flc_batch
    counted = _count_step(case, replace(sizes, umd_batch=0, flc_batch=0))
    micro = Compute(device, torch.float32).micro_batch(0, batch) if counted.micro_batches else batch
    weights = 8 * 4.0 * counted.parameters  # of Adam: weight and two moments read and written, gradient twice
    # The gradients come while what was kept goes: at the least one after the other, at the most both at once.
    kept, gradients = _at(counted.kept, micro, micro), 4.0 * counted.parameters
    pixels = batch * sizes.window**2 * stored_bytes(sizes)
    moved = _at(counted.bytes, batch, micro) + weights
    return Need(_at(counted.flops, batch, micro), moved, weights + pixels, (max(kept, gradients), kept + gradients))


@dataclass(frozen=True)
class _Counted:
    """Of a step on two and on four windows; parameters, and whether larger batches are cut into micro-batches."""

    flops: tuple[float, float]
    bytes: tuple[float, float]
    kept: tuple[float, float]
    parameters: int
    micro_batches: bool


@functools.cache
def _count_step(case: str, sizes: CurveSizes) -> _Counted:
    make: Callable[..., Any] = umd_setup if case == "umd_step" else flc_setup
    found = []
    for rows in (2, 4):
        setup = make(replace(sizes, umd_batch=rows, flc_batch=rows, side=sizes.window), HOST)
        call, model = functools.partial(setup.engine_loss, 0), setup.engine.model
        work = count_work(call, model)
        found.append((work.flops, work.bytes, kept_bytes(call, model)))
    flops, moved, kept = zip(*found, strict=True)
    parameters = sum(p.numel() for p in model.parameters())
    return _Counted(flops, moved, kept, parameters, hasattr(setup.step, "micro"))


def _at(pair: tuple[float, float], batch: int, micro: int) -> float:
    """A count of ``batch`` windows in micro-batches, from those of two and of four in one."""
    slope = (pair[1] - pair[0]) / 2
    return math.ceil(batch / micro) * (pair[0] - 2 * slope) + slope * batch


# --- prediction, from disk to disk ----------------------------------------------------------------------------------


def predict_point(stack: ExitStack, sizes: CurveSizes, device: torch.device, dtype: str) -> Point:
    """A map of a square scene; only the class map has to grow with the pixels."""
    setup = stack.enter_context(predict_setup(sizes, device, dtype))
    with predict_setup(replace(sizes, side=min(sizes.side, COUNTED_SIDE)), HOST.device, "float32") as counted, _alone():
        work = count_work(counted.engine, counted.classifier.model)
    area = sizes.side**2
    times = area / min(sizes.side, COUNTED_SIDE) ** 2
    moved = 2.0 * area * stored_bytes(sizes)
    return Point(setup.engine, Need(times * work.flops, times * work.bytes + moved, moved, None))


@contextmanager
def _alone() -> Iterator[None]:
    """One thread: what others compute goes past a counter."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- scenes ---------------------------------------------------------------------------------------------------------


def scene_point(stack: ExitStack, case: str, sizes: CurveSizes, device: torch.device) -> Point:
    """Reading a stored scene of uint16 pixels, fitting its front end, preparing it, or drawing windows of UMD from it.

    Raises:
        SkipCase: the scene would not fit this machine's memory.
    """
    area, bands = sizes.side**2, sizes.bands[0]
    if SCENE_COPIES * 4 * area * bands > memory_budget(0.0):
        raise SkipCase(f"{area} pixels of {bands} bands take more memory than is free")
    from fastdiffclip.scene.prepare import fit_front_end, prepare_scenes, prepared_bytes
    from fastdiffclip.train.data import umd_data

    scene, _ = stack.enter_context(stored_scene(sizes.side, sizes.side, bands))
    raw = 2.0 * area * bands
    block = BLOCK_COPIES * 2.0 * bands * sizes.side * min(sizes.side, scene.chunk_rows("hsi"))

    def moving(call: Callable[[], Any], moved: float, held: float) -> Point:
        return Point(call, Need(0.0, moved, moved, (held, held + block)))

    if case == "scene_read":
        return moving(lambda: read_blocks(scene), 2 * raw, raw)
    if case == "fit_front_end":
        return moving(lambda: fit_front_end("mnf", [scene], bands), 2.0 * min(area, FIT_PIXELS) * bands, 1.0)
    if case == "prepare":
        projected = fit_front_end("mnf", [scene], bands)
        whole = float(prepared_bytes([scene], projected))
        return moving(lambda: prepare_scenes([scene], projected), raw + whole, whole)
    standard = fit_front_end("standard", [scene])
    draw = functools.partial(umd_data, [scene], standard, SAMPLES, sizes.window, 0, device=device)
    if case == "draw_from_memory":
        return moving(lambda: draw(budget=1 << 60), 2 * raw, raw)
    windows = 2.0 * min(SAMPLES, area) * sizes.window**2 * bands
    return moving(lambda: draw(budget=0), raw + windows, windows)
