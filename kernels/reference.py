"""Every op in plain torch: the oracle that the others are measured against, and the path that always works.

Shape suffixes: B windows, L tokens of a window, V visible tokens, C channels, N images, K texts, D embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiffclip.kernels import philox
from fastdiffclip.kernels.flat_scene import FlatScene

NORM_FLOOR = 1e-6
EXCLUDED = -1e30  # a score that weighs nothing; finite, so that a block of padding rows alone stays finite


def pixel_indices(scene: FlatScene, centres: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Flat pixel index of every token, and which tokens are valid.

    Neighbours beyond the edge are clamped to it; an invalid neighbour reads as the centre pixel.

    Returns:
        ``(B, L)`` int64 indices and ``(B, L)`` bool validity (before the substitution).
    """
    first, height, width = scene.extents[centres[:, 0]].unbind(1)
    step = torch.arange(window, device=centres.device) - window // 2
    rows = torch.clamp(centres[:, 1, None] + step, min=0).minimum(height[:, None] - 1)
    cols = torch.clamp(centres[:, 2, None] + step, min=0).minimum(width[:, None] - 1)
    index_BL = (first[:, None, None] + rows[:, :, None] * width[:, None, None] + cols[:, None, :]).flatten(1)
    if scene.valid is None:
        return index_BL, torch.ones_like(index_BL, dtype=torch.bool)
    valid_BL = ((scene.valid[index_BL >> 3] >> (index_BL & 7).to(torch.uint8)) & 1).bool()
    centre_B = first + centres[:, 1] * width + centres[:, 2]
    return torch.where(valid_BL, index_BL, centre_B[:, None]), valid_BL


def read_pixels(scene: FlatScene, index: Tensor) -> Tensor:
    """Values ``stored * scale + offset`` of flat pixel indices, float32, ``index.shape + (C,)``."""
    pixels = scene.pixels
    if pixels.dtype == torch.uint16:  # torch cannot index uint16
        stored = (pixels.view(torch.int16)[index].int() & 0xFFFF).float()
    else:
        stored = pixels[index].float()
    return stored * scene.scale + scene.offset


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
    """See :func:`fastdiffclip.kernels.visible_noise.visible_noise`."""
    rows, tokens = centres.shape[0], window * window
    if visible == tokens:
        ids_BV = torch.arange(tokens, device=centres.device).expand(rows, tokens)
    else:
        ids_BV = philox.visible_ids(rng, rows, tokens, visible, modality)
    index_BL, _ = pixel_indices(scene, centres, window)
    x_BVC = read_pixels(scene, torch.gather(index_BL, 1, ids_BV))
    if timestep is not None and schedule is not None:
        keep_B, noise_B = schedule[timestep].unbind(1)
        eps_BVC = philox.normals(rng, ids_BV, scene.channels, modality)
        x_BVC = keep_B[:, None, None] * x_BVC + noise_B[:, None, None] * eps_BVC
    if valid_rows is not None:
        padding_B = torch.arange(rows, device=centres.device) >= valid_rows
        x_BVC = torch.where(padding_B[:, None, None], 0.0, x_BVC)
        ids_BV = torch.where(padding_B[:, None], torch.arange(visible, device=centres.device), ids_BV)
    return x_BVC.to(out_dtype), ids_BV.to(torch.int32)


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
) -> Tensor:
    """See :func:`fastdiffclip.kernels.masked_mse.masked_mse`."""
    rows, tokens, channels = prediction_BLC.shape
    visible = ids_BV.shape[1]
    index_BL, valid_BL = pixel_indices(scene, centres, window)
    error_BL = (_wide(prediction_BLC) - read_pixels(scene, index_BL)).square().sum(2) / channels
    seen_BL = torch.zeros(rows, tokens, dtype=torch.bool, device=error_BL.device).scatter(1, ids_BV.long(), True)
    loss_B = torch.zeros(rows, device=error_BL.device)
    for weight, share, chosen_BL in (
        (masked_weight, (tokens - visible) / tokens, ~seen_BL & valid_BL),
        (visible_weight, visible / tokens, seen_BL & valid_BL),
    ):
        mean_B = torch.where(chosen_BL, error_BL, 0.0).sum(1) / chosen_BL.sum(1).clamp(min=1)
        loss_B = loss_B + weight * share * mean_B
    count = torch.tensor(rows, device=error_BL.device) if valid_rows is None else valid_rows
    loss_B = torch.where(torch.arange(rows, device=error_BL.device) < count, loss_B, 0.0)
    return loss_B.sum() / (count if total_rows is None else total_rows).clamp(min=1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """L2-normalise the last axis in float32 (float64 stays); norms below 1e-6 count as 1e-6."""
    x = _wide(x)
    return x / x.norm(dim=-1, keepdim=True).clamp(min=NORM_FLOOR)


def contrastive_columns(image_ND: Tensor, text_KD: Tensor, logit_scale: Tensor, valid_rows: Tensor | None) -> Tensor:
    """See :func:`fastdiffclip.kernels.contrastive.contrastive_columns`."""
    scores_NK = logit_scale * unit(image_ND) @ unit(text_KD).T
    return torch.logsumexp(_without_padding(scores_NK, valid_rows), dim=0)


def _without_padding(scores_NK: Tensor, valid_rows: Tensor | None) -> Tensor:
    if valid_rows is None:
        return scores_NK
    padding_N = torch.arange(scores_NK.shape[0], device=scores_NK.device) >= valid_rows
    return scores_NK.masked_fill(padding_N[:, None], EXCLUDED)


def contrastive(
    image_ND: Tensor,
    text_KD: Tensor,
    labels_N: Tensor,
    logit_scale: Tensor,
    *,
    targets: str,
    valid_rows: Tensor | None,
    counts_K: Tensor | None,
    column_logsumexp_K: Tensor | None,
) -> Tensor:
    """See :func:`fastdiffclip.kernels.contrastive.contrastive`."""
    rows, classes = image_ND.shape[0], text_KD.shape[0]
    scores_NK = logit_scale * unit(image_ND) @ unit(text_KD).T
    real_N = torch.ones(rows, device=scores_NK.device, dtype=scores_NK.dtype)
    if valid_rows is not None:
        real_N = (torch.arange(rows, device=scores_NK.device) < valid_rows).to(scores_NK.dtype)
    own_NK = F.one_hot(labels_N, classes).to(scores_NK.dtype) * real_N[:, None]
    local_K = own_NK.sum(0)
    counts_K = local_K if counts_K is None else counts_K.to(scores_NK.dtype)
    present_K, total = counts_K > 0, counts_K.sum().clamp(min=1)
    own_N = (scores_NK * own_NK).sum(1)

    column_K = torch.logsumexp(_without_padding(scores_NK, valid_rows), dim=0)
    if column_logsumexp_K is not None:
        # Value and gradient of the global column sums, as far as this block's scores reach into them.
        share_K = torch.exp(column_K - column_logsumexp_K).detach()
        column_K = column_logsumexp_K.detach() * local_K / counts_K.clamp(min=1) + share_K * (
            column_K - column_K.detach()
        )
    column_K = torch.where(present_K, column_K, 0.0)

    if targets == "class":
        row_N = torch.logsumexp(scores_NK, dim=1) - own_N
        per_class_K = torch.where(present_K, own_N @ own_NK / counts_K.clamp(min=1), 0.0)
        columns = (column_K - per_class_K).sum() / present_K.sum().clamp(min=1)
        return 0.5 * ((row_N * real_N).sum() / total + columns)
    weighted_NK = scores_NK + torch.where(present_K, counts_K, 1.0).log()
    row_N = torch.logsumexp(weighted_NK.masked_fill(~present_K, EXCLUDED), dim=1) - own_N
    return ((row_N * real_N).sum() + (counts_K * column_K).sum() - (own_N * real_N).sum()) / (2 * total)


def short_attention(q: Tensor, k: Tensor | None, v: Tensor | None, lengths: Tensor | None, scale: float) -> Tensor:
    """See :func:`fastdiffclip.kernels.short_attention.short_attention`; without k and v, ``q`` is the packed form."""
    if k is None or v is None:
        q, k, v = q.unbind(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = _wide(q @ k.transpose(2, 3)) * scale
    if lengths is not None:
        padding = torch.arange(k.shape[2], device=k.device) >= lengths[:, None]
        scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    if lengths is not None:  # without a single token softmax is 0 / 0
        weights = torch.where((lengths > 0)[:, None, None, None], weights, 0.0)
    return (weights.to(v.dtype) @ v).transpose(1, 2)
