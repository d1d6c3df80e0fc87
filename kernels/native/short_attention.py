"""The native ``short_attention``: its two calls, and the op that autograd and ``torch.compile`` see."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiffclip.errors import ResourceError
from fastdiffclip.kernels.native import loader

HEAD_DIMS = range(8, 65, 8)
MOST_TOKENS = 256
DTYPE_CODES = {torch.bfloat16: 3, torch.float32: 4}

# fdc_short_attention_args of abi.h: q, k, v, grad_out (pointer and three strides each), six pointers, five sizes;
# scale; three codes. Packed by hand: a ctypes.Structure of this size takes longer than a small batch.
_ARGS = struct.Struct("@27qf3i")
_NO_MEMORY, _NO_ISA = -1, -2


@functools.cache
def _functions() -> tuple[Callable[[bytes], int], Callable[[bytes], int], int]:
    library = loader.load()
    calls = library.fdc_short_attention_forward, library.fdc_short_attention_backward
    for call in calls:
        call.restype, call.argtypes = ctypes.c_int64, [ctypes.c_char_p]
    return *calls, library.fdc_best_isa()


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, isa: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of CPU tensors, on ``torch.get_num_threads()`` threads; the same bits for every number of them.

    float32 is computed in float32. bfloat16 is too, up to the weights, which are rounded to bfloat16 before they meet
    the values where the processor multiplies bfloat16 (``avx512_bf16``).

    Args:
        q: ``(B, Lq, H, D)``; k, v: ``(B, L, H, D)``; float32 or bfloat16; D in :data:`HEAD_DIMS`; 1 to
            :data:`MOST_TOKENS` tokens. Any strides; the last axis is copied unless contiguous.
        lengths: ``(B,)`` int; a sample whose length is 0 gives zeros.
        isa: a name out of ``loader.ISAS``; None takes the processor's best.

    Returns:
        ``(B, Lq, H, D)`` and what :func:`backward` needs, ``(B, H, Lq, 2)`` float32: the largest score and the
        reciprocal sum of weights of each row, the former in units of log 2 where bfloat16 is multiplied.

    Raises:
        ResourceError: the library is not available, memory is short or the processor lacks ``isa``.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, queries, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype)
    stats = torch.empty((batch, heads, queries, 2))
    call, _, best = _functions()
    counted = _counted(lengths)
    _check(call(_pack(q, k, v, None, counted, out, stats, (0, 0, 0), scale, best, isa)), isa)
    return out, stats


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stats: Tensor,
    lengths: Tensor | None,
    scale: float,
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous; arguments as in :func:`forward`, which also made ``stats``."""
    q, k, v, grad_out = _rows(q), _rows(k), _rows(v), _rows(grad_out)
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=q.dtype) for x in (q, k, v))
    pointers = grad_q.data_ptr(), grad_k.data_ptr(), grad_v.data_ptr()
    _, call, best = _functions()
    counted = _counted(lengths)
    _check(call(_pack(q, k, v, grad_out, counted, None, stats, pointers, scale, best, isa)), isa)
    return grad_q, grad_k, grad_v


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _counted(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to(torch.int64).contiguous()


def _strided(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), *x.stride()[:3]


def _pack(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor | None,
    lengths: Tensor | None,
    out: Tensor | None,
    stats: Tensor,
    grads: tuple[int, int, int],
    scale: float,
    best: int,
    isa: str | None,
) -> bytes:
    batch, queries, heads, head_dim = q.shape
    return _ARGS.pack(
        *_strided(q),
        *_strided(k),
        *_strided(v),
        *((0, 0, 0, 0) if grad_out is None else _strided(grad_out)),
        0 if lengths is None else lengths.data_ptr(),
        0 if out is None else out.data_ptr(),
        stats.data_ptr(),
        *grads,
        *(batch, heads, queries, k.shape[1], head_dim),
        scale,
        *(DTYPE_CODES[q.dtype], torch.get_num_threads(), best if isa is None else loader.ISAS.index(isa)),
    )


def _check(code: int, isa: str | None) -> None:
    if code == _NO_MEMORY:
        raise ResourceError("the native short_attention has no memory for its work space; close other programs")
    if code == _NO_ISA:
        raise ResourceError(f"this processor does not run {isa!r}; the best it runs is {loader.best_isa()!r}")


@torch.library.custom_op("fastdiffclip::short_attention_cpu", mutates_args=(), device_types="cpu")
def _forward_op(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, lengths, scale)


@torch.library.custom_op("fastdiffclip::short_attention_cpu_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, stats: Tensor, lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad_out, q, k, v, stats, lengths, scale)


@_forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries, 2), dtype=torch.float32)


@_backward_op.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, stats: Tensor, lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lengths, scale = inputs
    ctx.save_for_backward(q, k, v, lengths, output[1])
    ctx.scale = scale


def _differentiate(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, lengths, stats = ctx.saved_tensors
    return *_backward_op(grad_out, q, k, v, stats, lengths, ctx.scale), None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)


class _Attention(torch.autograd.Function):
    """The op without the dispatcher, whose round trip costs a tenth of a small batch."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
        out, stats = forward(q, k, v, lengths, scale)
        ctx.save_for_backward(q, k, v, lengths, stats)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lengths, stats = ctx.saved_tensors
        return *backward(grad_out, q, k, v, stats, lengths, ctx.scale), None, None


def short_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
    """Differentiable :func:`forward`; see :func:`fastdiffclip.kernels.short_attention.short_attention`."""
    if torch.compiler.is_compiling() or type(q) not in (Tensor, torch.nn.Parameter):  # fake tensors have no memory
        return _forward_op(q, k, v, lengths, scale)[0]
    return _Attention.apply(q, k, v, lengths, scale)
