"""The temperature-scaled symmetric contrastive loss, with each distinct text encoded once (DiffCLIP, eq. 16).

With N images, K texts, class k(i), multiplicities n_k and ``s_ik = logit_scale * z_i . t_k``::

    L = 1/(2N) [ sum_i (log sum_k n_k e^{s_ik} - s_{i,k(i)}) + sum_k n_k log sum_j e^{s_jk} - sum_i s_{i,k(i)} ]

equals eq. 16 over N image-text pairs in which images of one class share a text. K = N with labels 0..N-1 is the
general form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiffclip.errors import UsageError, nearest
from fastdiffclip.kernels import dispatch, reference
from fastdiffclip.kernels.triton import contrastive_ops
from fastdiffclip.kernels.visible_noise import check_count

TARGETS = ("pairwise", "class")
dispatch.register("contrastive", {"reference": reference.contrastive, "triton": contrastive_ops.contrastive})
dispatch.register(
    "contrastive_columns",
    {"reference": reference.contrastive_columns, "triton": contrastive_ops.contrastive_columns},
)


def contrastive(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    *,
    targets: str = "pairwise",
    valid_rows: Tensor | None = None,
    counts: Tensor | None = None,
    column_logsumexp: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Symmetric contrastive loss of un-normalised embeddings; L2 norms are taken inside, in float32.

    ``targets="class"``: image to text is cross-entropy over all K texts; text to image is, for each class that is
    present, the mean of ``-log softmax_j(s_jk)`` over its own images, averaged over classes; the two are averaged.

    A rank of a distributed run passes its own block of images with the global ``counts`` and ``column_logsumexp``
    (:func:`contrastive_columns` of every rank, combined by logsumexp): the losses of the ranks then add up to the
    global loss, and so do the gradients.

    Args:
        image: ``(N, D)`` float.
        text: ``(K, D)`` float, one row per distinct text.
        labels: ``(N,)`` int64, row of ``text`` that belongs to each image; padding rows hold any valid row.
        logit_scale: scalar tensor, 1 / temperature, differentiable.
        targets: ``"pairwise"`` (eq. 16) or ``"class"``.
        valid_rows: scalar int64 tensor; images from there on are padding. None: all count.
        counts: ``(K,)`` multiplicities over the global batch; None for those of ``labels``.
        column_logsumexp: ``(K,)`` ``log sum_j e^{s_jk}`` over the global batch; None for this block alone.
        impl: see :mod:`fastdiffclip.kernels.dispatch`.

    Returns:
        Scalar loss, differentiable with respect to ``image``, ``text`` and ``logit_scale``.

    Raises:
        UsageError: an argument does not fit the others, or a label names no text.
    """
    _check(image, text, logit_scale)
    if targets not in TARGETS:
        raise UsageError(f"targets must be 'pairwise' or 'class'{nearest(targets, TARGETS)}; got {targets!r}")
    if labels.shape != image.shape[:1] or labels.dtype != torch.int64:
        raise UsageError(
            f"labels must be an int64 tensor of shape ({len(image)},); got {labels.dtype} {tuple(labels.shape)}"
        )
    _check_range(labels, len(text))
    for name, tensor in (("counts", counts), ("column_logsumexp", column_logsumexp)):
        if tensor is not None and tensor.shape != text.shape[:1]:
            raise UsageError(f"{name} must have shape ({len(text)},); got {tuple(tensor.shape)}")
    for name, tensor in (("labels", labels), ("counts", counts), ("column_logsumexp", column_logsumexp)):
        if tensor is not None and tensor.device != image.device:
            raise UsageError(f"{name} must be on {image.device} like the images; it is on {tensor.device}")
    check_count("valid_rows", valid_rows, image.device)
    run = dispatch.pick("contrastive", impl, image.device, _unsupported(image, text))
    return run(
        image,
        text,
        labels,
        logit_scale,
        targets=targets,
        valid_rows=valid_rows,
        counts_K=counts,
        column_logsumexp_K=column_logsumexp,
    )


def contrastive_columns(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    valid_rows: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """``(K,)`` logsumexp of this block's scores per text: what ranks exchange before :func:`contrastive`.

    Arguments as there. A block of padding rows alone gives a huge negative number, not -inf. No gradient flows through
    the sums: :func:`contrastive` accounts for every rank's share in them.
    """
    _check(image, text, logit_scale)
    check_count("valid_rows", valid_rows, image.device)
    run = dispatch.pick("contrastive_columns", impl, image.device, _unsupported(image, text))
    return run(image.detach(), text.detach(), logit_scale.detach(), valid_rows)


def _check(image: Tensor, text: Tensor, logit_scale: Tensor) -> None:
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise UsageError(f"image and text must be (N, D) and (K, D); got {tuple(image.shape)} and {tuple(text.shape)}")
    if image.device != text.device:
        raise UsageError(f"image and text must be on one device; got {image.device} and {text.device}")
    if logit_scale.numel() != 1:
        raise UsageError(f"logit_scale must be a scalar tensor; got shape {tuple(logit_scale.shape)}")


def _check_range(labels: Tensor, texts: int) -> None:
    """Raise where a label names no text. On a GPU, and in a graph, nobody waits to see the labels."""
    if torch.compiler.is_compiling() or labels.device.type != "cpu" or not len(labels):
        return
    if not 0 <= int(labels.min()) <= int(labels.max()) < texts:
        raise UsageError(f"labels must lie in 0..{texts - 1}, the rows of text")


def _unsupported(image: Tensor, text: Tensor) -> dict[str, str]:
    """Implementation to reason, for embeddings that it does not take."""
    if torch.float64 in (image.dtype, text.dtype):
        return {"triton": "it takes float32, bfloat16 and float16, not torch.float64"}
    if not (image.numel() and text.numel()):
        return {"triton": f"it takes one image and one text or more, not {tuple(image.shape)} and {tuple(text.shape)}"}
    return {}
