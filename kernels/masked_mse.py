"""The restoration loss of UMD against windows read straight from the scene (DiffCLIP, eq. 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import dispatch, reference
from fastdiffclip.kernels.flat_scene import FlatScene

dispatch.register("masked_mse", {"reference": reference.masked_mse})


def masked_mse(
    prediction: Tensor,
    scene: FlatScene,
    centres: Tensor,
    ids: Tensor,
    *,
    window: int,
    masked_weight: float = 1.0,
    visible_weight: float = 1.0,
    valid_rows: Tensor | None = None,
    total_rows: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Weighted mean squared error of restored windows.

    Per window: ``w_m (|masked| / L) mean_masked + w_v (|visible| / L) mean_visible``, the means over tokens that are
    valid in the scene and over channels; then the sum over rows divided by ``total_rows``. Micro-batches and ranks
    that share ``total_rows`` therefore add up to the loss of the whole batch.

    Args:
        prediction: ``(B, L, C)`` restored clean windows, float.
        scene: one modality of the scenes; the target is read from it.
        centres: ``(B, 3)`` int64 (scene, row, column).
        ids: ``(B, V)`` int32 visible token ids.
        window: side P of the window, odd; L = P * P.
        masked_weight, visible_weight: w_m and w_v.
        valid_rows: scalar int64 tensor; rows from there on are padding and weigh nothing. None: all rows count.
        total_rows: scalar int64 tensor, the divisor; None for ``valid_rows``.
        impl: see :mod:`fastdiffclip.kernels.dispatch`.

    Returns:
        Scalar float32 loss (float64 for a float64 prediction), differentiable with respect to ``prediction``.

    Raises:
        UsageError: an argument does not fit the others.
    """
    scene.check_centres(centres)
    expected = (len(centres), window * window, scene.channels)
    if tuple(prediction.shape) != expected or not prediction.is_floating_point():
        raise UsageError(
            f"prediction must be a floating tensor of shape {expected}; "
            f"got {prediction.dtype} {tuple(prediction.shape)}"
        )
    if ids.ndim != 2 or ids.shape[0] != len(centres) or ids.dtype != torch.int32 or ids.shape[1] > expected[1]:
        raise UsageError(f"ids must be a ({len(centres)}, V) int32 tensor, V <= L; got {tuple(ids.shape)} {ids.dtype}")
    run = dispatch.pick("masked_mse", impl, scene.device)
    return run(
        prediction,
        scene,
        centres,
        ids,
        window=window,
        masked_weight=masked_weight,
        visible_weight=visible_weight,
        valid_rows=valid_rows,
        total_rows=total_rows,
    )
