"""Scalars of a run as TensorBoard reads them; needs the extra ``log``."""

from __future__ import annotations

from pathlib import Path

from fastdiffclip.errors import ResourceError, UsageError

FLUSH_SECONDS = 10
QUEUE = 1000  # events that may wait for the writing thread before a step has to wait for it


class EventLog:
    """An event file in a folder, written by a thread of its own, on disk within ten seconds.

    Args:
        folder: made when it is not there; each run or resumption adds its own file.
        first_step: the step that a resumed run goes on with; what earlier files say of it and later ones is hidden.

    Raises:
        UsageError: tensorboard is not installed, or does not load.
        ResourceError: the folder cannot be written.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                f"TensorBoard was asked for, but its package cannot be imported ({error}): "
                f"pip install 'fastdiffclip[log]', or leave the option out and read log.csv"
            ) from None
        try:
            self._writer = SummaryWriter(
                str(folder), purge_step=first_step or None, max_queue=QUEUE, flush_secs=FLUSH_SECONDS
            )
        except OSError as error:
            raise ResourceError(
                f"the TensorBoard folder {folder} cannot be written: {error.strerror}; choose another --out"
            ) from None

    def scalar(self, name: str, value: float, step: int) -> None:
        """Enter ``value`` (kept as float32) under ``name``, for example ``loss``, at optimiser step ``step``."""
        self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still waiting, and end the file."""
        self._writer.close()
