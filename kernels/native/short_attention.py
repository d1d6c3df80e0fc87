"""The two calls of the native ``short_attention``; the op is in :mod:`fastdiffclip.kernels.short_attention`."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels.native import loader

DTYPE_CODES = {torch.bfloat16: 3, torch.float32: 4}

# fdc_short_attention_args of abi.h: eight tensors (pointer and three strides each), two pointers, five sizes; scale;
# three codes. Packed by hand: a ctypes.Structure of this size takes longer than a small batch.
_ARGS = struct.Struct("@39qf3i")
_BAD_SHAPE = -3
_ABSENT = (0, 0, 0, 0)
_CALLS = ("fdc_short_attention_forward", "fdc_short_attention_backward")


def forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, lengths: Tensor | None, scale: float, isa: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of CPU tensors, on ``torch.get_num_threads()`` threads; the same bits for every number of them.

    float32 is computed in float32. bfloat16 is too, up to the weights, which are rounded to bfloat16 before they meet
    the values where the processor multiplies bfloat16 (``avx512_bf16``).

    Args:
        q: ``(B, Lq, H, D)``; k, v: ``(B, L, H, D)``; float32 or bfloat16; D a multiple of 8 up to 64; L up to 256.
            Without k and v, q is ``(B, L, 3, H, D)``. Any strides; the last axis is copied unless contiguous.
        lengths: ``(B,)`` int; a sample whose length is 0 gives zeros.
        isa: a name out of ``loader.ISAS``; None takes the processor's best.

    Returns:
        ``(B, Lq, H, D)`` and what :func:`backward` needs, ``(B, H, Lq, 2)`` float32: of each row what was subtracted
        from the scores (in units of log 2 where bfloat16 is multiplied) and the reciprocal sum of weights.

    Raises:
        ResourceError: the library is not available, memory is short or the processor lacks ``isa``.
        UsageError: L or D is too large.
    """
    operands = _rows(q, k, v)
    batch, queries, *_, heads, head_dim = q.shape
    out = torch.empty((batch, queries, heads, head_dim), dtype=q.dtype)
    stats = torch.empty((batch, heads, queries, 2))
    _call(0, operands, (*_strided(out), *_ABSENT, *_ABSENT, *_ABSENT, *_ABSENT), stats, lengths, scale, isa)
    return out, stats


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    stats: Tensor,
    lengths: Tensor | None,
    scale: float,
    isa: str | None = None,
) -> list[Tensor]:
    """Gradients of q, k and v, or of the packed q alone; contiguous.

    ``out`` and ``stats`` are what :func:`forward` made of the other arguments.
    """
    operands = _rows(q, k, v)
    (grad_out,) = _rows(grad_out)
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in operands]
    _call(1, operands, (*_strided(out), *_strided(grad_out), *_parts(grads)), stats, lengths, scale, isa)
    return grads


def _rows(*tensors: Tensor | None) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors if x is not None]


def _strided(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), *x.stride()[:3]


def _parts(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Pointers and strides of q, k and v, or of the three parts of a packed tensor: views would take longer."""
    if len(tensors) == 3:
        q, k, v = tensors
        return *_strided(q), *_strided(k), *_strided(v)
    batch, token, part, head, _ = tensors[0].stride()
    start, step = tensors[0].data_ptr(), part * tensors[0].element_size()
    return start, batch, token, head, start + step, batch, token, head, start + 2 * step, batch, token, head


def _call(
    direction: int,
    operands: Sequence[Tensor],
    others: tuple[int, ...],
    stats: Tensor,
    lengths: Tensor | None,
    scale: float,
    isa: str | None,
) -> None:
    counted = None if lengths is None else lengths.to(torch.int64).contiguous()
    (batch, heads, queries, _), keys, head_dim = stats.shape, operands[-1].shape[1], operands[0].shape[-1]
    call, best = loader.function(_CALLS[direction])
    packed = _ARGS.pack(
        *_parts(operands),
        *others,
        *(0 if counted is None else counted.data_ptr(), stats.data_ptr()),
        *(batch, heads, queries, keys, head_dim),
        scale,
        *(DTYPE_CODES[operands[0].dtype], torch.get_num_threads(), best if isa is None else loader.ISAS.index(isa)),
    )
    code = call(packed)
    loader.require_done(code, "short_attention", isa)
    if code == _BAD_SHAPE:
        raise UsageError(
            "the native short_attention takes up to 256 keys and head dimensions 8, 16, ... 64; "
            f"got {keys} keys of {head_dim}"
        )
