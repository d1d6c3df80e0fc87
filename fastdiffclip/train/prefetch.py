"""UMD windows that do not fit the device: gathered on the host and copied to it ahead of the steps that read them.

The batch of a step becomes a little scene, one window a row, in one of two halves of buffers on the device; steps take
the halves in turn. A thread gathers the batches to come into (pinned) memory of the host; the host thread orders their
copies on a stream of their own, so that on a GPU batch s + 1 is copied while step s runs, and waits for nothing but a
gather that is late, or a device that has two steps before it. A step, or its graph, reads only the buffers. A run that
is stopped waits for no pass over the scenes: the thread looks between two rows of chunks whether it is still wanted.

Legend: B windows of this process's share of a batch, P side of a window, L = P * P, C channels.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastdiffclip.config import Config
from fastdiffclip.kernels import FlatScene
from fastdiffclip.scene.prepare import FrontEnd, PreparedScenes, prepare_scenes, prepared_bytes, storage_dtypes
from fastdiffclip.scene.store import Scene
from fastdiffclip.scene.windows import crop_centres, crop_windows, read_windows
from fastdiffclip.train.data import UmdData, umd_data, unlabelled_centres, window_bytes
from fastdiffclip.train.loop import EpochOrder
from fastdiffclip.train.steps import Feed
from fastdiffclip.train.world import World

WAKE_SECONDS = 0.1  # between two looks whether to go on waiting
SLOTS = 3  # batches on the host: one that is being copied, two that are being gathered or are ready
CPU = torch.device("cpu")
Slot = list[Tensor]
"""A batch: pixels ``(N, C)`` and their bitmap ``(N / 8,)`` of each modality, N = B * L up to a multiple of 8."""


def fitting_data(
    scenes: Sequence[Scene],
    front_end: FrontEnd,
    config: Config,
    seed: int,
    device: torch.device,
    world: World,
    budget: int,
    room: int | None = None,
) -> UmdData:
    """Windows of UMD, held on the device where scenes or drawn windows fit, fed to it step by step where they do not.

    All ways give the same numbers. What is fed comes from prepared scenes in the host's memory where these fit
    ``budget``, else from disk; there, one pass over the scenes gathers as many batches as fit it.

    Args:
        budget: bytes of the host's memory. room: bytes of the device's; None for no limit of its own.

    Raises:
        InputDataError: no pixel is valid in all modalities.
    """
    umd, window = config.umd, config.model.window
    held, limit = prepared_bytes(scenes, front_end), budget if room is None else min(budget, room)
    pixels = sum(scene.height * scene.width for scene in scenes)
    if min(held, min(umd.samples, pixels) * window_bytes(scenes, front_end, window)) <= limit:
        return umd_data(scenes, front_end, umd.samples, window, seed, limit, device)
    centres = torch.from_numpy(unlabelled_centres(scenes, umd.samples, window, seed))
    order = EpochOrder(seed, len(centres), min(umd.batch, len(centres)), CPU, world)
    flat = _buffers(scenes, front_end, window, order.rows, device)
    own = torch.from_numpy(crop_centres(order.rows, window)).to(device)
    if held <= budget:
        prepared = prepare_scenes(scenes, front_end)
        return FedData(flat, centres, order, own, lambda chosen, _: crop_windows(prepared, chosen, window))
    ahead = max(1, budget // (order.rows * window_bytes(scenes, front_end, window)))
    read = functools.partial(read_windows, scenes, front_end)
    return FedData(flat, centres, order, own, lambda chosen, between: read(chosen, window, between), ahead)


def _buffers(
    scenes: Sequence[Scene], front_end: FrontEnd, window: int, rows: int, device: torch.device
) -> list[FlatScene]:
    """Room for two batches on the device; a half begins on a whole byte of the bitmap."""
    length = window**2
    half = -(-rows * length // 8) * 8
    starts = (np.arange(2)[:, None] * half + np.arange(rows) * length).reshape(-1)
    extents = torch.from_numpy(np.stack([starts, *np.full((2, 2 * rows), window)], axis=1).astype(np.int64)).to(device)
    flat = []
    for name, dtype in storage_dtypes(scenes, front_end).items():
        stored = torch.from_numpy(np.empty(0, dtype)).dtype
        pixels = torch.empty((2 * half, front_end.channels[name]), dtype=stored, device=device)
        scale, offset = (torch.from_numpy(part).to(device) for part in front_end.scale_offset(name, dtype))
        flat.append(FlatScene(pixels, scale, offset, torch.empty(half // 4, dtype=torch.uint8, device=device), extents))
    return flat


@dataclass(frozen=True)
class FedData(UmdData):
    """Windows that :meth:`feed` brings; ``flat`` are buffers of two batches, ``centres`` stay on the host.

    Attributes:
        order: of the run, on the CPU. own: centres of a batch in the first half of the buffers, ``(B, 3)``.
        read: centres ``(n, 3)`` to windows as :func:`fastdiffclip.scene.windows.read_windows` returns them; takes its
            ``between``, too.
        ahead: batches that are read at once.
    """

    order: EpochOrder
    own: Tensor
    read: Callable[[np.ndarray, Callable[[], None]], PreparedScenes]
    ahead: int = 1

    def batch(self, order: EpochOrder, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centres = self.own.clone()
        centres[:, 0] += step % 2 * len(centres)
        return centres, *order.counts(step)

    @contextmanager
    def feed(self, first: int, total: int) -> Iterator[Feed | None]:
        pool, unwanted = ThreadPoolExecutor(1, "windows"), threading.Event()
        try:
            yield Feeder(self, pool, first, total, unwanted)
        finally:
            unwanted.set()
            pool.shutdown(cancel_futures=True)


@dataclass
class Feeder:
    """Brings the batches of the steps ``first`` to ``total``, in order; the thread of ``pool`` gathers them.

    What it gathers is given up once ``unwanted`` is set.
    """

    data: FedData
    pool: ThreadPoolExecutor
    first: int
    total: int
    unwanted: threading.Event = field(default_factory=threading.Event)
    _asked: deque[Future[Slot]] = field(default_factory=deque)
    _copying: deque[tuple[torch.Event, Slot]] = field(default_factory=deque)
    _steps: range = range(0)  # whose windows are in _read
    _read: PreparedScenes | None = None
    _epoch: int = -1  # whose order is _permutation
    _permutation: Tensor = field(default_factory=lambda: torch.empty(0))
    _before: torch.Event | None = None

    def __post_init__(self) -> None:
        device = self.data.flat[0].device
        self._next, self._side = self.first, torch.cuda.Stream(device) if device.type == "cuda" else None
        buffers = [x for part in self.data.flat for x in (part.pixels, part.valid) if x is not None]
        self._halves = [[x.chunk(2)[number] for x in buffers] for number in range(2)]
        for _ in range(SLOTS):
            self._ask([torch.empty(x.shape, dtype=x.dtype, pin_memory=self._side is not None) for x in self._halves[0]])

    def wait(self, stopped: Callable[[], bool]) -> bool:
        while not self._asked[0].done():
            if stopped():
                return False
            wait([self._asked[0]], WAKE_SECONDS)
        return True

    def load(self, step: int) -> None:
        """Order the copy of the batch of ``step``, and let the current stream wait for it."""
        slot = self._asked.popleft().result()
        if self._side is None:
            copy(slot, self._halves[step % 2])
            self._ask(slot)
            return
        stream = torch.cuda.current_stream(self.data.flat[0].device)
        asked_before, self._before = self._before, stream.record_event()  # the step before this one ends there
        self._side.wait_event(asked_before or self._before)  # the step before that one read this half
        with torch.cuda.stream(self._side):
            copy(slot, self._halves[step % 2])
        copied = self._side.record_event()
        stream.wait_event(copied)
        self._copying.append((copied, slot))
        if len(self._copying) > 1:
            copied, slot = self._copying.popleft()
            copied.synchronize()
            self._ask(slot)

    def _ask(self, slot: Slot) -> None:
        if self._next < self.total:
            self._asked.append(self.pool.submit(self._gather, self._next, slot))
            self._next += 1

    def _gather(self, step: int, slot: Slot) -> Slot:
        """In the thread: fill ``slot`` with the batch of ``step``. No call of CUDA: a graph may be being recorded."""
        if step not in self._steps:
            self._steps, self._read = range(0), None  # its memory goes before the new windows come
            steps = range(step, min(self.total, step + self.data.ahead))
            chosen = torch.cat([self._chosen(number) for number in steps])
            self._steps, self._read = steps, self.data.read(self.data.centres[chosen].numpy(), self._go_on)
        assert self._read is not None
        count = len(self.data.own) * int(self._read.extents[0, 1]) ** 2
        first = (step - self._steps.start) * count
        for pixels, valid, part in zip(slot[::2], slot[1::2], self._read.modalities.values(), strict=True):
            pixels.numpy()[:count] = part.pixels[first : first + count]
            bits = np.unpackbits(part.valid[first // 8 : -(-(first + count) // 8)], bitorder="little")
            valid.numpy()[:] = np.packbits(bits[first % 8 :][:count], bitorder="little")
        return slot

    def _go_on(self) -> None:
        if self.unwanted.is_set():
            raise CancelledError

    def _chosen(self, step: int) -> Tensor:
        """The samples of a step; the order of an epoch is found once."""
        order, epoch = self.data.order, step // self.data.order.steps_per_epoch
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, order.permutation(torch.tensor(epoch))
        return order.chosen(torch.tensor(step), self._permutation)


def copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Order the copy of a batch to the device, on the current stream."""
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source, non_blocking=True)
