"""The kernels of ``contrastive`` for any size, which see a tile of scores at a time, and their launch settings.

:mod:`fastdiffclip.kernels.triton.contrastive` says what they are for and in which order they run.

Shape suffixes: N images, K texts (those of a tile), D embedding width, P parts. Scores are in units of log 2. Vectors
over texts are padded to whole tiles, so that a thread, which holds a quarter of a tile's columns, reads them unmasked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastdiffclip.kernels import reference
from fastdiffclip.kernels.triton.launch import POINTERS, Launch, OfflineCase, exact_products, next_power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)
EXCLUDED = tl.constexpr(reference.EXCLUDED)
NORM_FLOOR, MOST_INVERSE = tl.constexpr(reference.NORM_FLOOR), tl.constexpr(1 / reference.NORM_FLOOR)
# Scores within this many units of log 2 (a logit scale up to 62) need no maximum subtracted: sums of 2^31 of them stay
# within float32, and one exponential serves the rows and the columns.
TAME = tl.constexpr(90.0)
MERGE_COLUMNS, MERGE_PARTS = 128, 16
NORM_ELEMENTS = 4096  # of the matrix whose rows are normalised, that a program holds


class Tile(NamedTuple):
    """Rows, columns and depth of a tile of scores, and its launch settings."""

    images: int
    texts: int
    width: int
    num_warps: int
    num_stages: int


def tile_of(dtype: torch.dtype, width: int) -> Tile:
    """Tile by what is multiplied.

    bfloat16, on tensor cores: a step of 64 along D brings 32 KiB for 2 MFLOP, 64 FLOP a byte, mostly out of the
    second-level cache, where all programs of a wave read the same texts. 128 x 128 scores are 64 registers a thread,
    three to four times as many with what is made of them: one program on a multiprocessor, four steps in flight. By
    count, at D = 512 on sm_90, the products of a tile take 4100 to 5000 cycles, its exponentials and sums about 2000.

    float32 is multiplied exactly, by multiply-adds whose operands live in registers: a shallow step.
    """
    if dtype == torch.float32:
        return Tile(128, 64, 16, 8, 2)
    return Tile(128, 128, 64 if width > 64 else 32 if width > 16 else 16, 8, 4)


@triton.jit
def _inverse_norms(x, inverse, n, padded, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """``1 / |x|`` of each row; zero from ``n`` to ``padded``."""
    at_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = x + at_N.to(tl.int64)[:, None] * D
    squares_N = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, D, BLOCK_D):
        at_D = (first + tl.arange(0, BLOCK_D))[None, :]
        values = tl.load(rows + at_D, mask=(at_N < n)[:, None] & (at_D < D), other=0.0).to(tl.float32)
        squares_N += tl.sum(values * values, 1)
    norm_N = tl.maximum(tl.sqrt_rn(squares_N), NORM_FLOOR)
    tl.store(inverse + at_N, tl.where(at_N < n, tl.div_rn(1.0, norm_N), 0.0), mask=at_N < padded)


@triton.jit
def _through_norms(sums, x, inverse, out, n, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """``g - z^ (z^ . g)`` for rows g of ``sums`` and z of ``x``; g where the norm was below the floor."""
    at_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_N = at_N.to(tl.int64)[:, None] * D
    along_N = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, D, BLOCK_D):
        at_D = (first + tl.arange(0, BLOCK_D))[None, :]
        mask = (at_N < n)[:, None] & (at_D < D)
        values = tl.load(x + rows_N + at_D, mask=mask, other=0.0).to(tl.float32)
        along_N += tl.sum(values * tl.load(sums + rows_N + at_D, mask=mask, other=0.0), 1)
    inverse_N = tl.load(inverse + at_N, mask=at_N < n, other=0.0)
    along_N = tl.where(inverse_N < MOST_INVERSE, along_N * inverse_N * inverse_N, 0.0)
    for first in range(0, D, BLOCK_D):
        at_D = (first + tl.arange(0, BLOCK_D))[None, :]
        mask = (at_N < n)[:, None] & (at_D < D)
        values = tl.load(x + rows_N + at_D, mask=mask, other=0.0).to(tl.float32)
        through = tl.load(sums + rows_N + at_D, mask=mask, other=0.0) - along_N[:, None] * values
        tl.store(out + rows_N + at_D, through, mask=mask)


@triton.jit
def _products(
    image,
    text,
    first_image,
    first_text,
    n,
    k,
    D: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Products of a tile of images with a tile of texts, float32; of the last one again beyond the last."""
    at_N = tl.minimum(first_image + tl.arange(0, BLOCK_N), n - 1)
    at_K = tl.minimum(first_text + tl.arange(0, BLOCK_K), k - 1)
    images, texts = image + at_N.to(tl.int64)[:, None] * D, text + at_K.to(tl.int64)[None, :] * D
    dots_NK = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(0, D, BLOCK_D):
        at_D = first + tl.arange(0, BLOCK_D)
        if D % BLOCK_D == 0:
            z, t = tl.load(images + at_D[None, :]), tl.load(texts + at_D[:, None])
        else:
            z = tl.load(images + at_D[None, :], mask=(at_D < D)[None, :], other=0.0)
            t = tl.load(texts + at_D[:, None], mask=(at_D < D)[:, None], other=0.0)
        if EXACT:
            dots_NK = tl.dot(z.to(tl.float32), t.to(tl.float32), dots_NK, input_precision="ieee")
        else:
            dots_NK = tl.dot(z, t, dots_NK)
    return dots_NK


@triton.jit
def _log_sum(top, total):
    """``top + log total``, and what weighs nothing where nothing was added up."""
    return tl.where(total == 0, EXCLUDED, top + tl.log2(tl.where(total == 0, 1.0, total)))


@triton.jit
def _sums(
    image,
    text,
    labels,
    inverse_image,
    inverse_text,
    repeats,
    logit_scale,
    valid_rows,
    row_parts,
    own_parts,
    column_parts,
    n,
    k,
    padded,
    tiles_in_part,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of a row of tiles: log-sums of its rows over a part of the texts, and of each column over its rows."""
    row_of_tiles, part = tl.program_id(0), tl.program_id(1)
    first_image = row_of_tiles * BLOCK_N
    at_N = first_image + tl.arange(0, BLOCK_N)
    real_N = at_N < tl.minimum(tl.load(valid_rows), n)
    scale = tl.load(logit_scale) * LOG2_E
    scale_N = tl.load(inverse_image + at_N, mask=at_N < n, other=0.0) * scale
    tame = tl.abs(scale) <= TAME
    if ROWS:
        label_N = tl.load(labels + at_N, mask=at_N < n, other=-1).to(tl.int32)
        lowest, highest = tl.min(label_N, 0), tl.max(label_N, 0)
    top_N = tl.where(tame, 0.0, tl.full((BLOCK_N,), EXCLUDED, tl.float32))
    sum_N, own_N = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)

    first_text = part * tiles_in_part * BLOCK_K
    last_text = tl.minimum(first_text + tiles_in_part * BLOCK_K, k)
    while first_text < last_text:
        at_K = first_text + tl.arange(0, BLOCK_K)
        scores_NK = _products(image, text, first_image, first_text, n, k, D, EXACT, BLOCK_N, BLOCK_K, BLOCK_D)
        inverse_K = tl.load(inverse_text + at_K)
        scores_NK = scores_NK * scale_N[:, None] * inverse_K[None, :]
        if ROWS:
            some_own = (first_text + BLOCK_K > lowest) & (first_text <= highest)
            if some_own:
                own_N += tl.sum(tl.where(label_N[:, None] == at_K[None, :], scores_NK, 0.0), 1)
        column_K = tl.zeros((BLOCK_K,), tl.float32)
        if tame:
            powers_NK = tl.exp2(scores_NK)
            if ROWS:
                repeats_K = tl.load(repeats + at_K)
                sum_N += tl.sum(powers_NK * repeats_K[None, :], 1)
            if COLUMNS:
                column_K = tl.sum(powers_NK * tl.where(real_N, 1.0, 0.0)[:, None], 0)
        else:
            if ROWS:
                log_repeats_K = tl.load(repeats + padded + at_K)
                weighted_NK = scores_NK + log_repeats_K[None, :]
                higher_N = tl.maximum(top_N, tl.max(weighted_NK, 1))
                sum_N = sum_N * tl.exp2(top_N - higher_N) + tl.sum(tl.exp2(weighted_NK - higher_N[:, None]), 1)
                top_N = higher_N
            if COLUMNS:
                scores_NK = tl.where(real_N[:, None], scores_NK, EXCLUDED)
                top_K = tl.max(scores_NK, 0)
                column_K = top_K + tl.log2(tl.sum(tl.exp2(scores_NK - top_K[None, :]), 0))
        if COLUMNS:
            tl.store(column_parts + row_of_tiles.to(tl.int64) * padded + at_K, column_K)
        first_text += BLOCK_K
    if ROWS:
        there = part.to(tl.int64) * n + at_N
        tl.store(row_parts + there, _log_sum(top_N, sum_N), mask=at_N < n)
        tl.store(own_parts + there, own_N, mask=at_N < n)


@triton.jit
def _merge(
    parts,
    merged,
    logit_scale,
    count,
    n,
    padded,
    POWERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Log-sum of each column of ``parts`` (count, padded): of logarithms, or of sums if ``POWERS`` and tame."""
    at_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tame = (tl.abs(tl.load(logit_scale) * LOG2_E) <= TAME) & POWERS
    top_N = tl.where(tame, 0.0, tl.full((BLOCK_N,), EXCLUDED, tl.float32))
    sum_N = tl.zeros((BLOCK_N,), tl.float32)
    first = 0
    while first < count:
        at_P = first + tl.arange(0, BLOCK_PARTS)
        there = parts + at_P.to(tl.int64)[:, None] * padded + at_N[None, :]
        other = tl.where(tame, 0.0, EXCLUDED)
        values = tl.load(there, mask=(at_P < count)[:, None] & (at_N < n)[None, :], other=other)
        if tame:
            sum_N += tl.sum(values, 0)
        else:
            higher_N = tl.maximum(top_N, tl.max(values, 0))
            sum_N = sum_N * tl.exp2(top_N - higher_N) + tl.sum(tl.exp2(values - higher_N[None, :]), 0)
            top_N = higher_N
        first += BLOCK_PARTS
    tl.store(merged + at_N, _log_sum(top_N, sum_N), mask=at_N < n)


@triton.jit
def _changes(
    image,
    text,
    labels,
    rows,
    columns,
    logit_scale,
    outer,
    changes,
    scale_parts,
    n,
    padded,
    first_image,
    first_text,
    last_text,
    D: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of ``H`` of the block from (first_image, first_text), and its share of the logit scale's gradient."""
    tile_N, tile_K = tl.program_id(0), tl.program_id(1)
    stride = last_text - first_text
    row_N, column_K = tile_N * BLOCK_N + tl.arange(0, BLOCK_N), tile_K * BLOCK_K + tl.arange(0, BLOCK_K)
    at_N, at_K = first_image + row_N, first_text + column_K
    inside_N, inside_K = at_N < n, at_K < last_text
    first = first_image + tile_N * BLOCK_N, first_text + tile_K * BLOCK_K
    dots_NK = _products(image, text, first[0], first[1], n, last_text, D, EXACT, BLOCK_N, BLOCK_K, BLOCK_D)

    # A thread holds a few rows of the tile and a quarter of its columns: what belongs to columns is dear. So weights
    # are in the logarithms already, that of the own score is found by row, and a vector is read where it is used.
    inverse_N, scale = tl.load(rows + at_N, mask=inside_N, other=0.0), tl.load(logit_scale)
    inverse_K = tl.load(columns + at_K)
    scores_NK = dots_NK * (inverse_N * (scale * LOG2_E))[:, None] * inverse_K[None, :]  # the bits of the forward pass
    own_weight_N = tl.load(rows + 2 * n + at_N, mask=inside_N, other=0.0)
    scores_NK = tl.where((own_weight_N > 0)[:, None], scores_NK, 2 * EXCLUDED)  # padding: beneath any sum
    row_lse_N = tl.load(rows + n + at_N, mask=inside_N, other=0.0)
    log_repeats_K = tl.load(columns + padded + at_K)
    change_NK = tl.exp2(scores_NK + log_repeats_K[None, :] - row_lse_N[:, None])
    column_lse_K = tl.load(columns + 2 * padded + at_K)
    change_NK += tl.exp2(scores_NK - column_lse_K[None, :])
    label_N = tl.load(labels + at_N, mask=inside_N, other=-1).to(tl.int32)
    change_NK -= tl.where(label_N[:, None] == at_K[None, :], own_weight_N[:, None], 0.0)
    inverse_K = tl.load(columns + at_K, cache_modifier=".cg")  # again: not kept meanwhile
    change_NK = change_NK * inverse_N[:, None] * inverse_K[None, :]

    factor = tl.load(outer)
    share = tl.sum(tl.sum(change_NK * dots_NK, 1), 0)
    tl.store(scale_parts + tile_K * tl.num_programs(0) + tile_N, share * factor)
    there = changes + row_N.to(tl.int64)[:, None] * stride + column_K[None, :]
    tl.store(there, change_NK * (scale * factor), mask=inside_N[:, None] & inside_K[None, :])


def sums_launch(width: int, dtype: torch.dtype, rows: bool, columns: bool) -> Launch:
    """Sums over texts (``rows``) and over images (``columns``)."""
    return _tile_launch(_sums, {"ROWS": rows, "COLUMNS": columns}, width, dtype)


def changes_launch(width: int, dtype: torch.dtype) -> Launch:
    """Gradients of a block of scores."""
    return _tile_launch(_changes, {}, width, dtype)


def _tile_launch(kernel: Any, flags: dict[str, bool], width: int, dtype: torch.dtype) -> Launch:
    tile = tile_of(dtype, width)
    blocks = {"BLOCK_N": tile.images, "BLOCK_K": tile.texts, "BLOCK_D": tile.width}
    exact = dtype == torch.float32 or exact_products()
    return Launch(kernel, {**flags, "D": width, "EXACT": exact, **blocks}, tile.num_warps, tile.num_stages)


def inverse_norms_launch(width: int) -> Launch:
    """Norms of rows, bound by the bytes read."""
    return _norm_launch(_inverse_norms, width)


def through_norms_launch(width: int) -> Launch:
    """The gradient through the normalisation of rows, bound by the bytes; the second reading comes from the cache."""
    return _norm_launch(_through_norms, width)


def _norm_launch(kernel: Any, width: int) -> Launch:
    block_d = min(NORM_ELEMENTS // 4, next_power_of_2(width))
    return Launch(kernel, {"D": width, "BLOCK_N": NORM_ELEMENTS // block_d, "BLOCK_D": block_d}, num_warps=4)


def merge_launch(powers: bool) -> Launch:
    """The merge of partial sums, bound by the bytes read: 16 rows of 128 columns at a time."""
    constants = {"POWERS": powers, "BLOCK_N": MERGE_COLUMNS, "BLOCK_PARTS": MERGE_PARTS}
    return Launch(_merge, constants, num_warps=4)


def tile_cases() -> list[OfflineCase]:
    """Widths from 64 to 1024, one of them no multiple of a step; each kind of pass at 512."""
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        named = str(dtype).removeprefix("torch.")
        types = {"labels": "*i64", "valid_rows": "*i64"}
        types |= dict.fromkeys(("image", "text", "changes", "x", "out"), POINTERS[dtype])
        types |= dict.fromkeys(("n", "k", "padded", "tiles_in_part", "count"), "i32")
        types |= dict.fromkeys(("first_image", "first_text", "last_text"), "i32")
        for floats in (
            ("inverse_image", "inverse_text", "repeats", "logit_scale", "row_parts", "own_parts", "column_parts"),
            ("rows", "columns", "outer", "scale_parts", "sums", "inverse", "parts", "merged"),
        ):
            types |= dict.fromkeys(floats, "*fp32")
        launches = {
            f"D = 512 {named}, columns given": sums_launch(512, dtype, True, False),
            f"D = 512 {named}, columns alone": sums_launch(512, dtype, False, True),
            f"D = 512 {named}, norms": inverse_norms_launch(512),
            f"D = 512 {named}, through norms": through_norms_launch(512),
            f"{named}, parts that are logarithms": merge_launch(False),
            f"{named}, parts that may be sums": merge_launch(True),
        }
        for width in (64, 100, 128, 512, 1024):
            launches[f"D = {width} {named}"] = sums_launch(width, dtype, True, True)
            launches[f"D = {width} {named}, H"] = changes_launch(width, dtype)
        cases += [OfflineCase(name, launch, types) for name, launch in launches.items()]
    return cases
