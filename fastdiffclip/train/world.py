"""The processes of one run: which share of a batch is this one's, and the few numbers that cross between them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiffclip.errors import UsageError


@dataclass(frozen=True)
class World:
    """Rank and number of processes; one process alone needs no start and no messages."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """Rank and size as ``torchrun`` and the ``deepspeed`` launcher set them; alone without them.

        Raises:
            UsageError: the variables do not go together.
        """
        found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
        if not any(found.values()):
            return cls()
        try:
            world = cls(int(found["RANK"]), int(found["WORLD_SIZE"]))
        except ValueError:
            world = cls(-1, 0)
        if not 0 <= world.rank < world.size:
            raise UsageError(
                f"RANK={found['RANK']!r} and WORLD_SIZE={found['WORLD_SIZE']!r} do not go together; "
                "start several processes with torchrun or deepspeed"
            )
        return world

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    def start(self, device: torch.device) -> None:
        """Meet the other processes: NCCL between GPUs, gloo between CPUs. Does nothing alone or when they have met."""
        if self.size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")

    @contextmanager
    def met(self, device: torch.device) -> Iterator[World]:
        """:meth:`start`, and part again at the end."""
        self.start(device)
        try:
            yield self
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    def share(self, batch: int) -> tuple[int, int]:
        """First row and number of rows of this process's share of a batch; shares have one size, the last padded."""
        rows = -(-batch // self.size)
        return self.rank * rows, rows

    def sum(self, value: Tensor) -> Tensor:
        """Sum of the tensor over all processes."""
        if self.size > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return value

    def stack(self, value: Tensor) -> Tensor:
        """The tensors of all processes, ``(size, ...)``."""
        if self.size == 1:
            return value[None]
        parts = [torch.empty_like(value) for _ in range(self.size)]
        torch.distributed.all_gather(parts, value.contiguous())
        return torch.stack(parts)

    def agree(self, due: bool, signal: int | None, device: torch.device) -> tuple[bool, int | None]:
        """Whether any process is due, and the largest signal that any got: all save and stop at the same step."""
        if self.size == 1:
            return due, signal
        said = torch.tensor([int(due), signal or 0], device=device)
        torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX)
        return bool(said[0]), int(said[1]) or None

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            torch.distributed.barrier()

    def text_of_main(self, text: str) -> str:
        """What the main process says, in every process."""
        if self.size == 1:
            return text
        said: list[object] = [text]
        torch.distributed.broadcast_object_list(said, src=0)
        return str(said[0])
