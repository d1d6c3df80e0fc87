"""A residual and the LayerNorm behind it, as the blocks of a pre-norm transformer have them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import dispatch

DTYPES = (torch.float32, torch.bfloat16)


def residual_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``s = x + delta`` and ``(s - mean(s)) / sqrt(var(s) + eps) * weight + bias`` over the last axis.

    The native implementation takes one pass over memory, forward and backward, and computes in float32. Code that is
    traced is torch's own.

    Args:
        x: ``(..., D)``. delta: like x, of any floating dtype, or None: nothing is added.
        weight, bias: ``(D,)``. eps: added to the variance (the biased one).
        out_dtype: of the normed rows, in which the next layer reads them; None for torch's choice for ``s``.
        impl: see :mod:`fastdiffclip.kernels.dispatch`.

    Returns:
        ``s`` in the common dtype of x and delta, and the normed rows in ``out_dtype``; both ``(..., D)``,
        differentiable with respect to x, delta, weight and bias.

    Raises:
        UsageError: shapes, dtypes or devices do not fit, or ``impl`` cannot take them.
    """
    width = x.shape[-1:]
    if x.ndim == 0 or weight.shape != width or bias.shape != width or (delta is not None and delta.shape != x.shape):
        raise UsageError(
            f"residual_norm takes x (..., D), delta like x, weight and bias (D,); got {tuple(x.shape)}, "
            f"{None if delta is None else tuple(delta.shape)}, {tuple(weight.shape)}, {tuple(bias.shape)}"
        )
    operands = [x, weight, bias] if delta is None else [x, delta, weight, bias]
    if not all(t.is_floating_point() and t.device == x.device for t in operands):
        described = ", ".join(f"{t.dtype} on {t.device}" for t in operands)
        raise UsageError(f"residual_norm takes floating tensors on one device; got {described}")
    if impl is None and (torch.compiler.is_compiling() or type(x) is not Tensor):  # a traced tensor has no memory
        return _reference(x, delta, weight, bias, eps, out_dtype)
    run = dispatch.pick("residual_norm", impl, x.device, _unsupported(x, delta, weight, bias, out_dtype))
    result: tuple[Tensor, Tensor] = run(x, delta, weight, bias, eps, out_dtype)
    return result


def _unsupported(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, out_dtype: torch.dtype | None
) -> dict[str, str]:
    if x.shape[-1] % 8 or x.numel() == 0:
        return {"native": f"it takes rows of 8, 16, 24, ... values, not {tuple(x.shape)}"}
    if not x.dtype == weight.dtype == bias.dtype == torch.float32:
        return {"native": f"x, weight and bias must be float32, not {x.dtype}, {weight.dtype}, {bias.dtype}"}
    if (delta is not None and delta.dtype not in DTYPES) or out_dtype not in (None, *DTYPES):
        return {"native": "delta and the output must be float32 or bfloat16"}
    return {}


def _reference(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    stream = x if delta is None else x + delta
    normed = F.layer_norm(stream, weight.shape, weight, bias, eps)
    return stream, normed if out_dtype is None else normed.to(out_dtype)


def _native(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    from fastdiffclip.kernels.native.residual_norm import forward

    operands = (x, delta, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        return _ResidualNorm.apply(*operands, eps, out_dtype or torch.float32)
    return forward(*operands, eps, out_dtype or torch.float32)[:2]


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        from fastdiffclip.kernels.native.residual_norm import forward

        stream, y, stats = forward(x, delta, weight, bias, eps, out_dtype)
        ctx.save_for_backward(stream, stats, weight)
        ctx.delta_dtype = None if delta is None else delta.dtype
        ctx.set_materialize_grads(False)
        return stream, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_stream: Tensor | None, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        from fastdiffclip.kernels.native.residual_norm import backward

        if grad_y is None:  # the normed rows lead nowhere
            of_delta = None if ctx.delta_dtype is None or grad_stream is None else grad_stream.to(ctx.delta_dtype)
            return grad_stream, of_delta, None, None, None, None
        stream, stats, weight = ctx.saved_tensors
        of_x, of_delta, (of_weight, of_bias) = backward(grad_stream, grad_y, stream, stats, weight, ctx.delta_dtype)
        return of_x, of_delta, of_weight, of_bias, None, None


dispatch.register("residual_norm", {"reference": _reference, "native": _native})
