"""A kernel with its compile-time settings, as a launcher runs it and as it is compiled where no device is."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastdiffclip.kernels import triton as ours

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint16: "*u16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Launch:
    """A kernel, the values of its ``tl.constexpr`` parameters and its launch settings."""

    kernel: Any
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 2

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Launch on ``grid`` with the other parameters in order, the first a tensor; an empty grid launches nothing.

        Triton launches on the current device, which need not be the one of the tensors.
        """
        if 0 in grid:
            return
        there = torch.cuda.device(arguments[0].device) if arguments[0].is_cuda else contextlib.nullcontext()
        with there:
            self.kernel[grid](*arguments, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)


@dataclass(frozen=True)
class OfflineCase:
    """What is compiled for a GPU that is not there.

    Attributes:
        name: as the table of resources shows it, for example ``visible_noise uint16 -> bf16, 11 x 11``.
        launch: kernel and settings, from the same function that the launcher takes them from.
        types: Triton type of each parameter that is no constant, in order: ``"*fp32"``, ``"i32"``, ...
        may_spill: a size beyond those for which registers must suffice.
    """

    name: str
    launch: Launch
    types: Mapping[str, str]
    may_spill: bool = field(default=False)


def exact_products() -> bool:
    """Whether ``tl.dot`` must be given float32: Triton's interpreter does not multiply bfloat16 correctly."""
    return ours.interpreted()


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least ``n`` (``n >= 1``); what block sizes have to be."""
    return 1 << (n - 1).bit_length()
