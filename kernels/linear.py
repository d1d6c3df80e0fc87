"""A linear layer at the processor's rate: x W^T + b, forward and backward."""

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

    The native products serve layers of at least 16 rows and features on AMD processors: float32 with AVX-512, of which
    torch's MKL uses half the width, and bfloat16 (or autocast to it) with AVX512-BF16, for even numbers of features.
    Everything else is ``torch.nn.functional.linear``: other processors and devices, code that is traced.

    Args:
        x: ``(..., K)``. weight: ``(N, K)``. bias: ``(N,)`` or None.
        impl: see :mod:`fastdiffclip.kernels.dispatch`.

    Returns:
        ``(..., N)``, differentiable with respect to all three.

    Raises:
        UsageError: ``impl="native"`` and the tensors are not what the native products take.
    """
    if impl is None and (x.device.type != "cpu" or torch.compiler.is_compiling()):
        return _reference(x, weight, bias)
    dtype = _computed_in(x)
    reason = _not_native(x, weight, bias, dtype)
    if impl is None:
        impl = "reference" if reason or not _pays(x, weight, dtype) else "native"
    run = dispatch.pick("linear", impl, x.device, {"native": reason} if reason else {})
    result: Tensor = run(x, weight, bias)
    return result


def _computed_in(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _not_native(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> str:
    """Why the native products do not take these tensors, or ``""``."""
    if dtype not in (torch.float32, torch.bfloat16) or x.numel() == 0:
        return f"it takes float32 and bfloat16 that is not empty, not {dtype} {tuple(x.shape)}"
    stored = {weight.dtype} if bias is None else {weight.dtype, bias.dtype}
    if stored != {torch.float32} or x.dtype not in (dtype, torch.float32):
        return f"weights must be float32, and x float32 or {dtype}, not {x.dtype} by {weight.dtype}"
    if dtype == torch.bfloat16 and (weight.shape[0] % 2 or weight.shape[1] % 2):
        return f"in bfloat16 it takes even numbers of features, not {tuple(weight.shape)}"
    return ""


def _pays(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    if type(x) is not Tensor:
        return False
    if min(weight.shape) < SMALLEST or x.numel() < SMALLEST * x.shape[-1]:
        return False
    if dispatch.unavailable("native", x.device):
        return False
    from fastdiffclip.kernels.native.matmul import outruns_torch

    return outruns_torch(dtype)


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[-1] != weight.shape[1]:
        raise UsageError(f"the last axis of x must be {weight.shape[1]} as in the weight; got {tuple(x.shape)}")
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from fastdiffclip.kernels.native.matmul import matmul, matmul_bf16

        dtype, ctx.read = _computed_in(x), x.dtype
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        rows, bias = x.reshape(-1, x.shape[-1]), None if bias is None else bias.contiguous()
        product = matmul if dtype == torch.float32 else matmul_bf16
        return product(rows, weight.t(), bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        from fastdiffclip.kernels.native.matmul import matmul, matmul_bf16

        x, weight = ctx.saved_tensors
        grad, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        of_x, of_weight, of_bias = ctx.needs_input_grad
        if x.dtype == torch.float32:
            return (
                matmul(grad, weight).view(x.shape) if of_x else None,
                matmul(grad.t(), rows) if of_weight else None,
                grad.sum(0) if of_bias else None,
            )
        grad, sums = grad.contiguous(), grad.new_empty(grad.shape[1], dtype=torch.float32)
        return (
            matmul_bf16(grad, weight, out_dtype=ctx.read).view(x.shape) if of_x else None,
            # In its pass over the rows of grad it sums them, too.
            matmul_bf16(grad.t(), rows, out_dtype=torch.float32, row_sums=sums) if of_weight or of_bias else None,
            sums if of_bias else None,
        )


dispatch.register("linear", {"reference": _reference, "native": _native})
