"""``short_attention`` on a GPU: one program per (sample, head).

The keys of a head fit a tile, so a row of scores is complete when it is there: softmax is exact, nothing is rescaled,
and the scores never leave the registers. The backward pass computes them again from q and k and what the forward pass
kept of each row. Queries are taken in tiles of BLOCK_Q rows; in the backward pass the gradients of keys and values stay
in registers over all of them. Where they would not fit, keys are taken in panels of BLOCK_K, and the gradient of the
queries is summed over them in memory, in float32, by the program itself, hence in one order.

What bounds it, in bfloat16 at head dimension 16, per program on a multiprocessor of an H100 (14 bytes and 16 exp a
cycle): at 37 tokens 4.7 KB take 330 cycles and 48 x 64 exp 190; at 122 tokens 15.6 KB take 1080 and 128 x 128 exp 1020.
The backward pass moves twice the bytes for as many exp. So bytes first, each moved once, then exp; the products need a
tenth of either, hence no effort to keep padding out of them. About 20 KB must be under way per multiprocessor to keep
the memory busy: eight programs or more at 37 tokens, one warp each. Several heads in one program would need the same
registers and wait for one another.

A warp owns 16 rows of a tile, so that maxima and sums stay inside it, or, where such rows would fill its registers,
four warps divide the keys (which Triton does when BLOCK_Q < BLOCK_D, hence the padding of head dimension 16 to 32).

float32 multiplies in float32, without tensor cores: the error must not exceed that of eager float32.

Shape suffixes: R rows (queries or keys), Q queries of a tile, K keys of a panel, D channels of the head, all to a power
of two.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiffclip.kernels.triton.launch import POINTERS, Launch, OfflineCase, exact_products, next_power_of_2

UNIT = tl.constexpr(8)  # strides count groups of 8 channels: the compiler then sees that rows are whole vectors

_OPERANDS = ("q", "k", "v", "grad_out", "grad_q", "grad_k")  # grad_v lies like grad_k
_STRIDES = tuple(f"{operand}_{axis}" for operand in _OPERANDS for axis in ("sample", "token", "head"))
_NUMBERS = ("heads", "queries", "keys", "scale", *_STRIDES)


@triton.jit
def _rows(base, token_stride, token_R, count, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of a head as (R, BLOCK_D), zeros beyond ``count`` and HEAD_DIM. Offsets of a view may pass 2**31."""
    channel_D = tl.arange(0, BLOCK_D)
    place_RD = base + token_R.to(tl.int64)[:, None] * token_stride * UNIT + channel_D[None, :]
    rows_RD = tl.load(place_RD, mask=(token_R < count)[:, None] & (channel_D < HEAD_DIM)[None, :], other=0.0)
    return rows_RD.to(tl.float32) if UPCAST else rows_RD


@triton.jit
def _store_rows(base, token_stride, token_R, count, rows_RD, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    channel_D = tl.arange(0, BLOCK_D)
    place_RD = base + token_R.to(tl.int64)[:, None] * token_stride * UNIT + channel_D[None, :]
    mask_RD = (token_R < count)[:, None] & (channel_D < HEAD_DIM)[None, :]
    tl.store(place_RD, rows_RD.to(base.dtype.element_ty), mask=mask_RD)


@triton.jit
def _length(lengths, sample, keys, HAS_LENGTHS: tl.constexpr):
    """How many keys of the sample count."""
    count = keys
    if HAS_LENGTHS:
        count = tl.minimum(tl.maximum(tl.load(lengths + sample), 0), keys).to(tl.int32)
    return count


@triton.jit(do_not_specialize=_NUMBERS[:13])
def _forward(
    q,
    k,
    v,
    out,
    stats,
    lengths,
    heads,
    queries,
    keys,
    scale,
    q_sample,
    q_token,
    q_head,
    k_sample,
    k_token,
    k_head,
    v_sample,
    v_token,
    v_head,
    HEAD_DIM: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample, head = program // heads, program % heads
    q += (sample * q_sample + head * q_head) * UNIT
    k += (sample * k_sample + head * k_head) * UNIT
    v += (sample * v_sample + head * v_head) * UNIT
    out += (sample * queries * heads + head) * HEAD_DIM
    stats += program * queries * 2
    count = _length(lengths, sample, keys, HAS_LENGTHS)
    key_K = tl.arange(0, BLOCK_K)
    k_KD = _rows(k, k_token, key_K, count, HEAD_DIM, BLOCK_D, UPCAST)
    v_KD = _rows(v, v_token, key_K, count, HEAD_DIM, BLOCK_D, UPCAST)
    for tile in range(TILES):
        query_Q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        q_QD = _rows(q, q_token, query_Q, queries, HEAD_DIM, BLOCK_D, UPCAST)
        score_QK = tl.dot(q_QD, tl.trans(k_KD), input_precision="ieee") * scale
        score_QK = tl.where((key_K < count)[None, :], score_QK, float("-inf"))
        most_Q = tl.max(score_QK, axis=1)
        most_Q = tl.where(most_Q > float("-inf"), most_Q, 0.0)  # no key, or nothing but NaN
        p_QK = tl.exp(score_QK - most_Q[:, None])
        inverse_Q = 1.0 / tl.where(count > 0, tl.sum(p_QK, axis=1), 1.0)
        out_QD = tl.dot(p_QK.to(v_KD.dtype), v_KD, input_precision="ieee") * inverse_Q[:, None]
        _store_rows(out, heads * (HEAD_DIM // UNIT), query_Q, queries, out_QD, HEAD_DIM, BLOCK_D)
        tl.store(stats + query_Q * 2, most_Q, mask=query_Q < queries)
        tl.store(stats + query_Q * 2 + 1, inverse_Q, mask=query_Q < queries)


@triton.jit(do_not_specialize=_NUMBERS)
def _backward(
    q,
    k,
    v,
    out,
    grad_out,
    grad_q,
    grad_k,
    grad_v,
    partial,
    stats,
    lengths,
    heads,
    queries,
    keys,
    scale,
    q_sample,
    q_token,
    q_head,
    k_sample,
    k_token,
    k_head,
    v_sample,
    v_token,
    v_head,
    grad_out_sample,
    grad_out_token,
    grad_out_head,
    grad_q_sample,
    grad_q_token,
    grad_q_head,
    grad_k_sample,
    grad_k_token,
    grad_k_head,
    HEAD_DIM: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    PANELS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample, head = program // heads, program % heads
    q += (sample * q_sample + head * q_head) * UNIT
    k += (sample * k_sample + head * k_head) * UNIT
    v += (sample * v_sample + head * v_head) * UNIT
    out += (sample * queries * heads + head) * HEAD_DIM
    partial += (sample * queries * heads + head) * HEAD_DIM
    grad_out += (sample * grad_out_sample + head * grad_out_head) * UNIT
    grad_q += (sample * grad_q_sample + head * grad_q_head) * UNIT
    grad_k += (sample * grad_k_sample + head * grad_k_head) * UNIT
    grad_v += (sample * grad_k_sample + head * grad_k_head) * UNIT
    stats += program * queries * 2
    out_token = heads * (HEAD_DIM // UNIT)
    count = _length(lengths, sample, keys, HAS_LENGTHS)
    for panel in range(PANELS):
        key_K = panel * BLOCK_K + tl.arange(0, BLOCK_K)
        k_KD = _rows(k, k_token, key_K, count, HEAD_DIM, BLOCK_D, UPCAST)
        v_KD = _rows(v, v_token, key_K, count, HEAD_DIM, BLOCK_D, UPCAST)
        grad_k_KD = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        grad_v_KD = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        for tile in range(TILES):
            query_Q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
            q_QD = _rows(q, q_token, query_Q, queries, HEAD_DIM, BLOCK_D, UPCAST)
            g_QD = _rows(grad_out, grad_out_token, query_Q, queries, HEAD_DIM, BLOCK_D, UPCAST)
            out_QD = _rows(out, out_token, query_Q, queries, HEAD_DIM, BLOCK_D, UPCAST)
            most_Q = tl.load(stats + query_Q * 2, mask=query_Q < queries, other=0.0)
            inverse_Q = tl.load(stats + query_Q * 2 + 1, mask=query_Q < queries, other=0.0)
            delta_Q = tl.sum(out_QD.to(tl.float32) * g_QD.to(tl.float32), axis=1)
            score_QK = tl.dot(q_QD, tl.trans(k_KD), input_precision="ieee") * scale
            p_QK = tl.exp(score_QK - most_Q[:, None]) * inverse_Q[:, None]
            p_QK = tl.where((key_K < count)[None, :], p_QK, 0.0)
            grad_v_KD = tl.dot(tl.trans(p_QK.to(v_KD.dtype)), g_QD, grad_v_KD, input_precision="ieee")
            change_QK = tl.dot(g_QD, tl.trans(v_KD), input_precision="ieee")
            ds_QK = (p_QK * (change_QK - delta_Q[:, None])).to(k_KD.dtype)
            grad_k_KD = tl.dot(tl.trans(ds_QK), q_QD, grad_k_KD, input_precision="ieee")
            grad_q_QD = tl.dot(ds_QK, k_KD, input_precision="ieee") * scale
            if PANELS == 1:
                _store_rows(grad_q, grad_q_token, query_Q, queries, grad_q_QD, HEAD_DIM, BLOCK_D)
            else:  # the sum over panels goes through `partial`, and the last one rounds it
                if panel > 0:
                    grad_q_QD += _rows(partial, out_token, query_Q, queries, HEAD_DIM, BLOCK_D, UPCAST)
                if panel < PANELS - 1:
                    _store_rows(partial, out_token, query_Q, queries, grad_q_QD, HEAD_DIM, BLOCK_D)
                else:
                    _store_rows(grad_q, grad_q_token, query_Q, queries, grad_q_QD, HEAD_DIM, BLOCK_D)
        _store_rows(grad_k, grad_k_token, key_K, keys, grad_k_KD * scale, HEAD_DIM, BLOCK_D)
        _store_rows(grad_v, grad_k_token, key_K, keys, grad_v_KD, HEAD_DIM, BLOCK_D)
        if PANELS > 1:
            tl.debug_barrier()  # another thread may read a partial sum than the one that wrote it


def _launch(backward: bool, queries: int, keys: int, head_dim: int, dtype: torch.dtype, has_lengths: bool) -> Launch:
    """Kernel, tiles and warps for a size."""
    width, panel = max(16, next_power_of_2(head_dim)), max(16, next_power_of_2(keys))
    rows, warps = 16, 4
    if dtype == torch.float32:
        if backward:
            panel = min(panel, 32 if width == 64 else 64)
            warps = 8 if width == 64 else 2 if width == 16 and keys <= 64 else 4
        else:
            warps = min(8, max(2, panel // 32) * (2 if width == 64 else 1))
    else:
        if panel > (64 if backward else 128):
            width = max(32, width)
        if backward:
            panel = min(panel, 128)
            warps = 8 if width == 64 and panel == 128 else 4
        if width == 16:
            rows = 16 if keys <= 64 else min(64, max(16, next_power_of_2(queries)))
            warps = rows // 16
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "HAS_LENGTHS": has_lengths,
        "UPCAST": exact_products(),
        "BLOCK_Q": rows,
        "BLOCK_K": panel,
        "BLOCK_D": width,
        "TILES": triton.cdiv(queries, rows),
    }
    if backward:
        return Launch(_backward, constants | {"PANELS": triton.cdiv(keys, panel)}, warps, num_stages=1)
    return Launch(_forward, constants, warps)


def _parts(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with rows of whole vectors, copied where they have none; those of a packed q without k and v."""
    if k is None or v is None:
        q, k, v = q.unbind(2)
    return _vectors(q), _vectors(k), _vectors(v)


def _vectors(x: Tensor) -> Tensor:
    whole = x.stride(3) == 1 and not any(stride % 8 for stride in x.stride()[:3]) and x.data_ptr() % 16 == 0
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride // 8 for x in tensors for stride in x.stride()[:3]]


def forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of ``(B, Lq, H, D)`` queries, or of the packed ``(B, L, 3, H, D)``; any strides.

    Returns:
        ``(B, Lq, H, D)`` and what :func:`backward` needs, ``(B, H, Lq, 2)`` float32: of each row the largest score and
        the reciprocal sum of weights.
    """
    q, k, v = _parts(q, k, v)
    batch, queries, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    stats = torch.empty((batch, heads, queries, 2), device=q.device)
    launch = _launch(False, queries, k.shape[1], head_dim, q.dtype, lengths is not None)
    counted = stats if lengths is None else lengths.contiguous()
    launch(
        (batch * heads,),
        *(q, k, v, out, stats, counted),
        *(heads, queries, k.shape[1], scale, *_strides(q, k, v)),
    )
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
) -> list[Tensor]:
    """Gradients of q, k and v, or of the packed q alone; contiguous. ``out`` and ``stats`` are :func:`forward`'s."""
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v) if x is not None]
    grad_q, grad_k, grad_v = grads if len(grads) == 3 else grads[0].unbind(2)
    q, k, v = _parts(q, k, v)
    grad_out = _vectors(grad_out)
    batch, queries, heads, head_dim = q.shape
    launch = _launch(True, queries, k.shape[1], head_dim, q.dtype, lengths is not None)
    partial = stats
    if launch.constants["PANELS"] > 1:
        partial = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    counted = stats if lengths is None else lengths.contiguous()
    launch(
        (batch * heads,),
        *(q, k, v, out, grad_out, grad_q, grad_k, grad_v, partial, stats, counted),
        *(heads, queries, k.shape[1], scale, *_strides(q, k, v, grad_out, grad_q, grad_k)),
    )
    return grads


def offline_cases() -> list[OfflineCase]:
    """Both directions, at the lengths of both stages and the longest one, and of the class token alone."""
    tokens = [(n, n, head_dim) for n in (37, 122, 226) for head_dim in (8, 16, 32, 64)] + [(1, 37, 16), (1, 122, 16)]
    cases = []
    for dtype, (queries, keys, head_dim), with_backward in product(
        (torch.float32, torch.bfloat16), tokens, (False, True)
    ):
        launch = _launch(with_backward, queries, keys, head_dim, dtype, has_lengths=True)
        types = dict.fromkeys(launch.kernel.arg_names, POINTERS[dtype]) | dict.fromkeys(_NUMBERS, "i32")
        types |= {"scale": "fp32", "partial": "*fp32", "stats": "*fp32", "lengths": "*i64"}
        name = f"{str(dtype).removeprefix('torch.')}, {queries} of {keys} tokens x {head_dim}"
        cases.append(OfflineCase(name, launch, types))
    return cases
