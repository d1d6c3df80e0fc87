"""Attention for windows: few tokens, small heads; softmax(q k^T * scale) v with padding tokens masked."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import dispatch, native, reference
from fastdiffclip.kernels.native.short_attention import DTYPE_CODES, HEAD_DIMS, MOST_TOKENS

dispatch.register("short_attention", {"reference": reference.short_attention, "native": native.short_attention})


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
    if lengths is not None and (lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64)):
        raise UsageError(f"lengths must be an integer tensor of shape ({len(q)},); got {tuple(lengths.shape)}")
    if not q.device == k.device == v.device or (lengths is not None and lengths.device != q.device):
        raise UsageError(f"q, k, v and lengths must be on one device; got {q.device}, {k.device}, {v.device}")
    run = dispatch.pick("short_attention", impl, q.device, _unsupported(q, k))
    return run(q, k, v, lengths, q.shape[-1] ** -0.5 if scale is None else scale)


def _unsupported(q: Tensor, k: Tensor) -> dict[str, str]:
    """Implementation to reason, for shapes and dtypes that it does not take."""
    queries, keys, head_dim = q.shape[1], k.shape[1], q.shape[3]
    if q.dtype not in DTYPE_CODES:
        return {"native": f"it takes float32 and bfloat16, not {q.dtype}"}
    if head_dim not in HEAD_DIMS:
        return {"native": f"it takes head dimensions 8, 16, ... 64, not {head_dim}"}
    if not (1 <= queries <= MOST_TOKENS and 1 <= keys <= MOST_TOKENS):
        return {"native": f"it takes 1 to {MOST_TOKENS} tokens, not {queries} queries and {keys} keys"}
    return {}
