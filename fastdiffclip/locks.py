"""Locks on files that the system releases when their process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


class Lock:
    """An exclusive lock on a file, which is made if needed and stays."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def acquire(self, blocking: bool = True) -> bool:
        """Take the lock; False where another process has it. Raises OSError where the file cannot be made."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(file)
                return False
            if self._is_there(file):
                self._file = file
                return True
            os.close(file)  # its holder removed the folder in the meantime

    def remove(self) -> None:
        """Give the lock back and leave no file."""
        with suppress(OSError):
            self.path.unlink()
        self.release()

    def _is_there(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def is_held(path: Path) -> bool:
    """Whether a process has the lock ``path``; a file that is not there is held by nobody."""
    with suppress(FileNotFoundError):
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
    return False
