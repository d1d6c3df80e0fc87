"""Masking, window gather, normalisation and noise in one op: what the encoder of UMD reads.

Equation: ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`` on the visible tokens only (DiffCLIP, eqs. 1 and 2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import dispatch, native, reference
from fastdiffclip.kernels.flat_scene import FlatScene

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _native(
    scene: FlatScene,
    centres: Tensor,
    timestep: Tensor | None,
    schedule: Tensor | None,
    rng: Tensor,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    rows = None if timestep is None or schedule is None else schedule[timestep]
    return native.visible_noise(scene, centres, rows, rng, **settings)


dispatch.register("visible_noise", {"reference": reference.visible_noise, "native": _native})


def visible_count(tokens: int, mask_ratio: float) -> int:
    """Number of visible tokens, ``max(1, L - floor(ratio * L + 0.5))``."""
    return max(1, tokens - int(mask_ratio * tokens + 0.5))


def visible_noise(
    scene: FlatScene,
    centres: Tensor,
    timestep: Tensor | None,
    schedule: Tensor | None,
    rng: Tensor,
    *,
    window: int,
    visible: int,
    modality: int = 0,
    valid_rows: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the visible tokens of each window, read them from the scene and noise them.

    Args:
        scene: one modality of the scenes.
        centres: ``(B, 3)`` int64 (scene, row, column); each centre must be a valid pixel.
        timestep: ``(B,)`` int64 in [0, T), or None for clean windows.
        schedule: ``(T, 2)`` float32, columns sqrt(abar) and sqrt(1 - abar); None with ``timestep=None``.
        rng: ``(3,)`` int64 of :func:`fastdiffclip.kernels.philox.rng_state`.
        window: side P of the window, odd; L = P * P tokens in row-major order.
        visible: number V of visible tokens, 1..L. With V = L the ids are 0..L-1.
        modality: number of the modality, part of the random address.
        valid_rows: scalar int64 tensor; rows from there on are padding and come out as zeros. None: all rows count.
        out_dtype: float32, bfloat16 or float16.
        impl: see :mod:`fastdiffclip.kernels.dispatch`.

    Returns:
        ``x_t`` of shape ``(B, V, C)`` and ids ``(B, V)`` int32, ascending.

    Raises:
        UsageError: an argument is out of range or of another dtype, shape or device.
    """
    scene.check_centres(centres)
    if window < 1 or window % 2 == 0 or window * window > 1 << 16:
        raise UsageError(f"window must be odd and between 1 and 255; got {window}")
    if not 1 <= visible <= window * window:
        raise UsageError(f"visible must lie in 1..{window * window} for window {window}; got {visible}")
    if not 0 <= modality < 1 << 16:
        raise UsageError(f"modality must lie in 0..65535; got {modality}")
    if out_dtype not in OUT_DTYPES:
        raise UsageError(f"out_dtype must be float32, bfloat16 or float16; got {out_dtype}")
    check_rng(rng, scene.device)
    if (timestep is None) != (schedule is None):
        raise UsageError("timestep and schedule go together: give both for noisy windows, neither for clean ones")
    if timestep is not None and schedule is not None:
        if timestep.shape != centres.shape[:1] or timestep.dtype != torch.int64:
            raise UsageError(
                f"timestep must be an int64 tensor of shape ({len(centres)},); "
                f"got {timestep.dtype} {tuple(timestep.shape)}"
            )
        if schedule.ndim != 2 or schedule.shape[1] != 2 or schedule.dtype != torch.float32:
            raise UsageError(f"schedule must be a (T, 2) float32 tensor; got {tuple(schedule.shape)} {schedule.dtype}")
    run = dispatch.pick("visible_noise", impl, scene.device)
    return run(
        scene,
        centres,
        timestep,
        schedule,
        rng,
        window=window,
        visible=visible,
        modality=modality,
        valid_rows=valid_rows,
        out_dtype=out_dtype,
    )


def check_rng(rng: Tensor, device: torch.device) -> None:
    """Raise :class:`UsageError` unless ``rng`` is the ``(3,)`` int64 state of ``philox.rng_state`` on ``device``."""
    if rng.shape != (3,) or rng.dtype != torch.int64 or rng.device != device:
        raise UsageError(
            f"rng must be the (3,) int64 tensor of philox.rng_state on {device}; "
            f"got {tuple(rng.shape)} {rng.dtype} on {rng.device}"
        )
