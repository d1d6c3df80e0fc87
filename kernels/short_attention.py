"""Attention for windows: few tokens, small heads; softmax(q k^T * scale) v with padding tokens masked."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import dispatch, reference

HEAD_DIMS = range(8, 65, 8)
MOST_TOKENS = 256
DTYPES = {
    "native": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def short_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Multi-head attention over short sequences.

    Args:
        q: ``(B, Lq, H, D)``; k, v: ``(B, L, H, D)``; float32, bfloat16 or float16; any strides.
        lengths: ``(B,)`` int; tokens from there on are padding and get no attention. None: all tokens count. A
            sample whose length is 0 comes out as zeros.
        scale: factor on the scores; None for ``1 / sqrt(D)``.
        impl: see :mod:`fastdiffclip.kernels.dispatch`.

    Returns:
        ``(B, Lq, H, D)`` in the dtype of ``v``, differentiable with respect to q, k and v.

    Raises:
        UsageError: shapes or dtypes do not fit.
    """
    if q.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise UsageError(
            f"q, k, v must be (B, L, H, D) with equal B, H, D; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise UsageError(f"q, k, v must share one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise UsageError(f"q, k, v must be on one device; got {q.device}, {k.device}, {v.device}")
    return _dispatch(q, k, v, lengths, scale, impl)


def short_attention_packed(
    qkv: Tensor, *, lengths: Tensor | None = None, scale: float | None = None, impl: str | None = None
) -> Tensor:
    """Self-attention of the three parts of one projection.

    ``short_attention(*qkv.unbind(2))``, with a gradient that is written as one tensor instead of put together from
    three.

    Args:
        qkv: ``(B, L, 3, H, D)``: queries, keys and values; otherwise as :func:`short_attention`.

    Returns:
        ``(B, L, H, D)``, differentiable with respect to ``qkv``.

    Raises:
        UsageError: shapes or dtypes do not fit.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3 or not qkv.is_floating_point():
        raise UsageError(f"qkv must be a floating tensor (B, L, 3, H, D); got {qkv.dtype} {tuple(qkv.shape)}")
    return _dispatch(qkv, None, None, lengths, scale, impl)


def _dispatch(
    q: Tensor, k: Tensor | None, v: Tensor | None, lengths: Tensor | None, scale: float | None, impl: str | None
) -> Tensor:
    """The implementation that is asked for or the best one; without k and v, ``q`` is the packed projection."""
    if lengths is not None and (lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64)):
        raise UsageError(f"lengths must be an integer tensor of shape ({len(q)},); got {tuple(lengths.shape)}")
    if lengths is not None and lengths.device != q.device:
        raise UsageError(f"lengths must be on {q.device} like the queries; it is on {lengths.device}")
    head_dim = q.shape[-1]
    reasons = _unsupported(q.dtype, q.shape[1], (q if k is None else k).shape[1], head_dim)
    run = dispatch.pick("short_attention", impl, q.device, reasons)
    return run(q, k, v, lengths, head_dim**-0.5 if scale is None else scale)


def _unsupported(dtype: torch.dtype, queries: int, keys: int, head_dim: int) -> dict[str, str]:
    """Implementation to reason, for shapes and dtypes that it does not take."""
    if head_dim not in HEAD_DIMS:
        return dict.fromkeys(DTYPES, f"it takes head dimensions 8, 16, ... 64, not {head_dim}")
    if not (1 <= queries <= MOST_TOKENS and 1 <= keys <= MOST_TOKENS):
        return dict.fromkeys(DTYPES, f"it takes 1 to {MOST_TOKENS} tokens, not {queries} queries and {keys} keys")
    return {
        impl: f"it takes {' and '.join(str(known).removeprefix('torch.') for known in known_dtypes)}, not {dtype}"
        for impl, known_dtypes in DTYPES.items()
        if dtype not in known_dtypes
    }


def _run(impl: str, q: Tensor, k: Tensor | None, v: Tensor | None, lengths: Tensor | None, scale: float) -> Tensor:
    if torch.compiler.is_compiling() or type(q) not in (Tensor, torch.nn.Parameter):  # fake tensors have no memory
        return _forward_op(q, k, v, lengths, scale, impl)[0]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v)):
        return _Attention.apply(q, k, v, lengths, scale, impl)
    return _forward(q, k, v, lengths, scale, impl)[0]


@functools.cache
def _launcher(impl: str) -> ModuleType:
    from importlib import import_module

    return import_module(f"fastdiffclip.kernels.{impl}.short_attention")


def _forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, lengths: Tensor | None, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    """Output, and ``(B, H, Lq, 2)`` float32 of which the implementation's backward pass knows the meaning."""
    found: tuple[Tensor, Tensor] = _launcher(impl).forward(q, k, v, lengths, scale)
    return found


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    stats: Tensor,
    lengths: Tensor | None,
    scale: float,
    impl: str,
) -> list[Tensor]:
    """Gradients of q, k and v, or the one of the packed projection."""
    grads: list[Tensor] = _launcher(impl).backward(grad_out, q, k, v, out, stats, lengths, scale)
    return grads


@torch.library.custom_op("fastdiffclip::short_attention", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor | None, v: Tensor | None, lengths: Tensor | None, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, lengths, scale, impl)


@torch.library.custom_op("fastdiffclip::short_attention_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    stats: Tensor,
    lengths: Tensor | None,
    scale: float,
    impl: str,
) -> list[Tensor]:
    return _backward(grad_out, q, k, v, out, stats, lengths, scale, impl)


@_forward_op.register_fake
def _(
    q: Tensor, k: Tensor | None, v: Tensor | None, lengths: Tensor | None, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, head_dim = q.shape[0], q.shape[1], q.shape[-2], q.shape[-1]
    out = q.new_empty((batch, queries, heads, head_dim))
    return out, q.new_empty((batch, heads, queries, 2), dtype=torch.float32)


@_backward_op.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    stats: Tensor,
    lengths: Tensor | None,
    scale: float,
    impl: str,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v) if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lengths, ctx.scale, ctx.impl = inputs
    # The output is kept by the layer behind in any case: its weight's gradient needs it.
    ctx.save_for_backward(q, k, v, *output, lengths)


def _gradients(ctx: Any, grad_out: Tensor, backward: Any) -> tuple[Tensor | None, ...]:
    q, k, v, out, stats, lengths = ctx.saved_tensors
    grads = backward(grad_out, q, k, v, out, stats, lengths, ctx.scale, ctx.impl)
    return *grads, *(None,) * (6 - len(grads))


def _differentiate(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad_out, _backward_op)


_forward_op.register_autograd(_differentiate, setup_context=_save)


class _Attention(torch.autograd.Function):
    """The op without the dispatcher, whose round trip costs a tenth of a small batch."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor | None, v: Tensor | None, lengths: Tensor | None, scale: float, impl: str
    ) -> Tensor:
        output = _forward(q, k, v, lengths, scale, impl)
        _save(ctx, (q, k, v, lengths, scale, impl), output)
        return output[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_out, _backward)


dispatch.register(
    "short_attention",
    {
        "reference": reference.short_attention,
        "native": functools.partial(_run, "native"),
        "triton": functools.partial(_run, "triton"),
    },
)
