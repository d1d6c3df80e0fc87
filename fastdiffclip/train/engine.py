"""What both stages share: precision, micro-batches, the optimiser, the loop, its log, checkpoints and interrupts."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiffclip import checkpoint
from fastdiffclip.config import Config
from fastdiffclip.errors import InputDataError
from fastdiffclip.kernels import philox
from fastdiffclip.runtime import Progress, deferred_signals, seconds_since_start, silent
from fastdiffclip.train.steps import NonFiniteLoss, StepLoss, take_steps

CHECKPOINT_SECONDS = 60.0


def slices(batch: int, micro: int, rows: int) -> Iterator[slice]:
    """Slices of ``micro`` rows that hold at least one of the first ``rows`` real ones."""
    for first in range(0, min(batch, rows), micro):
        yield slice(first, min(first + micro, batch))


class EpochOrder:
    """Which samples make up a step: epochs are permutations of all, cut into batches, the last one padded.

    Everything is found on the device from the step's number, so that a graph can do it.
    """

    def __init__(self, seed: int, samples: int, batch: int, device: torch.device) -> None:
        self.samples, self.batch = samples, batch
        self.steps_per_epoch = -(-samples // batch)
        self._seed = torch.tensor(seed, dtype=torch.int64, device=device)
        self._place = torch.arange(batch, device=device)

    def rng(self, step: Tensor, first: int) -> Tensor:
        """State of the random numbers at ``step`` for the rows from ``first`` on, see ``philox.rng_state``."""
        return torch.stack([self._seed, step, torch.full_like(step, first)])

    def __call__(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Samples of ``step``, ``(batch,)`` int64, and how many of them count (scalar); padding repeats the first."""
        epoch, number = step // self.steps_per_epoch, step % self.steps_per_epoch
        order = philox.permutation(self.rng(epoch, 0), philox.SHUFFLE, self.samples)
        first = number * self.batch
        place = first + self._place
        chosen = order[torch.where(place < self.samples, place, first)]
        return chosen, (self.samples - first).clamp(max=self.batch)


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
    """The settings that a result depends on: all but the memory budget."""
    return config.model_dump(mode="json", exclude={"memory_gib"})


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
        model: what is trained.
        optimiser: of ``model``.
        total: number of optimiser steps.
        learning_rate: step to learning rate.
        folder: of the run, or None for a run that leaves nothing on disk.
        identity: fingerprint of settings and data.
    """

    stage: str
    model: nn.Module
    optimiser: torch.optim.Optimizer
    total: int
    learning_rate: Callable[[int], float]
    folder: Path | None = None
    identity: str = ""
    progress: Progress = silent
    losses: list[float] = field(default_factory=list)
    seconds_to_first_step: float | None = None

    def resume(self) -> int:
        """Take up the finished run or the newest checkpoint of the folder; returns the step to go on with."""
        if self.folder is None:
            return 0
        finished = checkpoint.finished_run(self.folder, self.identity)
        if finished is not None:
            self._take(finished)
            return self.total
        found = checkpoint.latest_checkpoint(self.folder, self.identity)
        if found is None:
            return 0
        step, tensors = found
        self._take(tensors)
        checkpoint.restore_optimiser(self.optimiser, tensors)
        return step

    def _take(self, tensors: dict[str, Tensor]) -> None:
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.losses = tensors[checkpoint.LOSSES].tolist()

    def save(self, step: int) -> None:
        """Write a checkpoint from which :meth:`resume` goes on at ``step``."""
        if self.folder is None:
            return
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= checkpoint.optimiser_tensors(self.optimiser)
        tensors[checkpoint.LOSSES] = torch.tensor(self.losses, dtype=torch.float64)
        checkpoint.save_checkpoint(self.folder, step, tensors, self.identity)

    def run(self, step_loss: StepLoss, windows_per_step: int, first: int = 0) -> list[float]:
        """Take the steps from ``first`` on.

        Raises:
            InterruptedRunError: a signal came; the step in flight was finished and a checkpoint saved.
            InputDataError: the loss is not a finite number; the step is named.
        """
        steps = take_steps(step_loss, self.optimiser, self.learning_rate, self.total, first)
        began = saved = time.monotonic()
        with deferred_signals() as stop:
            for step in range(first, self.total):
                self._taken(steps.advance, step)
                if self.seconds_to_first_step is None:
                    self.seconds_to_first_step = seconds_since_start()
                rate = (step - first + 1) * windows_per_step / max(time.monotonic() - began, 1e-9)
                self.progress(self.stage, step + 1, self.total, f"{self._last_loss()}{rate:.0f} windows/s")
                due = time.monotonic() - saved > CHECKPOINT_SECONDS and step + 1 < self.total
                if due or stop.signal is not None:
                    self._taken(steps.settle)
                    self.save(step + 1)
                    saved = time.monotonic()
                where = f"; continue with --resume --out {self.folder}" if self.folder else ""
                stop.raise_if_set(f"{self.stage} was interrupted after step {step + 1} of {self.total}{where}")
        self._taken(steps.settle)
        self.write_log()
        return self.losses

    def _taken(self, call: Callable[..., list[float]], *step: int) -> None:
        try:
            self.losses += call(*step)
        except NonFiniteLoss as found:
            raise InputDataError(
                f"{self.stage}: the loss became {found.loss} at step {found.step}; lower the learning rate, "
                f"or look for extreme values with 'fastdiffclip scene verify'"
            ) from None

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
