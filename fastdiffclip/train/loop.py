"""What both stages share: precision, micro-batches, the optimiser, the loop, its log, checkpoints and interrupts."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiffclip import checkpoint, heap
from fastdiffclip.config import BandsConfig, Config, FlcConfig, UmdConfig
from fastdiffclip.errors import InputDataError, ResourceError
from fastdiffclip.files import held_folder
from fastdiffclip.kernels import philox
from fastdiffclip.runtime import Compute, Progress, StopRequest, deferred_signals, seconds_since_start, silent
from fastdiffclip.tensorboard import EventLog
from fastdiffclip.train.engine import ALONE, Engine, choose_engine
from fastdiffclip.train.steps import Feed, NonFiniteLoss, StepLoss, Steps, take_steps
from fastdiffclip.train.world import World

CHECKPOINT_SECONDS = 60.0


def slices(batch: int, micro: int, rows: int) -> Iterator[slice]:
    """Slices of ``micro`` rows that hold at least one of the first ``rows`` real ones."""
    for first in range(0, min(batch, rows), micro):
        yield slice(first, min(first + micro, batch))


class EpochOrder:
    """Which samples make up a step: epochs are permutations of all, cut into batches, the last one padded.

    Everything is found on the device from the step's number, so that a graph can do it.
    """

    def __init__(self, seed: int, samples: int, batch: int, device: torch.device, world: World = ALONE) -> None:
        self.samples, self.batch = samples, batch
        self.steps_per_epoch = -(-samples // batch)
        self.first, self.rows = world.share(batch)
        self._seed = torch.tensor(seed, dtype=torch.int64, device=device)
        self._place = self.first + torch.arange(self.rows, device=device)

    def rng(self, step: Tensor, first: int = 0) -> Tensor:
        """State of the random numbers (``philox.rng_state``) at ``step``, for rows from ``first`` of this share on."""
        return torch.stack([self._seed, step, torch.full_like(step, self.first + first)])

    def real(self, step: int) -> Tensor:
        """The samples of this share at ``step`` that count."""
        chosen, rows, _ = self(torch.tensor(step, device=self._seed.device))
        return chosen[: int(rows)]

    def __call__(self, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What this process does at ``step``.

        Returns:
            samples of its share, ``(rows,)`` int64, padding repeats the batch's first; how many of them count, and how
            many of all shares (scalars).
        """
        chosen = self.chosen(step, self.permutation(step // self.steps_per_epoch))
        return chosen, *self.counts(step)

    def permutation(self, epoch: Tensor) -> Tensor:
        """The samples in the order of ``epoch``."""
        state = torch.stack([self._seed, epoch, torch.zeros_like(epoch)])
        return philox.permutation(state, philox.SHUFFLE, self.samples)

    def chosen(self, step: Tensor, permutation: Tensor) -> Tensor:
        """The samples of this share at ``step``, out of the permutation of its epoch."""
        _, total = self.counts(step)
        first = step % self.steps_per_epoch * self.batch
        return permutation[first + torch.where(self._place < total, self._place, 0)]

    def counts(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """How many samples of this share, and of all shares, count at ``step``."""
        total = (self.samples - step % self.steps_per_epoch * self.batch).clamp(max=self.batch)
        return (total - self.first).clamp(min=0, max=self.rows), total


@contextmanager
def run_folder(out: Path | None, resume: bool, world: World) -> Iterator[Path | None]:
    """The folder of a run, made or checked and held by the main process; None for a run that leaves nothing."""
    with held_folder(Path(out), resume) if out is not None and world.main else nullcontext():
        world.wait()
        yield None if out is None else Path(out)
        world.wait()


def weights_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's part of :meth:`Engine.state`, or of a finished run."""
    return {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")}


def start_engine(
    model: nn.Module,
    found: Mapping[str, Tensor],
    config: Config,
    stage: UmdConfig | BandsConfig | FlcConfig,
    where: Compute,
    world: World,
) -> Engine:
    """The engine of a run, which goes on from the tensors of :meth:`Loop.resume` where there are any."""
    if found:
        model.load_state_dict(weights_of(found))
    model.to(where.device)
    where.compile_module(model)
    engine = choose_engine(model, adam(model, stage.lr, stage.weight_decay), stage.clip, config, world)
    if any(name.startswith("optimiser.") for name in found):  # a finished run keeps no moments
        engine.restore(found)
    return engine


def adam(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Adam:
    """Adam; weight decay reaches matrices of linear layers only, never embeddings, positions, norms or biases."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                (decayed if isinstance(module, nn.Linear) and name == "weight" else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    device = next(model.parameters()).device
    if device.type == "cuda":  # a graph reads the rate from the device
        return torch.optim.Adam(groups, lr=torch.tensor(lr, device=device), fused=True, capturable=True)
    return torch.optim.Adam(groups, lr=lr, fused=True)


def fingerprint(*parts: Any) -> str:
    """A short hash of JSON-able settings: two runs with the same one may continue each other."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that a result depends on: not the memory budget, nor how many processes work together and how."""
    return config.model_dump(mode="json", exclude={"memory_gib", "engine", "zero"})


def weights_digest(model: nn.Module) -> str:
    """sha256 over names and numbers of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Loop:
    """Optimiser steps with learning-rate schedule, log, checkpoints and resume.

    Args:
        stage: name shown in progress and errors.
        total: number of optimiser steps.
        learning_rate: step to learning rate.
        folder: of the run, or None for a run that leaves nothing on disk.
        identity: fingerprint of settings and data.
        tensorboard: whether loss and learning rate go to event files in the folder, too.
    """

    stage: str
    total: int
    learning_rate: Callable[[int], float]
    folder: Path | None = None
    identity: str = ""
    progress: Progress = silent
    tensorboard: bool = False
    losses: list[float] = field(default_factory=list)
    seconds_to_first_step: float | None = None

    def resume(self) -> tuple[int, dict[str, Tensor]]:
        """Take up the finished run or the newest checkpoint of the folder.

        Returns:
            The step to go on with, and the tensors of :meth:`Engine.state` then; 0 and none for a fresh start.
        """
        if self.folder is None:
            return 0, {}
        finished = checkpoint.finished_run(self.folder, self.identity)
        found = (self.total, finished) if finished else checkpoint.latest_checkpoint(self.folder, self.identity)
        if found is None:
            return 0, {}
        self.losses = found[1][checkpoint.LOSSES].tolist()
        return found

    def save(self, step: int, engine: Engine) -> None:
        """Write a checkpoint from which :meth:`resume` goes on at ``step``; all processes give, the main one writes.

        Raises:
            ResourceError: it cannot be written; the checkpoints before it stay.
        """
        tensors = engine.state() | {checkpoint.LOSSES: torch.tensor(self.losses, dtype=torch.float64)}
        if self.folder is not None and engine.world.main:
            try:
                checkpoint.save_checkpoint(self.folder, step, tensors, self.identity)
                self.write_log()
            except ResourceError as error:
                raise ResourceError(f"{error}, then continue with --resume --out {self.folder}") from None

    def run(
        self,
        step_loss: StepLoss,
        engine: Engine,
        windows_per_step: int,
        first: int = 0,
        order: EpochOrder | None = None,
        feed: Feed | None = None,
    ) -> list[float]:
        """Take the steps from ``first`` on; ``order`` lets an error name the windows of its step.

        ``feed`` brings the data of the steps. A run of one process does not wait for them any more once a signal came.

        Raises:
            InterruptedRunError: a signal came; the step in flight was finished and a checkpoint saved.
            InputDataError: the loss is not a finite number; the step is named.
        """
        before = None if feed is None else feed.load
        steps = take_steps(step_loss, engine, self.learning_rate, self.total, first, before)
        with self._event_log(first, engine.world) as events:
            try:
                self._run(steps, engine, windows_per_step, first, feed, events)
            except NonFiniteLoss as found:
                raise InputDataError(self._what_is_wrong(found, order)) from None
        if engine.world.main:
            self.write_log()
        return self.losses

    def _run(
        self, steps: Steps, engine: Engine, windows_per_step: int, first: int, feed: Feed | None,
        events: EventLog | None,
    ) -> None:  # fmt: skip
        began = saved = time.monotonic()
        with deferred_signals() as stop, heap.kept():
            for step in range(first, self.total):
                # Several processes go on until they agree: one that left by itself would be waited for.
                if feed is not None and not feed.wait(lambda: engine.world.size == 1 and stop.signal is not None):
                    self._taken(events, steps.settle)
                    self.save(step, engine)
                    self._interrupted(stop, step)
                self._taken(events, steps.advance, step)
                if self.seconds_to_first_step is None:
                    self.seconds_to_first_step = seconds_since_start()
                rate = (step - first + 1) * windows_per_step / max(time.monotonic() - began, 1e-9)
                self.progress(self.stage, step + 1, self.total, f"{self._last_loss()}{rate:.0f} windows/s")
                due = time.monotonic() - saved > CHECKPOINT_SECONDS and step + 1 < self.total
                # A signal that comes while they agree is for the next step: all have to do the same.
                due, signal = engine.world.agree(due, stop.signal, engine.device)
                if due or signal is not None:
                    self._taken(events, steps.settle)
                    self.save(step + 1, engine)
                    saved = time.monotonic()
                if signal is not None:
                    stop.signal = signal
                    self._interrupted(stop, step + 1)
        self._taken(events, steps.settle)

    def _interrupted(self, stop: StopRequest, taken: int) -> None:
        where = f"; continue with --resume --out {self.folder}" if self.folder else ""
        stop.raise_if_set(f"{self.stage} was interrupted after step {taken} of {self.total}{where}")

    @contextmanager
    def _event_log(self, first: int, world: World) -> Iterator[EventLog | None]:
        if not (self.tensorboard and self.folder is not None and world.main):
            yield None
            return
        events = EventLog(self.folder / "tensorboard", first)
        try:
            yield events
        finally:
            events.close()

    def _taken(self, events: EventLog | None, call: Callable[..., list[float]], *step: int) -> None:
        """Call ``steps.advance`` or ``settle``, and enter the losses that became known."""
        known = call(*step)
        for loss in known:
            if events is not None:
                events.scalar("loss", loss, len(self.losses))
                events.scalar("learning_rate", self.learning_rate(len(self.losses)), len(self.losses))
            self.losses.append(loss)

    def _what_is_wrong(self, found: NonFiniteLoss, order: EpochOrder | None) -> str:
        windows, back = "", ""
        if order is not None:
            chosen = order.real(found.step).tolist()
            windows = f", whose windows are {', '.join(map(str, chosen[:8]))}{', ...' if len(chosen) > 8 else ''}"
            windows += f" of the {order.samples}"
        if self.folder is not None:
            saved = checkpoint.latest_checkpoint(self.folder, self.identity)
            if saved is not None:
                back = f"; the weights of step {saved[0]} are in {self.folder / checkpoint.CHECKPOINTS}"
        return (
            f"{self.stage}: the loss became {found.loss} at step {found.step}{windows}; lower the learning rate, "
            f"or look for extreme values with 'fastdiffclip scene verify'{back}"
        )

    def _last_loss(self) -> str:
        return f"loss {self.losses[-1]:.4f}  " if self.losses else ""

    def write_log(self) -> None:
        """``log.csv``: step, learning rate, loss."""
        if self.folder is None:
            return
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(["step", "learning_rate", "loss"])
        table.writerows(
            [step, f"{self.learning_rate(step):.8g}", f"{loss:.8g}"] for step, loss in enumerate(self.losses)
        )
        checkpoint.write_atomic(self.folder / checkpoint.LOG, text.getvalue().encode())
