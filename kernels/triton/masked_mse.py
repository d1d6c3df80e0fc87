"""``masked_mse`` on a GPU: loss and gradient in one pass over the prediction, the target read from the scene.

What bounds it: the bytes. Each prediction is read once, each stored number of the window once, each gradient is
written once: 10 bytes a value in float32 over a uint16 scene, 6 in bfloat16. All that is known per token (its pixel,
whether it is seen, valid or padding) is worked out once per program; a tile is then a run of vectors of neighbouring
channels, flat over tokens and channels, so that a warp reads and writes neighbouring vectors of 16 bytes.

Shape suffixes: L tokens of the window (to a power of two), G groups of 16 tokens, T a token of a group, V visible slots
(to a power of two), Q vectors of a tile, C the channels of a vector.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiffclip.kernels.flat_scene import PIXEL_DTYPES, FlatScene
from fastdiffclip.kernels.triton.launch import POINTERS, Launch, OfflineCase, next_power_of_2
from fastdiffclip.kernels.triton.scene_gather import normalised, token_pixels

_SCALED = 4096  # values of a gradient that one program multiplies


@triton.jit
def _seen(ids, slot_V, VISIBLE: tl.constexpr, BLOCK_L: tl.constexpr):
    """1 for the tokens that ``ids`` name, each once; other numbers name none."""
    GROUPS: tl.constexpr = BLOCK_L // 16
    id_V = tl.load(ids + slot_V, mask=slot_V < VISIBLE, other=-1)
    own_GV = tl.arange(0, GROUPS)[:, None] == (id_V >> 4)[None, :]
    bits_G = tl.sum(tl.where(own_GV, (1 << (id_V & 15))[None, :], 0), axis=1)
    return tl.reshape((bits_G[:, None] >> tl.arange(0, 16)[None, :]) & 1, [BLOCK_L])


@triton.jit(do_not_specialize=["pixel_count", "scenes", "rows"])
def _masked_mse(
    prediction,
    pixels,
    scale,
    offset,
    valid,
    extents,
    centres,
    ids,
    valid_rows,
    total_rows,
    partial,
    grad,
    pixel_count,
    scenes,
    rows,
    masked_weight,
    visible_weight,
    WINDOW: tl.constexpr,
    CHANNELS: tl.constexpr,
    VISIBLE: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_VALID_ROWS: tl.constexpr,
    HAS_TOTAL_ROWS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    VECTOR: tl.constexpr,
    TILES: tl.constexpr,
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)  # rows may pass 65,535, and their values 2**31
    TOKENS: tl.constexpr = WINDOW * WINDOW
    VECTORS: tl.constexpr = CHANNELS // VECTOR  # of a token
    token_L = tl.arange(0, BLOCK_L)
    pixel_L, valid_L = token_pixels(token_L, row, centres, extents, valid, scenes, pixel_count, WINDOW, HAS_VALID)
    real, total = rows, rows
    if HAS_VALID_ROWS:
        real = tl.load(valid_rows)
        total = real
    if HAS_TOTAL_ROWS:
        total = tl.load(total_rows)
    counted_L = valid_L & (token_L < tl.where(row < real, TOKENS, 0))
    seen_L = _seen(ids + row * VISIBLE, tl.arange(0, BLOCK_V), VISIBLE, BLOCK_L)
    # Both counts of the window in one sum: the visible tokens above bit 16.
    both = tl.sum(tl.where(counted_L, 1 + (seen_L << 16) - seen_L, 0))
    share = 1.0 / (TOKENS * CHANNELS) / tl.maximum(total, 1).to(tl.float32)
    masked_factor = masked_weight * ((TOKENS - VISIBLE) * share) / tl.maximum(both & 0xFFFF, 1).to(tl.float32)
    visible_factor = visible_weight * (VISIBLE * share) / tl.maximum(both >> 16, 1).to(tl.float32)
    packed_L = (pixel_L << 2) | tl.where(counted_L, 1 + seen_L, 0)  # one trip through shared memory per tile

    prediction += row * (TOKENS * CHANNELS)
    grad += row * (TOKENS * CHANNELS)
    loss_Q = tl.zeros([BLOCK_Q], tl.float32)
    for i in range(TILES):
        flat_Q = (split * TILES + i) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        inside_Q = flat_Q < TOKENS * VECTORS
        packed_Q = tl.gather(packed_L, tl.minimum(flat_Q // VECTORS, TOKENS - 1), 0)
        kind_Q = (packed_Q & 3).to(tl.int32)
        factor_Q = tl.where(kind_Q == 2, visible_factor, masked_factor)
        # Tokens that do not count are not read: the difference is that of zeros, and weighs nothing.
        factor_Q = tl.where(kind_Q == 0, 0.0, factor_Q)
        live_QC = (inside_Q & (kind_Q != 0))[:, None]
        place_QC = (flat_Q * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
        channel_QC = (flat_Q % VECTORS * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
        target_QC = normalised(pixels, scale, offset, (packed_Q >> 2)[:, None], channel_QC, live_QC, CHANNELS)
        difference_QC = tl.load(prediction + place_QC, mask=live_QC, other=0.0).to(tl.float32) - target_QC
        loss_Q += factor_Q * tl.sum(difference_QC * difference_QC, axis=1)
        if WITH_GRAD:
            grad_QC = (2.0 * factor_Q)[:, None] * difference_QC
            tl.store(grad + place_QC, grad_QC.to(grad.dtype.element_ty), mask=inside_Q[:, None])
    tl.store(partial + row * tl.num_programs(1) + split, tl.sum(loss_Q))


@triton.jit(do_not_specialize=["count"])
def _scale_in_place(values, factor, count, BLOCK: tl.constexpr):
    """``values *= factor``; with a factor of 1, the usual one, no value is touched."""
    by = tl.load(factor)
    if by != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        scaled = tl.load(values + place, mask=place < count, other=0.0).to(tl.float32) * by
        tl.store(values + place, scaled.to(values.dtype.element_ty), mask=place < count)


def settings(
    rows: int,
    dtype: torch.dtype,
    *,
    window: int,
    channels: int,
    visible: int,
    with_grad: bool,
    has_valid: bool,
    has_valid_rows: bool,
    has_total_rows: bool,
) -> tuple[Launch, int]:
    """Kernel and settings for ``rows`` windows, and into how many programs each window is split.

    A vector has 16 bytes of the prediction, or as many channels as divide their number. 8 programs of 256 lanes fill a
    multiprocessor; with fewer windows than that for each of 128 multiprocessors a window is split, since bytes on
    their way hide each other's latency.
    """
    vector = next(v for v in (16 // dtype.itemsize, 4, 2, 1) if channels % v == 0)
    block_l = max(16, next_power_of_2(window * window))
    vectors = window * window * channels // vector
    warps = 8 if vectors >= 1024 or block_l > 256 else 4
    block = min(32 * warps, next_power_of_2(vectors))
    tiles = -(-vectors // block)
    splits = min(tiles, max(1, 1024 // next_power_of_2(max(rows, 1))))  # few values, each is compiled
    constants = dict(
        WINDOW=window,
        CHANNELS=channels,
        VISIBLE=visible,
        WITH_GRAD=with_grad,
        HAS_VALID=has_valid,
        HAS_VALID_ROWS=has_valid_rows,
        HAS_TOTAL_ROWS=has_total_rows,
        BLOCK_L=block_l,
        BLOCK_V=next_power_of_2(max(1, visible)),
        BLOCK_Q=block,
        VECTOR=vector,
        TILES=-(-tiles // splits),
    )
    return Launch(_masked_mse, constants, num_warps=warps), splits


def masked_mse(
    prediction_BLC: Tensor,
    scene: FlatScene,
    centres: Tensor,
    ids_BV: Tensor,
    *,
    window: int,
    masked_weight: float,
    visible_weight: float,
    valid_rows: Tensor | None,
    total_rows: Tensor | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss and, ``with_grad``, its gradient of :mod:`fastdiffclip.kernels.masked_mse`; nothing waits for the device.

    Beside its two results it allocates one float32 per program, which are summed in a fixed order.

    Returns:
        Scalar float32 loss and the gradient in the shape and dtype of the prediction, without ``with_grad`` an empty
        tensor.
    """
    rows, _, channels = prediction_BLC.shape
    launch, splits = settings(
        rows,
        prediction_BLC.dtype,
        window=window,
        channels=channels,
        visible=ids_BV.shape[1],
        with_grad=with_grad,
        has_valid=scene.valid is not None,
        has_valid_rows=valid_rows is not None,
        has_total_rows=total_rows is not None,
    )
    grad_BLC = prediction_BLC.new_empty(prediction_BLC.shape if with_grad else 0)
    partial = torch.empty((rows, splits), dtype=torch.float32, device=prediction_BLC.device)
    unused = centres  # stands for a tensor that the kernel was compiled not to read
    read = (
        *(prediction_BLC, scene.pixels, scene.scale, scene.offset, scene.valid, scene.extents),
        *(centres, ids_BV, valid_rows, total_rows),
    )
    launch(
        (rows, splits),
        *((unused if tensor is None else tensor).contiguous() for tensor in read),
        *(partial, grad_BLC),
        *(scene.pixels.shape[0], scene.extents.shape[0], rows, masked_weight, visible_weight),
    )
    return partial.sum(), grad_BLC


def scale_in_place(values: Tensor, factor: Tensor) -> Tensor:
    """Multiply contiguous ``values`` by a scalar float32 tensor, without touching them where it is 1; returns them."""
    blocks = -(-values.numel() // _SCALED)
    Launch(_scale_in_place, dict(BLOCK=_SCALED), num_warps=8)((blocks,), values, factor, values.numel())
    return values


def offline_cases() -> list[OfflineCase]:
    """All stored dtypes at the paper's shape, with and without the gradient, then shapes that differ from it."""
    paper = dict(rows=256, window=11, channels=144, visible=36)
    halves = (torch.float32, torch.bfloat16)
    kinds = [(stored, dtype, True, paper) for stored in PIXEL_DTYPES for dtype in halves]
    kinds += [(torch.uint16, dtype, False, paper) for dtype in halves] + [(torch.uint16, torch.float16, True, paper)]
    for change in (
        dict(rows=16),
        dict(rows=65_536),
        dict(channels=1),
        dict(channels=2),
        dict(channels=31),
        dict(window=3, visible=3),
        dict(window=15, visible=68),
        dict(window=31, visible=288),
        dict(window=31, visible=288, channels=1),
    ):
        kinds += [(torch.uint16, dtype, True, {**paper, **change}) for dtype in halves]
    scaling = Launch(_scale_in_place, dict(BLOCK=_SCALED), num_warps=8)
    return [_offline_case(*kind) for kind in kinds] + [
        OfflineCase(
            f"{dtype}, gradient times a scalar".replace("torch.", ""),
            scaling,
            {"values": POINTERS[dtype], "factor": "*fp32", "count": "i64"},
        )
        for dtype in halves
    ]


def _offline_case(stored: torch.dtype, dtype: torch.dtype, with_grad: bool, sizes: dict[str, int]) -> OfflineCase:
    launch, _ = settings(
        dtype=dtype, **sizes, with_grad=with_grad, has_valid=True, has_valid_rows=True, has_total_rows=True
    )
    pointers = dict(prediction=dtype, grad=dtype, pixels=stored, valid=torch.uint8, ids=torch.int32)
    pointers |= dict.fromkeys(("scale", "offset", "partial"), torch.float32)
    pointers |= dict.fromkeys(("extents", "centres", "valid_rows", "total_rows"), torch.int64)
    numbers = dict(pixel_count="i64", scenes="i32", rows="i32", masked_weight="fp32", visible_weight="fp32")
    shape = f"{sizes['window']} x {sizes['window']} x {sizes['channels']}, {sizes['visible']} visible"
    what = "loss and gradient" if with_grad else "loss"
    name = f"{stored} scene, {dtype}, {what}, {shape}, {sizes['rows']} rows".replace("torch.", "")
    return OfflineCase(name, launch, {key: POINTERS[kind] for key, kind in pointers.items()} | numbers)
