"""What both stages share: precision, micro-batches, the optimiser, the loop, its log, checkpoints and interrupts."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
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
from fastdiffclip.runtime import Progress, deferred_signals, silent

CHECKPOINT_SECONDS = 60.0


def slices(batch: int, micro: int, rows: int) -> Iterator[slice]:
    """Slices of ``micro`` rows that hold at least one of the first ``rows`` real ones."""
    for first in range(0, min(batch, rows), micro):
        yield slice(first, min(first + micro, batch))


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
    return torch.optim.Adam([group for group in groups if group["params"]], lr=lr, fused=True)


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

    def run(self, step_loss: Callable[[int], float], windows_per_step: int, first: int = 0) -> list[float]:
        """Run the steps; ``step_loss(step)`` accumulates gradients and returns the loss.

        Raises:
            InterruptedRunError: a signal came; the step in flight was finished and a checkpoint saved.
            InputDataError: the loss is not a finite number; the step is named.
        """
        began = saved = time.monotonic()
        with deferred_signals() as stop:
            for step in range(first, self.total):
                self._step(step, step_loss)
                elapsed = time.monotonic() - began
                rate = (step - first + 1) * windows_per_step / max(elapsed, 1e-9)
                self.progress(self.stage, step + 1, self.total, f"loss {self.losses[-1]:.4f}  {rate:.0f} windows/s")
                due = time.monotonic() - saved > CHECKPOINT_SECONDS and step + 1 < self.total
                if due or stop.signal is not None:
                    self.save(step + 1)
                    saved = time.monotonic()
                where = f"; continue with --resume --out {self.folder}" if self.folder else ""
                stop.raise_if_set(f"{self.stage} was interrupted after step {step + 1} of {self.total}{where}")
        self.write_log()
        return self.losses

    def _step(self, step: int, step_loss: Callable[[int], float]) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimiser.zero_grad(set_to_none=True)
        loss = step_loss(step)
        if not math.isfinite(loss):
            raise InputDataError(
                f"{self.stage}: the loss became {loss} at step {step}; lower the learning rate, "
                f"or look for extreme values with 'fastdiffclip scene verify'"
            )
        self.optimiser.step()
        self.losses.append(loss)

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
