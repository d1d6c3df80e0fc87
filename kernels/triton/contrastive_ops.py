"""``contrastive`` in Triton as autograd and ``torch.compile`` see it: a pair of ops for each of its two regimes.

Triton is imported when an op runs for the first time, not before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Images and texts that one program takes. A float32 product keeps the contracted axis of an operand in registers, so
# more would spill; and three products of 64 * 64 * 1024 multiply-adds, at half of the 128 that a multiprocessor does in
# a cycle, would take 110 microseconds, about as long as the launches of the tiled kernels.
ONE_PROGRAM = ((64, 64), (128, 32))
WIDEST_ONE_PROGRAM = 1024
TEXT_BLOCK = 128  # the tiled kernels' vectors over texts are padded to whole ones


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
    image_ND, text_KD, logit_scale, valid_rows = _common(image_ND, text_KD, logit_scale, valid_rows)
    given = tuple(None if x is None else x.detach().float() for x in (counts_K, column_logsumexp_K))
    (images, width), texts = image_ND.shape, text_KD.shape[0]
    small = width <= WIDEST_ONE_PROGRAM and any(images <= n and texts <= k for n, k in ONE_PROGRAM)
    op = _one_program if small else _tiled
    loss: Tensor = op(image_ND, text_KD, labels_N, logit_scale, valid_rows, *given, targets == "pairwise")[0]
    return loss


def contrastive_columns(image_ND: Tensor, text_KD: Tensor, logit_scale: Tensor, valid_rows: Tensor | None) -> Tensor:
    """See :func:`fastdiffclip.kernels.contrastive.contrastive_columns`."""
    sums: Tensor = _columns(*_common(image_ND, text_KD, logit_scale, valid_rows))
    return sums


def _common(
    image: Tensor, text: Tensor, logit_scale: Tensor, valid_rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Arguments in the types that the kernels know: bfloat16 stays, everything else is computed in float32."""
    if not image.dtype == text.dtype == torch.bfloat16:
        image, text = image.float(), text.float()
    return image, text, logit_scale.reshape(()).to(image.device, torch.float32), valid_rows


def _contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def _wanted(ctx: Any, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients in the places of the eight arguments of either op, None for those that nobody needs."""
    places = image, text, None, scale, None, None, None, None
    return tuple(x if needed else None for x, needed in zip(places, ctx.needs_input_grad, strict=True))


# --- one program: the forward pass knows the gradients already ------------------------------------------------------


@torch.library.custom_op("fastdiffclip::contrastive_one_program", mutates_args=())
def _one_program(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    valid_rows: Tensor | None,
    counts: Tensor | None,
    column_logsumexp: Tensor | None,
    pairwise: bool,
) -> tuple[Tensor, Tensor]:
    from fastdiffclip.kernels.triton import contrastive_small

    given = _contiguous(image, text, labels, logit_scale, valid_rows, counts, column_logsumexp)
    return contrastive_small.loss_and_gradients(pairwise, *given)


@_one_program.register_fake
def _(image: Tensor, text: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    size = image.numel() + text.numel() + 1
    return image.new_empty((), dtype=torch.float32), image.new_empty(size, dtype=torch.float32)


@torch.library.custom_op("fastdiffclip::contrastive_scaled_gradients", mutates_args=())
def _scaled_gradients(
    gradients: Tensor, grad_loss: Tensor, images: int, texts: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    from fastdiffclip.kernels.triton import contrastive_small

    return contrastive_small.scaled_gradients(gradients, grad_loss.contiguous(), images, texts, dtype)


@_scaled_gradients.register_fake
def _(
    gradients: Tensor, grad_loss: Tensor, images: int, texts: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    width = (gradients.shape[0] - 1) // (images + texts)
    image, text = (gradients.new_empty((rows, width), dtype=dtype) for rows in (images, texts))
    return image, text, gradients.new_empty(())


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    image, text, *_ = inputs
    ctx.set_materialize_grads(False)  # of the gradients, an output that nobody differentiates
    ctx.save_for_backward(output[1])
    ctx.sizes = len(image), len(text), image.dtype


def _differentiate_one_program(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 8
    found = _scaled_gradients(ctx.saved_tensors[0], grad_loss, *ctx.sizes)
    return _wanted(ctx, *found)


_one_program.register_autograd(_differentiate_one_program, setup_context=_keep_gradients)


# --- tiles ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastdiffclip::contrastive_tiled", mutates_args=())
def _tiled(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    valid_rows: Tensor | None,
    counts: Tensor | None,
    column_logsumexp: Tensor | None,
    pairwise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastdiffclip.kernels.triton import contrastive as tiles

    batch = tiles.Batch(*_contiguous(image, text, labels, logit_scale))
    return tiles.loss_and_sums(batch, pairwise, *_contiguous(valid_rows, counts, column_logsumexp))


@_tiled.register_fake
def _(image: Tensor, text: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    padded = (text.shape[0] + TEXT_BLOCK - 1) // TEXT_BLOCK * TEXT_BLOCK
    shapes = (), (3, image.shape[0]), (3, padded), ()
    loss, rows, columns, half = (image.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return loss, rows, columns, half


@torch.library.custom_op("fastdiffclip::contrastive_tiled_backward", mutates_args=())
def _tiled_backward(
    grad_loss: Tensor,
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    rows: Tensor,
    columns: Tensor,
    half: Tensor,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from fastdiffclip.kernels.triton import contrastive as tiles

    batch = tiles.Batch(*_contiguous(image, text, labels, logit_scale))
    with torch.autocast(image.device.type, enabled=False):  # it would round what is added up in float32
        return tiles.gradients(grad_loss.contiguous(), batch, rows, columns, half, need_image, need_text)


@_tiled_backward.register_fake
def _(
    grad_loss: Tensor,
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    rows: Tensor,
    columns: Tensor,
    half: Tensor,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_image, grad_text = (x.new_empty(x.shape if y else 0) for x, y in ((image, need_image), (text, need_text)))
    return grad_image, grad_text, logit_scale.new_empty(())


def _keep_sums(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # of the sums, outputs that nobody differentiates
    ctx.save_for_backward(*inputs[:4], *output[1:])


def _differentiate_tiled(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 8
    return _wanted(ctx, *_tiled_backward(grad_loss, *ctx.saved_tensors, *ctx.needs_input_grad[:2]))


_tiled.register_autograd(_differentiate_tiled, setup_context=_keep_sums)


@torch.library.custom_op("fastdiffclip::contrastive_columns", mutates_args=())
def _columns(image: Tensor, text: Tensor, logit_scale: Tensor, valid_rows: Tensor | None) -> Tensor:
    from fastdiffclip.kernels.triton import contrastive as tiles

    return tiles.column_sums(*_contiguous(image, text, logit_scale, valid_rows))


@_columns.register_fake
def _(image: Tensor, text: Tensor, logit_scale: Tensor, valid_rows: Tensor | None) -> Tensor:
    return text.new_empty(text.shape[:1], dtype=torch.float32)
