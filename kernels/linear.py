"""A linear layer in float32 at the processor's rate: x W^T + b, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import dispatch

SMALLEST = 16  # features and rows: below it the products are too thin for tiles of registers


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    Unless asked for, the native product serves float32 layers of at least 16 rows and features on AMD processors with
    AVX-512, where torch's MKL computes with half of the width; everything else is ``torch.nn.functional.linear``: other
    processors and devices, autocast, code that is traced.

    Args:
        x: ``(..., K)``. weight: ``(N, K)``. bias: ``(N,)`` or None.
        impl: see :mod:`fastdiffclip.kernels.dispatch`.

    Returns:
        ``(..., N)``, differentiable with respect to all three.

    Raises:
        UsageError: ``impl="native"`` and the tensors are not float32 on the CPU.
    """
    if impl is None and torch.compiler.is_compiling():
        return _reference(x, weight, bias)
    chosen = impl or ("native" if _pays(x, weight) else "reference")
    wrong = x.dtype != torch.float32 or weight.dtype != torch.float32 or x.numel() == 0
    reasons = {"native": f"it takes float32 that is not empty, not {x.dtype} {tuple(x.shape)}"} if wrong else {}
    return dispatch.pick("linear", chosen, x.device, reasons)(x, weight, bias)


def _pays(x: Tensor, weight: Tensor) -> bool:
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    if type(x) is not Tensor or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if min(weight.shape) < SMALLEST or x.numel() < SMALLEST * x.shape[-1]:
        return False
    if dispatch.unavailable("native", x.device):
        return False
    from fastdiffclip.kernels.native.matmul import outruns_mkl

    return outruns_mkl()


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[-1] != weight.shape[1]:
        raise UsageError(f"the last axis of x must be {weight.shape[1]} as in the weight; got {tuple(x.shape)}")
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from fastdiffclip.kernels.native.matmul import matmul

        ctx.save_for_backward(x, weight)
        rows = x.reshape(-1, x.shape[-1])
        return matmul(rows, weight.t(), None if bias is None else bias.contiguous()).view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        from fastdiffclip.kernels.native.matmul import matmul

        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad_rows = grad.reshape(-1, grad.shape[-1])
        return (
            matmul(grad_rows, weight).view(x.shape) if of_x else None,
            matmul(grad_rows.t(), x.reshape(-1, x.shape[-1])) if of_weight else None,
            grad_rows.sum(0) if of_bias else None,
        )


dispatch.register("linear", {"reference": _reference, "native": _native})
