"""``contrastive`` and its column sums of any size: tiles of scores that never meet in memory.

With ``s_ik = logit_scale * z^_i . t^_k``, r_k the multiplicity of a text in a row's softmax and T, P the numbers of
images and of classes that are present, both targets are::

    L = sum_i real_i [ a (R_i - s_i,k(i)) + e_k(i) (C_k(i) - s_i,k(i)) ]
    R_i = log sum_k r_k e^{s_ik},   C_k = log sum_j e^{s_jk},   a = 1/(2T)
    dL/ds_ik = real_i [ a r_k e^{s_ik - R_i} + b_k e^{s_ik - C_k} - (a + e_k) [k = k(i)] ]

with r_k = n_k, b_k = n_k/(2T), e_k = 1/(2T) for ``pairwise``, and r_k = 1, b_k = present_k/(2P), e_k = b_k/n_k for
``class``. The forward pass multiplies the embeddings as they are and normalises the products: no rounded unit vectors.
It keeps R, C and the norms. The backward pass recomputes blocks of scores, writes
``H = dL/ds * logit_scale / (|z| |t|)`` of a block, and leaves ``H @ text`` and ``H^T @ image`` to cuBLAS.

Work: 6 N K D useful FLOPs, 8 N K D done. Memory (:func:`workspace_bytes`): forward N/128 * K * 4 bytes for the column
sums of each row of tiles; backward a block of H, the float32 gradient of the texts, and the gradients. At
N = K = 65,536, D = 512, bfloat16, that is 0.8 % and 1.6 % of the float32 scores.

Shape suffixes: N images, K texts, D embedding width. Scores are in units of log 2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastdiffclip.kernels import reference
from fastdiffclip.kernels.triton import contrastive_small, contrastive_tiles
from fastdiffclip.kernels.triton.contrastive_ops import TEXT_BLOCK
from fastdiffclip.kernels.triton.contrastive_tiles import Tile, tile_of
from fastdiffclip.kernels.triton.launch import OfflineCase, exact_products

BLOCK_SCORES = 1 << 25  # of H at a time
LONGEST_BLOCK = 8192
PROGRAMS = 512  # about four for each multiprocessor of the largest devices in use


class Batch(NamedTuple):
    """What both passes read: contiguous, on one device, float32 unless it says otherwise.

    Attributes:
        image: ``(N, D)``, text: ``(K, D)``, both float32 or both bfloat16. labels: ``(N,)`` int64. logit_scale: scalar.
    """

    image: Tensor
    text: Tensor
    labels: Tensor
    logit_scale: Tensor

    @property
    def tile(self) -> Tile:
        """Tile of scores for these embeddings."""
        return tile_of(self.image.dtype, self.image.shape[1])


def parts_of_texts(images: int, texts: int, tile: Tile) -> tuple[int, int]:
    """Parts into which the texts are cut so that few rows of tiles fill the device too; tiles of texts in each."""
    tiles = triton.cdiv(texts, tile.texts)
    in_part = triton.cdiv(tiles, max(1, PROGRAMS // triton.cdiv(images, tile.images)))
    return triton.cdiv(tiles, in_part), in_part


def block_of_scores(images: int, texts: int, tile: Tile) -> tuple[int, int]:
    """Images and texts of a block of H in the backward pass, whole tiles.

    Both sides are long, so that a product contracts thousands, and its float32 sums are seldom read and written: strips
    of 512 x 65,536 would move 34 GB of sums at N = K = 65,536, D = 512; blocks of 4096 x 8192 move 6.
    """
    rows, columns = _padded(images, tile.images), min(_padded(texts, tile.texts), LONGEST_BLOCK)
    rows = min(rows, 2 * LONGEST_BLOCK, max(tile.images, BLOCK_SCORES // columns // tile.images * tile.images))
    columns = max(tile.texts, BLOCK_SCORES // rows // tile.texts * tile.texts)
    return rows, min(_padded(texts, tile.texts), columns)


def workspace_bytes(images: int, texts: int, width: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes beyond the arguments at the peak of the forward and of the backward pass, the gradients among them."""
    tile, padded = tile_of(dtype, width), _padded(texts, TEXT_BLOCK)
    parts = 4 * triton.cdiv(images, tile.images) * padded + 8 * parts_of_texts(images, texts, tile)[0] * images
    rows, columns = block_of_scores(images, texts, tile)
    block = (rows * columns + images * width) * dtype.itemsize + 4 * rows * width
    # The block is gone when the float32 gradient of the texts is rounded to their dtype.
    sums = 4 * texts * width + max(block, (images + texts) * width * dtype.itemsize)
    return parts + 32 * (images + padded), sums + 4 * (images + padded)  # and vectors: norms, weights, sums


def _padded(count: int, block: int) -> int:
    return triton.cdiv(count, block) * block


def _inverse_norms(x: Tensor, padded: int) -> Tensor:
    inverse = torch.empty(padded, dtype=torch.float32, device=x.device)
    launch = contrastive_tiles.inverse_norms_launch(x.shape[1])
    launch((triton.cdiv(padded, launch.constants["BLOCK_N"]),), x, inverse, len(x), padded)
    return inverse


def _merged(parts: Tensor, n: int, logit_scale: Tensor, powers: bool) -> Tensor:
    if len(parts) == 1 and not powers:
        return parts[0]
    launch, merged = contrastive_tiles.merge_launch(powers), parts.new_empty(n)
    launch((triton.cdiv(n, launch.constants["BLOCK_N"]),), parts, merged, logit_scale, len(parts), n, parts.shape[1])
    return merged


def _log_sums(
    batch: Batch, count: Tensor, inverse: tuple[Tensor, Tensor], repeats: Tensor | None, columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """R and the own score of each image (with ``repeats``), C of each text (with ``columns``).

    ``repeats``: ``(2, padded K)`` r and its logarithm.
    """
    (n, width), k, padded, rows = batch.image.shape, len(batch.text), len(inverse[1]), repeats is not None
    parts, in_part = parts_of_texts(n, k, batch.tile)
    rows_of_tiles = triton.cdiv(n, batch.tile.images)
    row_parts, own_parts = (count.new_empty((parts, n if rows else 0), dtype=torch.float32) for _ in range(2))
    column_parts = count.new_empty((rows_of_tiles, padded if columns else 0), dtype=torch.float32)
    launch = contrastive_tiles.sums_launch(width, batch.image.dtype, rows, columns)
    read = (batch.image, batch.text, batch.labels, *inverse, inverse[1] if repeats is None else repeats)
    outputs = row_parts, own_parts, column_parts
    launch((rows_of_tiles, parts), *read, batch.logit_scale, count, *outputs, n, k, padded, in_part)
    own = own_parts[0] if parts == 1 else own_parts.sum(0)  # a label lies in one part; the others hold zeros
    row = _merged(row_parts, n if rows else 0, batch.logit_scale, False)
    return row, own, _merged(column_parts, k if columns else 0, batch.logit_scale, True)


def column_sums(image: Tensor, text: Tensor, logit_scale: Tensor, valid_rows: Tensor | None) -> Tensor:
    """``(K,)`` log-sums over the images before ``valid_rows``; arguments as in :class:`Batch`."""
    count = torch.full((), len(image), device=image.device) if valid_rows is None else valid_rows
    batch = Batch(image, text, count, logit_scale)  # labels are not read
    inverse = _inverse_norms(image, len(image)), _inverse_norms(text, _padded(len(text), TEXT_BLOCK))
    return _log_sums(batch, count, inverse, None, True)[2] * math.log(2)


class _Weights(NamedTuple):
    """``half`` is a; the others are vectors over texts: r and its logarithm, b, e, n, and n of these images alone."""

    half: Tensor
    repeats: Tensor
    column: Tensor
    own: Tensor
    counts: Tensor
    local: Tensor


def _weights(labels: Tensor, real: Tensor, texts: int, padded: int, counts: Tensor | None, pairwise: bool) -> _Weights:
    known = real & (labels >= 0) & (labels < texts)
    # Whole numbers add up to the same in any order.
    local = torch.zeros(texts + 1, dtype=torch.int64, device=labels.device)
    local = local.scatter_add_(0, torch.where(known, labels, texts), known.long())[:texts].float()
    counts = local if counts is None else counts
    present, half = counts > 0, 0.5 / counts.sum().clamp(min=1)
    if pairwise:
        column, own, each = counts * half, half.expand(texts), counts
    else:
        column = torch.where(present, 0.5 / present.sum().clamp(min=1), 0.0)
        own, each = column / counts.clamp(min=1), torch.ones_like(counts)
    repeats = counts.new_zeros((2, padded))
    repeats[0, :texts] = each
    torch.log2(repeats[0], out=repeats[1]).clamp_(min=reference.EXCLUDED)
    return _Weights(half, repeats, column, own, counts, local)


def loss_and_sums(
    batch: Batch,
    pairwise: bool,
    valid_rows: Tensor | None,
    counts: Tensor | None,
    column_logsumexp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and what :func:`gradients` needs beside the batch.

    ``valid_rows`` is int64, ``counts`` and ``column_logsumexp`` are float32; see the public op for their meaning.

    Returns:
        Loss; ``(3, N)`` inverse norms, R and ``real (a + e) / a``; ``(3, padded K)`` inverse norms, ``log r`` and
        ``C - log(b / a)``, the last two such that padding weighs nothing; a.
    """
    n, k, device = len(batch.image), len(batch.text), batch.image.device
    padded = _padded(k, TEXT_BLOCK)
    count = torch.full((), n, device=device) if valid_rows is None else valid_rows
    real_N = torch.arange(n, device=device) < count
    weights = _weights(batch.labels, real_N, k, padded, counts, pairwise)
    inverse = _inverse_norms(batch.image, n), _inverse_norms(batch.text, padded)
    row_N, own_N, column_K = _log_sums(batch, count, inverse, weights.repeats, column_logsumexp is None)
    if column_logsumexp is not None:
        column_K = column_logsumexp / math.log(2)

    kept_K, label_N = torch.where(weights.counts > 0, column_K, 0.0), batch.labels.clamp(0, k - 1)
    own_weight_N = weights.own[label_N]
    term_N = weights.half * (row_N - own_N) + own_weight_N * (kept_K[label_N] - own_N)
    loss = torch.where(real_N, term_N, 0.0).sum()
    if counts is not None and column_logsumexp is None:  # images elsewhere, whose columns nobody has added up
        loss = loss + ((counts - weights.local) * weights.own * kept_K).sum()

    # The factor a is left to the end: logarithms of ordinary size keep the digits of R and C.
    rows = torch.stack([inverse[0], row_N, torch.where(real_N, 1 + own_weight_N / weights.half, 0.0)])
    columns = torch.stack([inverse[1], weights.repeats[1], torch.full_like(inverse[1], -reference.EXCLUDED)])
    relative_K = weights.column / weights.half
    columns[2, :k] = torch.where(relative_K > 0, column_K - relative_K.log2(), -reference.EXCLUDED)
    return loss * math.log(2), rows, columns, weights.half


def _accumulate(sums: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``sums += a @ b`` in float32; the first time ``sums`` is not read."""
    beta = 0 if first else 1
    if a.dtype == torch.float32:
        torch.addmm(sums, a, b.float(), beta=beta, out=sums)
    else:
        torch.addmm(sums, a, b, out_dtype=torch.float32, beta=beta, out=sums)


def _through_norms(sums: Tensor, x: Tensor, inverse: Tensor, out: Tensor) -> None:
    launch = contrastive_tiles.through_norms_launch(x.shape[1])
    launch((triton.cdiv(len(x), launch.constants["BLOCK_N"]),), sums, x, inverse, out, len(x))


def gradients(
    grad_loss: Tensor, batch: Batch, rows: Tensor, columns: Tensor, half: Tensor, need_image: bool, need_text: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of images, texts and logit scale, the first two empty where not needed; see :func:`loss_and_sums`."""
    image, text, tile = batch.image, batch.text, batch.tile
    (n, width), k = image.shape, len(text)
    block_n, block_k = block_of_scores(n, k, tile)
    outer = grad_loss * half
    blocks = [(i, j) for i in range(0, n, block_n) for j in range(0, k, block_k)]
    launch = contrastive_tiles.changes_launch(width, image.dtype)
    dtype = torch.float32 if exact_products() else image.dtype
    changes = torch.empty(block_n * block_k, dtype=dtype, device=image.device)
    scale_parts = rows.new_zeros((len(blocks), (block_n // tile.images) * (block_k // tile.texts)))
    sum_image = rows.new_empty((block_n if need_image else 0, width))
    sum_text = rows.new_empty((k if need_text else 0, width))
    grad_image = torch.empty_like(image) if need_image else image.new_empty(0)
    for (i, j), share in zip(blocks, scale_parts, strict=True):
        at_N, at_K = slice(i, min(i + block_n, n)), slice(j, min(j + block_k, k))
        here, there = at_N.stop - i, at_K.stop - j
        block = changes[: here * there].view(here, there)
        grid = triton.cdiv(here, tile.images), triton.cdiv(there, tile.texts)
        read = image, text, batch.labels, rows, columns, batch.logit_scale, outer
        launch(grid, *read, block, share, n, columns.shape[1], i, j, at_K.stop)
        if need_image:
            _accumulate(sum_image[:here], block, text[at_K], first=j == 0)
        if need_image and at_K.stop == k:
            _through_norms(sum_image[:here], image[at_N], rows[0, at_N], grad_image[at_N])
        if need_text:
            _accumulate(sum_text[at_K], block.T, image[at_N], first=i == 0)
    del changes, block, sum_image
    grad_text = torch.empty_like(text) if need_text else text.new_empty(0)
    if need_text:
        _through_norms(sum_text, text, columns[0], grad_text)
    return grad_image, grad_text, scale_parts.sum()


def offline_cases() -> list[OfflineCase]:
    """Both regimes."""
    return contrastive_small.one_program_cases() + contrastive_tiles.tile_cases()
