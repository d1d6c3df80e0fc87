"""Several processes on one prediction, as torchrun starts them: who has which block, and who is still there.

Blocks are taken in order, whoever comes first; the file system decides, so no process waits for another one while there
is work. A process that dies loses its lock, and the first process takes over what it had taken and not finished.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from fastdiffclip.errors import ResourceError, UsageError
from fastdiffclip.locks import is_held

FAILED = "failed"
PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class Crew:
    """The place of this process among ``size``; rank 0 leads."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Crew:
        """From RANK, WORLD_SIZE and LOCAL_RANK; a single process where they are not set. Raises UsageError."""
        try:
            numbers = [int(os.environ.get(name, default)) for name, default in _VARIABLES]
        except ValueError:
            raise UsageError("RANK, WORLD_SIZE and LOCAL_RANK must be numbers, as torchrun sets them") from None
        found = cls(*numbers)
        if not 0 <= found.rank < found.size:
            raise UsageError(f"RANK is {found.rank} and WORLD_SIZE {found.size}: start the processes with torchrun")
        return found

    def device(self, name: str) -> str:
        """The device of this process where ``name`` leaves it open: each gets a GPU of its own while they last."""
        if self.size == 1 or name not in ("auto", "cuda"):
            return name
        import torch

        if not torch.cuda.is_available():
            return name
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"

    def agree(self, topic: str, message: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the leader says about ``topic``: it gives a JSON-able message, the others wait for it.

        Raises:
            ResourceError: the leader cannot be reached, says nothing within ten minutes, or says that it failed.
        """
        import torch
        from torch.distributed.rendezvous import rendezvous

        if self.size == 1:
            return dict(message or {})
        try:
            store, _, _ = next(rendezvous("env://", self.rank, self.size, timeout=PATIENCE))
            _STORES[topic] = store
            if message is not None:
                store.set(topic, json.dumps(message))
                return dict(message)
            answer: dict[str, Any] = json.loads(store.get(topic))
            store.add(f"{topic} heard", 1)
        except (torch.distributed.DistError, ValueError, OSError) as error:
            raise ResourceError(
                f"process {self.rank} of {self.size} cannot reach the first one ({str(error).splitlines()[0]}); "
                f"start them together with torchrun"
            ) from error
        if FAILED in answer:
            raise ResourceError(f"the first process gave up: {answer[FAILED]}")
        return answer

    def part(self, topic: str) -> None:
        """Let the leader stay until the others have heard it: what it says may be hosted by its own process."""
        store = _STORES.pop(topic, None)
        if store is None or self.rank > 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        until = time.monotonic() + _FAREWELL_SECONDS
        while store.add(f"{topic} heard", 0) < self.size - 1 and time.monotonic() < until:
            time.sleep(0.05)


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
_FAREWELL_SECONDS = 5.0
_STORES: dict[str, Any] = {}


class Claims:
    """Which process has taken which block, as files in the folder of an unfinished prediction."""

    def __init__(self, folder: Path, crew: Crew) -> None:
        self.folder, self.crew, self._locks = folder / "claims", crew, folder

    def clear(self) -> None:
        """Forget the claims of an earlier run; the leader calls it before the others begin."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def take(self, block: int) -> bool:
        """Whether the block is this process's now; False where one has taken it."""
        if self.crew.size == 1:
            return True
        own = self.folder / f"rank-{self.crew.rank}"
        if not own.exists():
            own.write_text(str(self.crew.rank), encoding="ascii")
        try:
            os.link(own, self.folder / str(block))  # whole at once: whoever sees a claim can read whose it is
        except FileExistsError:
            return False
        return True

    def is_abandoned(self, block: int) -> bool:
        """Whether who took the block is gone, or nobody took it."""
        with suppress(FileNotFoundError):
            rank = int((self.folder / str(block)).read_text(encoding="ascii"))
            return rank == self.crew.rank or not is_held(self._locks / f"rank-{rank}.lock")
        return True
