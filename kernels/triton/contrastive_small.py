"""``contrastive`` of a training batch: one program, one launch, the loss and all its gradients.

A batch of 64 images and 15 texts is 0.25 MFLOP; launches cost more than that, so nothing is spread over the device. The
scores stay in registers, images and texts are read twice (the second time from the cache).

Shape suffixes: N images, K texts, D embedding width. Scores are in units of log 2, which is what the hardware's
exponential takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiffclip.kernels import reference
from fastdiffclip.kernels.triton.launch import POINTERS, Launch, OfflineCase, next_power_of_2

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
EXCLUDED = tl.constexpr(reference.EXCLUDED)
NORM_FLOOR = tl.constexpr(reference.NORM_FLOOR)

SCALE_BLOCK = 1024


def _block(count: int) -> int:
    return max(16, next_power_of_2(count))  # tl.dot takes no less than 16


@triton.jit
def _one_program(
    image,
    text,
    labels,
    logit_scale,
    valid_rows,
    counts,
    column_logsumexp,
    loss,
    gradients,
    n,
    k,
    D: tl.constexpr,
    PAIRWISE: tl.constexpr,
    HAS_VALID_ROWS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    at_N, at_K = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    inside_N, inside_K = at_N < n, at_K < k

    # Products of the embeddings as they are: a float32 sum of exact bfloat16 products, normalised afterwards.
    dots_NK = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares_N, squares_K = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, D, BLOCK_D):
        at_D = first + tl.arange(0, BLOCK_D)
        within = (at_D < D)[None, :]
        z = tl.load(image + at_N[:, None] * D + at_D[None, :], mask=inside_N[:, None] & within, other=0.0)
        t = tl.load(text + at_K[:, None] * D + at_D[None, :], mask=inside_K[:, None] & within, other=0.0)
        z, t = z.to(tl.float32), t.to(tl.float32)
        dots_NK = tl.dot(z, tl.trans(t), dots_NK, input_precision="ieee")
        squares_N += tl.sum(z * z, 1)
        squares_K += tl.sum(t * t, 1)
    norm_N, norm_K = tl.sqrt_rn(squares_N), tl.sqrt_rn(squares_K)
    inverse_N = tl.div_rn(1.0, tl.maximum(norm_N, NORM_FLOOR))
    inverse_K = tl.div_rn(1.0, tl.maximum(norm_K, NORM_FLOOR))

    # Multiplicities, and the weights that they give (see kernels/triton/contrastive.py).
    real_N = inside_N
    if HAS_VALID_ROWS:
        real_N = inside_N & (at_N < tl.load(valid_rows))
    label_N = tl.load(labels + at_N, mask=inside_N, other=-1)
    own_NK = (label_N[:, None] == at_K[None, :]) & real_N[:, None]
    local_K = tl.sum(own_NK.to(tl.float32), 0)
    count_K = local_K
    if HAS_COUNTS:
        count_K = tl.load(counts + at_K, mask=inside_K, other=0.0)
    present_K = count_K > 0
    half = tl.div_rn(0.5, tl.maximum(tl.sum(count_K, 0), 1.0))
    if PAIRWISE:
        log_repeats_K = tl.where(present_K, tl.log2(tl.maximum(count_K, 1e-30)), EXCLUDED)
        column_weight_K = count_K * half
        own_weight_K = tl.zeros((BLOCK_K,), tl.float32) + half
    else:
        log_repeats_K = tl.where(inside_K, 0.0, EXCLUDED)
        classes = tl.maximum(tl.sum(present_K.to(tl.float32), 0), 1.0)
        column_weight_K = tl.where(present_K, tl.div_rn(0.5, classes), 0.0)
        own_weight_K = tl.div_rn(column_weight_K, tl.maximum(count_K, 1.0))

    # Both softmax directions.
    scale = tl.load(logit_scale)
    cosines_NK = dots_NK * inverse_N[:, None] * inverse_K[None, :]
    scores_NK = cosines_NK * (scale * LOG2_E)
    weighted_NK = scores_NK + log_repeats_K[None, :]
    top_N = tl.max(weighted_NK, 1)
    row_lse_N = top_N + tl.log2(tl.sum(tl.exp2(weighted_NK - top_N[:, None]), 1))
    if HAS_COLUMNS:
        column_lse_K = tl.load(column_logsumexp + at_K, mask=inside_K, other=0.0) * LOG2_E
    else:
        unpadded_NK = tl.where(real_N[:, None], scores_NK, EXCLUDED)
        top_K = tl.max(unpadded_NK, 0)
        column_lse_K = top_K + tl.log2(tl.sum(tl.exp2(unpadded_NK - top_K[None, :]), 0))

    # The loss as a sum of terms of one sign: what an image lacks in its row, and in the column of its text.
    own_N = tl.sum(tl.where(own_NK, scores_NK, 0.0), 1)
    kept_K = tl.where(present_K, column_lse_K, 0.0)
    term_N = half * (row_lse_N - own_N) + tl.sum(tl.where(own_NK, (kept_K * own_weight_K)[None, :], 0.0), 1)
    term_N -= own_N * tl.sum(tl.where(own_NK, own_weight_K[None, :], 0.0), 1)
    total = tl.sum(tl.where(real_N, term_N, 0.0), 0)
    if HAS_COUNTS and not HAS_COLUMNS:  # images elsewhere, whose columns nobody has added up
        total += tl.sum((count_K - local_K) * own_weight_K * kept_K, 0)
    tl.store(loss, total * LN_2)

    # dL/ds, and from there through the normalisation: z^ . (H t) is a row sum of H times the products.
    change_NK = half * tl.exp2(weighted_NK - row_lse_N[:, None])
    lower_NK = tl.where(real_N[:, None], scores_NK - column_lse_K[None, :], EXCLUDED)  # padding may lie far above
    change_NK = tl.where(real_N[:, None], change_NK, 0.0) + column_weight_K[None, :] * tl.exp2(lower_NK)
    change_NK -= tl.where(own_NK, (own_weight_K + half)[None, :], 0.0)
    tl.store(gradients + (n + k) * D, tl.sum(tl.sum(change_NK * cosines_NK, 1), 0))
    change_NK = change_NK * scale * inverse_N[:, None] * inverse_K[None, :]
    along_N, along_K = tl.sum(change_NK * dots_NK, 1), tl.sum(change_NK * dots_NK, 0)
    along_N = tl.where(norm_N >= NORM_FLOOR, along_N * inverse_N * inverse_N, 0.0)
    along_K = tl.where(norm_K >= NORM_FLOOR, along_K * inverse_K * inverse_K, 0.0)
    for first in range(0, D, BLOCK_D):
        at_D = first + tl.arange(0, BLOCK_D)
        within = (at_D < D)[None, :]
        z = tl.load(image + at_N[:, None] * D + at_D[None, :], mask=inside_N[:, None] & within, other=0.0)
        t = tl.load(text + at_K[:, None] * D + at_D[None, :], mask=inside_K[:, None] & within, other=0.0)
        z, t = z.to(tl.float32), t.to(tl.float32)
        grad_z = tl.dot(change_NK, t, input_precision="ieee") - along_N[:, None] * z
        grad_t = tl.dot(tl.trans(change_NK), z, input_precision="ieee") - along_K[:, None] * t
        tl.store(gradients + at_N[:, None] * D + at_D[None, :], grad_z, mask=inside_N[:, None] & within)
        there = gradients + (n + at_K[:, None]) * D + at_D[None, :]
        tl.store(there, grad_t, mask=inside_K[:, None] & within)


@triton.jit
def _scale_gradients(
    gradients, grad_loss, grad_image, grad_text, grad_scale, size_image, size_text, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    both = size_image + size_text
    value = tl.load(gradients + at, mask=at <= both, other=0.0) * tl.load(grad_loss)
    tl.store(grad_image + at, value, mask=at < size_image)
    tl.store(grad_text + at - size_image, value, mask=(at >= size_image) & (at < both))
    tl.store(grad_scale + at - both, value, mask=at == both)


def one_program_launch(
    images: int, texts: int, width: int, pairwise: bool, valid_rows: bool, counts: bool, columns: bool
) -> Launch:
    """Kernel and settings; ``valid_rows``, ``counts`` and ``columns``: which of the optional arguments are given."""
    block_n, block_k = _block(images), _block(texts)
    # Registers again: the more scores a thread holds, the less of D at a time.
    block_d = 16 if block_n * block_k > 1024 else 32
    constants = {
        "D": width,
        "PAIRWISE": pairwise,
        "HAS_VALID_ROWS": valid_rows,
        "HAS_COUNTS": counts,
        "HAS_COLUMNS": columns,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "BLOCK_D": min(block_d, _block(width)),
    }
    return Launch(_one_program, constants, num_warps=8)


def scale_launch() -> Launch:
    """The multiplication of all gradients by that of the loss."""
    return Launch(_scale_gradients, {"BLOCK": SCALE_BLOCK}, num_warps=4)


def loss_and_gradients(
    pairwise: bool,
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    valid_rows: Tensor | None,
    counts: Tensor | None,
    column_logsumexp: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Loss, and a flat ``(N * D + K * D + 1,)`` float32 of the gradients of images, texts and logit scale.

    All tensors contiguous and on one device: image and text both in float32 or both in bfloat16, labels and valid_rows
    int64, the others float32.
    """
    (images, width), texts = image.shape, len(text)
    loss = torch.empty((), dtype=torch.float32, device=image.device)
    gradients = torch.empty((images + texts) * width + 1, dtype=torch.float32, device=image.device)
    optional = valid_rows, counts, column_logsumexp
    given = tuple(x is not None for x in optional)
    launch = one_program_launch(images, texts, width, pairwise, *given)
    pointers = (logit_scale if x is None else x for x in optional)  # never read where it stands for nothing
    launch((1,), image, text, labels, logit_scale, *pointers, loss, gradients, images, texts)
    return loss, gradients


def scaled_gradients(
    gradients: Tensor, grad_loss: Tensor, images: int, texts: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of images ``(N, D)``, texts ``(K, D)`` and logit scale, times ``grad_loss``."""
    width = (len(gradients) - 1) // (images + texts)
    grad_image = gradients.new_empty((images, width), dtype=dtype)
    grad_text = gradients.new_empty((texts, width), dtype=dtype)
    grad_scale = gradients.new_empty(())
    grid = (triton.cdiv(len(gradients), SCALE_BLOCK),)
    outputs = grad_image, grad_text, grad_scale
    scale_launch()(grid, gradients, grad_loss, *outputs, grad_image.numel(), grad_text.numel())
    return outputs


def one_program_cases() -> list[OfflineCase]:
    """The paper's batch, and the largest shapes that one program takes."""
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        pointer, named = POINTERS[dtype], str(dtype).removeprefix("torch.")
        types = dict.fromkeys(("image", "text"), pointer) | dict.fromkeys(("labels", "valid_rows"), "*i64")
        types |= dict.fromkeys(("n", "k"), "i32")
        floats = ("logit_scale", "counts", "column_logsumexp", "loss", "gradients")
        types |= dict.fromkeys(floats, "*fp32")
        for shape, pairwise in (
            ((64, 15, 128), True),
            ((64, 15, 128), False),
            ((128, 32, 512), True),
            ((64, 64, 1024), True),
        ):
            launch = one_program_launch(*shape, pairwise, True, not pairwise, not pairwise)
            targets = "pairwise" if pairwise else "class, block of a rank"
            cases.append(OfflineCase(f"{shape} {named}, {targets}", launch, types))
        types = dict.fromkeys(("gradients", "grad_loss", "grad_scale"), "*fp32")
        types |= dict.fromkeys(("grad_image", "grad_text"), pointer) | dict.fromkeys(("size_image", "size_text"), "i32")
        cases.append(OfflineCase(f"gradients to {named}", scale_launch(), types))
    return cases
