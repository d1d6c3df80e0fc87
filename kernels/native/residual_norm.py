"""The two calls of the native ``residual_norm``; the op is in :mod:`fastdiffclip.kernels.residual_norm`."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from fastdiffclip.kernels.native import loader

DTYPE_CODES = {torch.bfloat16: 3, torch.float32: 4}
_ARGS = struct.Struct("@14qf4i")  # fdc_residual_norm_args of abi.h: twelve pointers, two sizes; eps; four codes


def forward(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over CPU tensors on ``torch.get_num_threads()`` threads; the same bits for every number of them.

    Args:
        x: ``(..., D)`` float32, D a multiple of 8. delta: like x, float32 or bfloat16, or None.
        weight, bias: ``(D,)`` float32. out_dtype: float32 or bfloat16.
        isa: a name out of ``loader.ISAS``; None takes the processor's best.

    Returns:
        ``x + delta`` (x itself without delta), the normed rows, and mean and reciprocal deviation ``(rows, 2)``.

    Raises:
        ResourceError: the library is not available or the processor lacks ``isa``.
    """
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    delta = None if delta is None else delta.contiguous()
    stream = x if delta is None else torch.empty_like(x)
    y, stats = torch.empty_like(x, dtype=out_dtype), torch.empty((x.numel() // x.shape[-1], 2))
    _call(
        (x.data_ptr(), _address(delta), weight.data_ptr(), bias.data_ptr(), stream.data_ptr(), y.data_ptr()),
        (stats.data_ptr(), 0, 0, 0, 0, 0, *stats.shape[:1], x.shape[-1]),
        eps, None if delta is None else delta.dtype, out_dtype, isa,
    )  # fmt: skip
    return stream, y, stats


def backward(
    grad_stream: Tensor | None,
    grad_y: Tensor,
    stream: Tensor,
    stats: Tensor,
    weight: Tensor,
    delta_dtype: torch.dtype | None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, of delta and of weight and bias ``(2, D)``, in one pass.

    ``stream`` and ``stats`` are what :func:`forward` made; ``grad_stream`` None counts as zero.
    """
    grad_y, weight = grad_y.contiguous(), weight.contiguous()
    grad_stream = None if grad_stream is None else grad_stream.contiguous()
    grad_x, grad_pair = torch.empty_like(stream), torch.empty((2, stream.shape[-1]))
    grad_delta = torch.empty_like(stream, dtype=torch.bfloat16) if delta_dtype == torch.bfloat16 else None
    _call(
        (stream.data_ptr(), 0, weight.data_ptr(), 0, 0, 0, stats.data_ptr(), grad_y.data_ptr(), _address(grad_stream)),
        (grad_x.data_ptr(), _address(grad_delta), grad_pair.data_ptr(), *stats.shape[:1], stream.shape[-1]),
        0.0, delta_dtype, grad_y.dtype, isa,
    )  # fmt: skip
    return grad_x, grad_x if delta_dtype == torch.float32 else grad_delta, grad_pair


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _call(
    first: tuple[int, ...],
    last: tuple[int, ...],
    eps: float,
    delta_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    isa: str | None,
) -> None:
    call, best = loader.function("fdc_residual_norm")
    codes = (DTYPE_CODES[delta_dtype or torch.float32], DTYPE_CODES[out_dtype], torch.get_num_threads())
    code = call(_ARGS.pack(*first, *last, eps, *codes, best if isa is None else loader.ISAS.index(isa)))
    loader.require_done(code, "residual_norm", isa)
