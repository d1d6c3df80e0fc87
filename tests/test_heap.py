"""Freed memory that is kept is not asked for again: the system counts the page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from fastdiffclip import heap

PAGE, LARGE = 4096, 64 << 20
# In a process of its own: what other tests left in the heap decides where a tensor fits.
COUNT = f"""
import contextlib, resource, torch
from fastdiffclip import heap

def faults():
    '''Fewest of writing a tensor of 64 MiB, some of that size having been freed. glibc before 2.38 asks for a little
    more than it freed, for the sake of the alignment, so the first ones do not find room.'''
    counts = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones({LARGE}, dtype=torch.uint8)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)

print(faults())
with heap.bounded():
    print(faults())
with contextlib.suppress(ValueError), heap.kept():
    print(faults())
    raise ValueError
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_inside_large_tensors_come_from_memory_that_is_there() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    asked, bounded, kept, again = map(int, done.stdout.split())
    assert min(asked, again, bounded) > 0.9 * LARGE / PAGE
    assert kept < 0.02 * LARGE / PAGE


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    heap.give_back()
    with heap.kept():
        pass
    with heap.bounded():
        pass
