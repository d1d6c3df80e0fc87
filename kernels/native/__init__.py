"""The C++ library of the kernels: its loader and one Python function per native op."""

from __future__ import annotations

from fastdiffclip.kernels.native.loader import load, status
from fastdiffclip.kernels.native.visible_noise import visible_noise

__all__ = ["load", "status", "visible_noise"]
