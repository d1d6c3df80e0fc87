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
import contextlib, ctypes, resource
from fastdiffclip import heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults():
    '''Of writing 64 MiB, after as much was freed.'''
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc({LARGE})
        libc.memset(block, 1, {LARGE})
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
with heap.bounded():
    print(faults())
with contextlib.suppress(ValueError), heap.kept():
    print(faults())
    raise ValueError
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_inside_large_blocks_come_from_memory_that_is_there() -> None:
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
