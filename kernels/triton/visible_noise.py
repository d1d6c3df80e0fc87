"""``visible_noise`` on a GPU: one program per window and split of its values, nothing but x_t and the ids is written.

What bounds it: a value is 4 to 6 bytes and, with its share of everything, 52 instructions, 10 of them Philox. An H200
moves some 20 bytes and issues 128 lanes per cycle and multiprocessor: 0.3 cycles of bytes, 0.4 of instructions. So
lanes must not idle: the tile is a run of counters (token, channel // 4) of the window, flat over both. A rectangle of
tokens and channels is rounded up to powers of two twice, which leaves 44 % of the lanes without work at 36 tokens of
144 channels. A counter gives the normals of 4 neighbouring channels, which one lane keeps: it loads and stores them as
one vector, and a warp's vectors are neighbours.

Shape suffixes: L tokens of the window (to a power of two), G groups of 16 tokens, V visible slots (to a power of two),
Q counters of a tile, and a last axis of the 1, 2 or 4 channels of a counter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiffclip.kernels.flat_scene import PIXEL_DTYPES, FlatScene
from fastdiffclip.kernels.triton.launch import POINTERS, Launch, OfflineCase, next_power_of_2
from fastdiffclip.kernels.triton.philox import mask_words, normals
from fastdiffclip.kernels.triton.scene_gather import clamp, normalised, token_pixels


@triton.jit
def chosen_tokens(word_L, VISIBLE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_L: tl.constexpr):
    """Which tokens have one of the ``VISIBLE`` smallest words, ties by id.

    The bound between the chosen words and the others is found 4 bits at a time; two or three times are enough until
    it falls between two words. Ranks from all pairs of tokens would need a register for each token. Of the 16 bounds
    tried at a time, the counts of two travel through the lanes in one number.
    """
    token_L = tl.arange(0, BLOCK_L)
    word_L = tl.where(token_L < TOKENS, word_L, 0xFFFFFFFF)  # behind every real token, by id if not by word
    even_D = 2 * tl.arange(0, 8).to(tl.uint32)
    bound, below, place = tl.full([], 0, tl.uint32), tl.full([], 0, tl.int32), tl.full([], 28, tl.uint32)
    while (below != VISIBLE) & (place <= 28):  # below 0 it wraps
        low_D, high_D = bound + (even_D << place), bound + ((even_D + 1) << place)
        smaller_DL = (word_L[None, :] < low_D[:, None]).to(tl.int32)
        smaller_DL += (word_L[None, :] < high_D[:, None]).to(tl.int32) << 16
        both_D = tl.sum(smaller_DL, axis=1)
        low_count_D, high_count_D = both_D & 0xFFFF, both_D >> 16
        fits_D = (low_count_D <= VISIBLE).to(tl.int32) + (high_count_D <= VISIBLE).to(tl.int32)
        bound += (tl.sum(fits_D) - 1).to(tl.uint32) << place  # the first always fits
        low_count_D = tl.where(low_count_D <= VISIBLE, low_count_D, 0)
        below = tl.max(tl.where(high_count_D <= VISIBLE, high_count_D, low_count_D))
        place -= 4
    chosen_L = (word_L < bound).to(tl.int32)
    if below != VISIBLE:  # the words equal to the bound tie: the first by id
        tie_L = (word_L == bound).to(tl.int32)
        chosen_L = tl.where((tie_L != 0) & (tl.cumsum(tie_L) <= VISIBLE - below), 1, chosen_L)
    return chosen_L


@triton.jit
def _nth_bit(bits, n):
    """Position of set bit number ``n`` (from 0) of 16 bits: down a tree of bit counts, one level per step."""
    pairs = bits - ((bits >> 1) & 0x5555)
    nibbles = (pairs & 0x3333) + ((pairs >> 2) & 0x3333)
    low = (nibbles + (nibbles >> 4)) & 0xF
    position = tl.where(n >= low, 8, 0)
    n = tl.where(n >= low, n - low, n)
    low = (nibbles >> position) & 0xF
    position = tl.where(n >= low, position + 4, position)
    n = tl.where(n >= low, n - low, n)
    low = (pairs >> position) & 3
    position = tl.where(n >= low, position + 2, position)
    n = tl.where(n >= low, n - low, n)
    return tl.where(n >= ((bits >> position) & 1), position + 1, position)


@triton.jit
def ids_of(chosen_L, BLOCK_L: tl.constexpr, BLOCK_V: tl.constexpr):
    """Ids of the chosen tokens in ascending order, by slot; slots beyond their number hold no id.

    The slot's group of 16 tokens is found by comparison with the ends of all groups, the token in its group by its
    bits. Comparing each slot with each token instead would be as much work as the noise, in a window of 31 x 31.
    """
    GROUPS: tl.constexpr = BLOCK_L // 16
    place_T = tl.arange(0, 16)[None, :]
    chosen_GT = tl.reshape(chosen_L, [GROUPS, 16])
    both_G = tl.sum((chosen_GT << place_T) | (chosen_GT << 16), axis=1)  # the bits of a group, above them their number
    end_G = tl.cumsum(both_G >> 16)
    group_G = ((end_G - (both_G >> 16)) << 16) | (both_G & 0xFFFF)  # the bits, above them the group's first slot
    slot_V = tl.arange(0, BLOCK_V)
    group_V = tl.sum((end_G[:, None] <= slot_V[None, :]).to(tl.int32), axis=0)
    own_V = tl.gather(group_G, tl.minimum(group_V, GROUPS - 1), 0)
    return group_V * 16 + _nth_bit(own_V & 0xFFFF, slot_V - (own_V >> 16))


@triton.jit(do_not_specialize=["pixel_count", "scenes", "steps", "modality"])
def _visible_noise(
    pixels,
    scale,
    offset,
    valid,
    extents,
    centres,
    timestep,
    schedule,
    rng,
    valid_rows,
    x,
    ids,
    pixel_count,
    scenes,
    steps,
    modality,
    WINDOW: tl.constexpr,
    CHANNELS: tl.constexpr,
    VISIBLE: tl.constexpr,
    NOISY: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_VALID_ROWS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILES: tl.constexpr,
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)  # rows may pass 65,535, and their values 2**31
    TOKENS: tl.constexpr = WINDOW * WINDOW
    QUADS: tl.constexpr = (CHANNELS + 3) // 4
    WIDTH: tl.constexpr = 1 if CHANNELS == 1 else (2 if CHANNELS == 2 else 4)  # channels used of each counter
    k0, k1 = tl.load(rng).to(tl.uint32), tl.load(rng + 1).to(tl.uint32)
    position = (tl.load(rng + 2) + row).to(tl.uint32)
    above = modality.to(tl.uint32) << 16
    real = row >= 0
    if HAS_VALID_ROWS:
        real = row < tl.load(valid_rows)

    slot_V = tl.arange(0, BLOCK_V)
    if VISIBLE == TOKENS:
        id_V = tl.minimum(slot_V, TOKENS - 1)
    else:
        word_L = mask_words(tl.arange(0, BLOCK_L).to(tl.uint32) + above, position, k0, k1)
        chosen_L = chosen_tokens(word_L, VISIBLE, TOKENS, BLOCK_L)
        id_V = tl.where(real, clamp(ids_of(chosen_L, BLOCK_L, BLOCK_V), TOKENS - 1), tl.minimum(slot_V, TOKENS - 1))
    if split == 0:
        tl.store(ids + row * VISIBLE + slot_V, id_V, mask=slot_V < VISIBLE)
    pixel_V, _ = token_pixels(id_V, row, centres, extents, valid, scenes, pixel_count, WINDOW, HAS_VALID)
    if NOISY:
        t = clamp(tl.load(timestep + row), steps - 1)
        keep, noise = tl.load(schedule + 2 * t), tl.load(schedule + 2 * t + 1)
        noise = tl.where(real, noise, 0.0)

    x += row * (VISIBLE * CHANNELS)
    read = tl.where(real, VISIBLE * QUADS, 0)
    for i in range(TILES):
        flat_Q = (split * TILES + i) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        slot_Q, quad_Q = tl.minimum(flat_Q // QUADS, VISIBLE - 1), flat_Q % QUADS
        channel_Q4 = (quad_Q * 4)[:, None] + tl.arange(0, WIDTH)[None, :]
        # A padding row reads nothing: scale and offset come as 0 as well, and so does the value.
        read_Q4 = (flat_Q < read)[:, None] & (channel_Q4 < CHANNELS)
        live_Q4 = (flat_Q < VISIBLE * QUADS)[:, None] & (channel_Q4 < CHANNELS)
        pixel_Q = tl.gather(pixel_V, slot_Q, 0)
        value_Q4 = normalised(pixels, scale, offset, pixel_Q[:, None], channel_Q4, read_Q4, CHANNELS)
        if NOISY:
            token_Q = tl.gather(id_V, slot_Q, 0).to(tl.uint32) + above
            eps_Q4 = normals(quad_Q.to(tl.uint32), token_Q, position, k0, k1, WIDTH)
            value_Q4 = tl.fma(eps_Q4, noise, value_Q4 * keep)
        tl.store(x + (slot_Q * CHANNELS)[:, None] + channel_Q4, value_Q4.to(x.dtype.element_ty), mask=live_Q4)


def settings(
    rows: int,
    *,
    window: int,
    channels: int,
    visible: int,
    noisy: bool,
    has_valid: bool,
    has_valid_rows: bool,
) -> tuple[Launch, int]:
    """Kernel and settings for ``rows`` windows, and into how many programs each window is split.

    With many windows 4 warps share one: fewer lanes repeat what is done per token. Below some 4 windows per
    multiprocessor 8 warps do, and below one the window is split, though each split chooses the tokens again.
    """
    block_l = max(16, next_power_of_2(window * window))
    counters = visible * ((channels + 3) // 4)
    warps = 1 if counters <= 32 and block_l <= 32 else 8 if (counters >= 512 and rows < 512) or block_l > 256 else 4
    block = min(32 * warps, next_power_of_2(counters))
    tiles = -(-counters // block)
    splits = min(tiles, max(1, 128 // next_power_of_2(max(rows, 1))))  # few values, each is compiled
    constants = dict(
        WINDOW=window,
        CHANNELS=channels,
        VISIBLE=visible,
        NOISY=noisy,
        HAS_VALID=has_valid,
        HAS_VALID_ROWS=has_valid_rows,
        BLOCK_L=block_l,
        BLOCK_V=next_power_of_2(visible),
        BLOCK_Q=block,
        TILES=-(-tiles // splits),
    )
    return Launch(_visible_noise, constants, num_warps=warps), splits


def visible_noise(
    scene: FlatScene,
    centres: Tensor,
    timestep: Tensor | None,
    schedule: Tensor | None,
    rng: Tensor,
    *,
    window: int,
    visible: int,
    modality: int,
    valid_rows: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The op of :mod:`fastdiffclip.kernels.visible_noise` in one launch; nothing waits for the device.

    Allocates its two results and nothing else. Ids are the reference's bit by bit; normals are computed in float32,
    within 7e-7 * max(1, |eps|) of the exact ones, and are the same bits for any batch split and launch setting.
    A centre or timestep out of range is clamped to what there is, so that nothing is read out of bounds.
    """
    rows, channels = centres.shape[0], scene.channels
    launch, splits = settings(
        rows,
        window=window,
        channels=channels,
        visible=visible,
        noisy=schedule is not None,
        has_valid=scene.valid is not None,
        has_valid_rows=valid_rows is not None,
    )
    x_BVC = torch.empty((rows, visible, channels), dtype=out_dtype, device=centres.device)
    ids_BV = torch.empty((rows, visible), dtype=torch.int32, device=centres.device)
    unused = centres  # stands for a tensor that the kernel was compiled not to read
    read = (
        *(scene.pixels, scene.scale, scene.offset, scene.valid, scene.extents),
        *(centres, timestep, schedule, rng, valid_rows),
    )
    launch(
        (rows, splits),
        *((unused if tensor is None else tensor).contiguous() for tensor in read),
        x_BVC,
        ids_BV,
        *(scene.pixels.shape[0], scene.extents.shape[0], 1 if schedule is None else schedule.shape[0], modality),
    )
    return x_BVC, ids_BV


def offline_cases() -> list[OfflineCase]:
    """All stored and written dtypes at the paper's shape, then windows, channels and batches that differ from it."""
    paper = dict(rows=256, window=11, channels=144, visible=36)
    kinds = [(stored, written, paper) for stored in PIXEL_DTYPES for written in (torch.float32, torch.bfloat16)]
    kinds += [(torch.uint16, torch.float16, paper)]
    for change in (
        dict(rows=16),
        dict(rows=65_536),
        dict(channels=1),
        dict(channels=2),
        dict(channels=31),
        dict(visible=121),
        dict(window=3, visible=3),
        dict(window=15, visible=68),
        dict(window=31, visible=288),
        dict(window=31, visible=961),
        dict(window=31, visible=288, channels=1),
    ):
        kinds += [(torch.uint16, torch.bfloat16, {**paper, **change})]
    return [_offline_case(stored, written, sizes) for stored, written, sizes in kinds]


def _offline_case(stored: torch.dtype, written: torch.dtype, sizes: dict[str, int]) -> OfflineCase:
    launch, _ = settings(**sizes, noisy=True, has_valid=True, has_valid_rows=True)
    pointers = dict(pixels=stored, valid=torch.uint8, extents=torch.int64, centres=torch.int64, timestep=torch.int64)
    pointers |= dict(rng=torch.int64, valid_rows=torch.int64, x=written, ids=torch.int32)
    pointers |= dict.fromkeys(("scale", "offset", "schedule"), torch.float32)
    numbers = dict(pixel_count="i64", scenes="i32", steps="i32", modality="i32")
    shape = f"{sizes['window']} x {sizes['window']} x {sizes['channels']}, {sizes['visible']} visible"
    name = f"{stored} -> {written}, {shape}, {sizes['rows']} rows".replace("torch.", "")
    return OfflineCase(name, launch, {key: POINTERS[dtype] for key, dtype in pointers.items()} | numbers)
