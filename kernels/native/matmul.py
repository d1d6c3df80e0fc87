"""The call of the native float32 product; the op is in :mod:`fastdiffclip.kernels.linear`."""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from fastdiffclip.errors import ResourceError, UsageError
from fastdiffclip.kernels.native import loader

_ARGS = struct.Struct("@12q2i")  # fdc_matmul_args of abi.h: four pointers, five strides, three sizes; two codes
_NO_MEMORY, _NO_ISA = -1, -2


@functools.cache
def outruns_mkl() -> bool:
    """Whether torch's MKL is the slower one here: on AMD processors with AVX-512, of which it uses half the width."""
    return torch.backends.mkl.is_available() and bool(loader.load().fdc_outruns_mkl())


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None, isa: str | None = None) -> Tensor:
    """``a @ b + bias`` of float32 CPU tensors, on ``torch.get_num_threads()`` threads; the same bits for every number.

    Args:
        a: ``(M, K)``, b: ``(K, N)``: any strides; N, K and M at least 1. bias: ``(N,)``, contiguous, or None.
        isa: a name out of ``loader.ISAS``; None takes the processor's best.

    Returns:
        ``(M, N)``, contiguous.

    Raises:
        ResourceError: the library is not available, memory is short or the processor lacks ``isa``.
        UsageError: sizes, dtypes or devices do not fit.
    """
    (rows, terms), columns = a.shape, b.shape[1]
    operands = (a, b) if bias is None else (a, b, bias)
    if any(x.dtype != torch.float32 or x.device.type != "cpu" for x in operands) or min(rows, terms, columns) < 1:
        raise UsageError(
            f"the native product takes float32 CPU tensors that are not empty; got {tuple(a.shape)} by {tuple(b.shape)}"
        )
    if len(b) != terms or (bias is not None and (bias.shape != (columns,) or not bias.is_contiguous())):
        raise UsageError(f"sizes of a product do not fit: {tuple(a.shape)} by {tuple(b.shape)}")
    c = torch.empty((rows, columns))
    call, best = loader.function("fdc_matmul")
    code = call(
        _ARGS.pack(
            *(a.data_ptr(), b.data_ptr(), 0 if bias is None else bias.data_ptr(), c.data_ptr()),
            *(*a.stride(), *b.stride(), columns, rows, terms, columns),
            *(torch.get_num_threads(), best if isa is None else loader.ISAS.index(isa)),
        )
    )
    if code == _NO_MEMORY:
        raise ResourceError("the native product has no memory for its work space; close other programs")
    if code == _NO_ISA:
        raise ResourceError(f"this processor does not run {isa!r}; the best it runs is {loader.best_isa()!r}")
    return c
