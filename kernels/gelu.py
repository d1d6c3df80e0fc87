"""The Gaussian error linear unit, exact."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import dispatch

DTYPES = (torch.float32, torch.bfloat16)


def gelu(x: Tensor, *, impl: str | None = None) -> Tensor:
    """``x Phi(x)``, Phi the distribution function of the standard normal.

    The native implementation computes in float32, within 2e-7 max(1, abs(x)) of the truth before the output is rounded;
    it serves float32 and bfloat16 on the CPU. Everything else, and code that is traced, is torch's own.

    Args:
        x: any shape, floating.
        impl: see :mod:`fastdiffclip.kernels.dispatch`.

    Returns:
        As x, differentiable.

    Raises:
        UsageError: x is not floating, or ``impl`` cannot take it.
    """
    if not x.is_floating_point():
        raise UsageError(f"x must be a floating tensor; got {x.dtype}")
    if impl is None and (torch.compiler.is_compiling() or type(x) is not Tensor):  # a traced tensor has no memory
        return F.gelu(x)
    reasons = {} if x.dtype in DTYPES else {"native": f"it takes float32 and bfloat16, not {x.dtype}"}
    result: Tensor = dispatch.pick("gelu", impl, x.device, reasons)(x)
    return result


def _native(x: Tensor) -> Tensor:
    from fastdiffclip.kernels.native.gelu import gelu as native

    return _Gelu.apply(x) if torch.is_grad_enabled() and x.requires_grad else native(x)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from fastdiffclip.kernels.native.gelu import gelu as native

        ctx.save_for_backward(x)
        return native(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        from fastdiffclip.kernels.native.gelu import gelu as native

        (x,) = ctx.saved_tensors
        return native(x, grad)


dispatch.register("gelu", {"reference": F.gelu, "native": _native})
