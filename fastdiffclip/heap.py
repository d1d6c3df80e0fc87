"""What the C library does with memory that was freed. glibc's public settings; other C libraries are left alone."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
_USUAL = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}  # where glibc's own moving thresholds end
_KEEP = 1 << 30
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
    with suppress(*_NO_GLIBC):
        for threshold in _USUAL:
            ctypes.CDLL(None).mallopt(threshold, _KEEP)
    try:
        yield
    finally:
        with suppress(*_NO_GLIBC):
            for threshold, usual in _USUAL.items():
                ctypes.CDLL(None).mallopt(threshold, usual)
