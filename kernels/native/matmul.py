"""The calls of the native products; the op is in :mod:`fastdiffclip.kernels.linear`."""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels.native import loader

CODES = {torch.bfloat16: 3, torch.float32: 4}  # of dtypes, as abi.h has them
_ARGS = struct.Struct("@12q2i")  # fdc_matmul_args of abi.h: four pointers, five strides, three sizes; two codes
_BF16_ARGS = struct.Struct("@12q3i")  # fdc_matmul_bf16_args: five pointers, four strides, three sizes; three codes


@functools.cache
def outruns_torch(dtype: torch.dtype) -> bool:
    """Whether torch's product of that dtype is the slower one here: on AMD processors with AVX-512.

    In float32 torch's MKL uses half the width of their registers; in bfloat16, where the processor multiplies it,
    oneDNN waits more for memory.
    """
    if dtype == torch.float32 and not torch.backends.mkl.is_available():
        return False
    return dtype in CODES and bool(loader.load().fdc_outruns(CODES[dtype]))


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
    _check(a, b, bias, torch.float32)
    c = torch.empty((len(a), b.shape[1]))
    call, best = loader.function("fdc_matmul")
    code = call(
        _ARGS.pack(
            *(a.data_ptr(), b.data_ptr(), 0 if bias is None else bias.data_ptr(), c.data_ptr()),
            *(*a.stride(), *b.stride(), b.shape[1], *a.shape, b.shape[1]),
            *(torch.get_num_threads(), best if isa is None else loader.ISAS.index(isa)),
        )
    )
    loader.require_done(code, "product", isa)
    return c


def matmul_bf16(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    row_sums: Tensor | None = None,
    isa: str | None = None,
) -> Tensor:
    """``a @ b + bias`` of bfloat16 CPU tensors with float32 sums; threads as in :func:`matmul`.

    Args:
        a: ``(M, K)``, b: ``(K, N)``; rows or columns contiguous. K must be even, unless rows are contiguous in b and
            columns in a. bias: ``(N,)`` float32, contiguous, or None.
        out_dtype: bfloat16 or float32.
        row_sums: ``(M,)`` float32, contiguous, gets the sums of the rows of a, whose columns are then contiguous.
        isa: as in :func:`matmul`; only ``"avx512_bf16"`` has it.

    Returns:
        ``(M, N)`` of ``out_dtype``, contiguous.

    Raises:
        ResourceError: the library is not available, memory is short or the processor does not multiply bfloat16.
        UsageError: sizes, strides, dtypes or devices do not fit.
    """
    _check(a, b, bias, torch.bfloat16)
    (rows, terms), columns = a.shape, b.shape[1]
    along, sums = a.stride(1) == 1 and (a.stride(0) != 1 or terms % 2 == 0), 0  # of one column both are 1
    if (not along and a.stride(0) != 1) or 1 not in b.stride() or out_dtype not in CODES:
        raise UsageError(
            "the bfloat16 product takes contiguous rows or columns and gives bfloat16 or float32; got strides "
            f"{a.stride()} and {b.stride()}, {out_dtype}"
        )
    if terms % 2 and (along or b.stride(1) != 1):
        raise UsageError(f"the bfloat16 product takes an even number of terms that lie side by side, not {terms}")
    if row_sums is not None:
        sums = row_sums.data_ptr()
        if along or row_sums.shape != (rows,) or row_sums.dtype != torch.float32 or not row_sums.is_contiguous():
            raise UsageError("row_sums must be (M,) float32, contiguous, and the columns of a contiguous")
    c = torch.empty((rows, columns), dtype=out_dtype)
    call, best = loader.function("fdc_matmul_bf16")
    code = call(
        _BF16_ARGS.pack(
            *(a.data_ptr(), b.data_ptr(), 0 if bias is None else bias.data_ptr(), c.data_ptr(), sums),
            *(*a.stride(), *b.stride(), rows, terms, columns, CODES[out_dtype]),
            *(torch.get_num_threads(), best if isa is None else loader.ISAS.index(isa)),
        )
    )
    loader.require_done(code, "product", isa or "avx512_bf16")
    return c


def _check(a: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    if any(x.dtype != dtype or x.device.type != "cpu" for x in (a, b)) or 0 in (*a.shape, *b.shape):
        raise UsageError(
            f"the native product takes {dtype} CPU tensors that are not empty; got {a.dtype} {tuple(a.shape)} by "
            f"{b.dtype} {tuple(b.shape)}"
        )
    fits = bias is None or (bias.shape == b.shape[1:] and bias.dtype == torch.float32 and bias.is_contiguous())
    if a.ndim != 2 or b.ndim != 2 or len(b) != a.shape[1] or not fits:
        raise UsageError(f"sizes of a product do not fit: {tuple(a.shape)} by {tuple(b.shape)}")
