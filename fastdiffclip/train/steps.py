"""How optimiser steps are taken: one after the other on a CPU, as one CUDA graph that the host only repeats on a GPU.

A step is a function of its number alone, given as a scalar int64 tensor on the run's device: windows, masks, noise and
learning rate are found from it there, so that a graph can compute every step and the device never waits for the host.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fastdiffclip.train.engine import Engine

StepLoss = Callable[[Tensor], Tensor]
"""``step_loss(number)``: loss of a step, scalar, with the gradients added to the parameters' ``.grad``."""

BeforeStep = Callable[[int], None]
"""``before(step)``: called by the host before it asks for the step, on the stream that will compute it."""


class Feed(Protocol):
    """Brings the data of the steps, in order."""

    def wait(self, stopped: Callable[[], bool]) -> bool:
        """Wait until the data of the next step are there; False where ``stopped()`` became true before that."""

    def load(self, step: int) -> None:
        """A :data:`BeforeStep`."""


WARM_UP = 3  # steps taken one by one before the capture: they choose algorithms, compile, allocate
REPORT = 16  # steps between two looks at the losses


class NonFiniteLoss(ArithmeticError):
    """The loss of a step is no finite number."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"loss {loss} at step {step}")
        self.step, self.loss = step, loss


class Steps(Protocol):
    """Takes optimiser steps in order; losses may become known later than they are computed."""

    def advance(self, step: int) -> list[float]:
        """Take ``step``; returns the losses that became known, oldest first. Raises :class:`NonFiniteLoss`."""

    def settle(self) -> list[float]:
        """Wait for all steps taken so far; returns the losses not yet told. Raises :class:`NonFiniteLoss`."""


@dataclass
class HostSteps:
    """Each step by itself; its loss is judged before the weights change."""

    step_loss: StepLoss
    engine: Engine
    learning_rate: Callable[[int], float]
    before: BeforeStep | None = None

    def advance(self, step: int) -> list[float]:
        if self.before is not None:
            self.before(step)
        for group in self.engine.optimiser.param_groups:
            group["lr"] = self.learning_rate(step)
        self.engine.zero()
        number = torch.tensor(step, device=self.engine.device)
        loss = float(self.engine.world.sum(self.step_loss(number).detach()))
        if not math.isfinite(loss):
            raise NonFiniteLoss(step, loss)
        self.engine.step()
        return [loss]

    def settle(self) -> list[float]:
        return []


Capture = Callable[[Callable[[], None], torch.device], Callable[[], object]]


def cuda_graph(once: Callable[[], None], device: torch.device) -> Callable[[], object]:
    """Record ``once`` as a CUDA graph without running it; returns what runs it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        once()
    return graph.replay


@dataclass
class GraphSteps:
    """The whole step as one graph: learning rate, windows, noise, loss, gradients, optimiser, and the step's number.

    The first steps are taken one by one, on the stream that the capture uses; every later one is a replay. Losses stay
    on the device; every ``REPORT`` steps they are copied to pinned memory, and read when the copy after the next has
    been asked for: the host always has that many steps queued.

    Args:
        engine: of one process; its optimiser with ``capturable=True`` and the learning rate as a tensor on the device.
        total: number of steps of the run. first: the first one taken.
        capture: replaced where there is no device, to test the rest.
        before: brings the data of a step into the memory that the graph reads; not part of the graph.
    """

    step_loss: StepLoss
    engine: Engine
    learning_rate: Callable[[int], float]
    total: int
    first: int
    capture: Capture = cuda_graph
    before: BeforeStep | None = None
    _replay: Callable[[], object] | None = None
    _pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.device = self.engine.device
        rates = [self.learning_rate(step) for step in range(self.total)]
        self._rates = torch.tensor(rates, dtype=torch.float32, device=self.device)
        self._losses = torch.zeros(self.total, device=self.device)
        self._number = torch.tensor([self.first], dtype=torch.int64, device=self.device)
        self._told = self.first
        cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if cuda else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def advance(self, step: int) -> list[float]:
        with torch.cuda.stream(self._stream):
            if self.before is not None:
                self.before(step)
            if step - self.first < WARM_UP:
                self.engine.zero()
                self._once()
            else:
                if self._replay is None:
                    self.engine.zero()  # the graph's own memory then holds the gradients
                    self._replay = self.capture(self._once, self.device)
                self._replay()
            if (step + 1 - self.first) % REPORT == 0:
                self._copy_losses(step + 1)
        return self._read() if len(self._pending) > 2 else []

    def settle(self) -> list[float]:
        with torch.cuda.stream(self._stream):
            taken = int(self._number)
            if taken > self._told:
                self._copy_losses(taken)
        losses: list[float] = []
        while self._pending:
            losses += self._read()
        return losses

    def _once(self) -> None:
        rate = self._rates.index_select(0, self._number)[0]
        for group in self.engine.optimiser.param_groups:
            group["lr"].copy_(rate)
        loss = self.step_loss(self._number[0]).detach()
        self.engine.step()
        self._losses.index_copy_(0, self._number, loss.float().reshape(1))
        self._number += 1

    def _copy_losses(self, end: int) -> None:
        part = self._losses[self._told : end]
        if self._stream is None:
            self._pending.append((self._told, part.clone(), None))
        else:
            host = torch.empty(part.shape, pin_memory=True)
            host.copy_(part, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
            self._pending.append((self._told, host, event))
        self._told = end

    def _read(self) -> list[float]:
        first, values, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        losses: list[float] = values.tolist()
        for place, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise NonFiniteLoss(first + place, loss)
        return losses


def take_steps(
    step_loss: StepLoss,
    engine: Engine,
    learning_rate: Callable[[int], float],
    total: int,
    first: int = 0,
    before: BeforeStep | None = None,
) -> Steps:
    """The way to take the steps ``first`` to ``total``: as a graph on one GPU, one by one elsewhere."""
    if engine.device.type == "cuda" and type(engine) is Engine:
        return GraphSteps(step_loss, engine, learning_rate, total, first, before=before)
    return HostSteps(step_loss, engine, learning_rate, before)
