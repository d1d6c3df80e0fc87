"""What the C library does with memory that was freed. glibc's public settings; other C libraries are left alone."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
_NO_GLIBC = (AttributeError, OSError, TypeError)


def give_back() -> None:
    """Return to the system what was freed."""
    with suppress(*_NO_GLIBC):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def kept() -> Iterator[None]:
    """Inside, freed memory stays with the process until it is asked for again; not to be nested.

    A training step frees and takes the same tensors again and again. Each time that the system is asked for them costs
    page faults and the zeroing of pages. The peak is the same.
    """
    with _thresholds(mmap=1 << 30, trim=1 << 30):
        yield


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, what is larger than the tensors of a batch goes back to the system as it is freed; not to be nested.

    Left to itself glibc soon keeps arrays of up to 32 MiB: blocks of pixels then lie between tensors, and the heap
    grows with the number of blocks.
    """
    with _thresholds(mmap=16 << 20, trim=32 << 20):
        yield


@contextmanager
def _thresholds(mmap: int, trim: int) -> Iterator[None]:
    """Set both, and behind it what glibc's own, which move, end at."""
    try:
        _set(mmap, trim)
        yield
    finally:
        _set(32 << 20, 64 << 20)


def _set(mmap: int, trim: int) -> None:
    with suppress(*_NO_GLIBC):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, mmap)
        ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, trim)
