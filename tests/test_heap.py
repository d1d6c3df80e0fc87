"""Freed memory that is kept is not asked for again: the system counts the page faults."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from fastdiffclip import heap

PAGE, LARGE = 4096, 64 << 20

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")


def faults_of_taking_again() -> int:
    """Page faults of writing a tensor of 64 MiB, after some of that size were freed.

    After one is not enough: glibc before 2.38 asks for a little more than it freed, for the sake of the alignment.
    """
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(LARGE, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_inside_large_tensors_come_from_memory_that_is_there() -> None:
    heap.give_back()
    asked = faults_of_taking_again()
    with heap.kept():
        kept = faults_of_taking_again()
    again = faults_of_taking_again()
    assert asked > 0.9 * LARGE / PAGE and again > 0.9 * LARGE / PAGE
    assert kept < 0.02 * LARGE / PAGE


def test_the_settings_come_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="as it was"), heap.kept():
        raise ValueError("as it was")
    assert faults_of_taking_again() > 0.9 * LARGE / PAGE


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    heap.give_back()
    with heap.kept():
        pass
