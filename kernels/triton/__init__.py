"""The Triton kernels: one file per op with its kernels, its table of launch settings and its launcher.

Nothing here is imported before a launch asks for it: importing Triton takes a while, and most machines never need it.
Without a CUDA device the kernels run in Triton's interpreter, when ``TRITON_INTERPRET=1`` is set before Triton is
imported: slow, meant for tests.
"""

from __future__ import annotations

import importlib.util
import os

import torch


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter (its own switch, read here without importing it)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


def unavailable(device: torch.device) -> str:
    """Return why Triton kernels cannot run for tensors on ``device``, or ``""`` when they can."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"Triton kernels need a CUDA device, the tensors are on {device}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return ""
