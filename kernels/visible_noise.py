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
LARGEST_TRITON_WINDOW = 31


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
        timestep: ``(B,)`` int64 in [0, T), or None for clean windows. Checked on the CPU; on a GPU, which would have
            to be waited for, one outside counts as the nearest inside, and so do centres.
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
    check_count("valid_rows", valid_rows, scene.device)
    if (timestep is None) != (schedule is None):
        raise UsageError("timestep and schedule go together: give both for noisy windows, neither for clean ones")
    if timestep is not None and schedule is not None:
        _check_noise(timestep, schedule, len(centres), scene.device)
    run = dispatch.pick("visible_noise", impl, scene.device, unsupported_window(window))
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


def _check_noise(timestep: Tensor, schedule: Tensor, rows: int, device: torch.device) -> None:
    if timestep.shape != (rows,) or timestep.dtype != torch.int64 or timestep.device != device:
        raise UsageError(
            f"timestep must be an int64 tensor of shape ({rows},) on {device}; "
            f"got {timestep.dtype} {tuple(timestep.shape)} on {timestep.device}"
        )
    if schedule.ndim != 2 or schedule.shape[1] != 2 or schedule.dtype != torch.float32 or schedule.device != device:
        raise UsageError(
            f"schedule must be a (T, 2) float32 tensor on {device}; "
            f"got {tuple(schedule.shape)} {schedule.dtype} on {schedule.device}"
        )


def _check_timesteps(timestep: Tensor | None, schedule: Tensor | None) -> None:
    """On the CPU, raise :class:`UsageError` for a timestep that the schedule lacks."""
    if timestep is None or schedule is None or timestep.device.type != "cpu" or not len(timestep):
        return
    lowest, highest = (int(bound) for bound in timestep.aminmax())
    if lowest < 0 or highest >= len(schedule):
        raise UsageError(
            f"timestep must lie in 0..{len(schedule) - 1}, the rows of schedule; got values {lowest} to {highest}"
        )


def check_rng(rng: Tensor, device: torch.device) -> None:
    """Raise :class:`UsageError` unless ``rng`` is the ``(3,)`` int64 state of ``philox.rng_state`` on ``device``."""
    if rng.shape != (3,) or rng.dtype != torch.int64 or rng.device != device:
        raise UsageError(
            f"rng must be the (3,) int64 tensor of philox.rng_state on {device}; "
            f"got {tuple(rng.shape)} {rng.dtype} on {rng.device}"
        )


def check_count(name: str, count: Tensor | None, device: torch.device) -> None:
    """Raise :class:`UsageError` unless ``count`` is None or a scalar int64 tensor on ``device``."""
    if count is not None and (count.ndim != 0 or count.dtype != torch.int64 or count.device != device):
        raise UsageError(
            f"{name} must be a scalar int64 tensor on {device}; "
            f"got {tuple(count.shape)} {count.dtype} on {count.device}"
        )


def unsupported_window(window: int) -> dict[str, str]:
    """Implementation to reason, for windows that it does not take."""
    if window <= LARGEST_TRITON_WINDOW:
        return {}
    return {
        "triton": f"it takes windows up to {LARGEST_TRITON_WINDOW} x {LARGEST_TRITON_WINDOW}, not {window} x {window}"
    }


def _reference(
    scene: FlatScene,
    centres: Tensor,
    timestep: Tensor | None,
    schedule: Tensor | None,
    rng: Tensor,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    if not torch.compiler.is_compiling():
        scene.check_centres_inside(centres)
        _check_timesteps(timestep, schedule)
    return reference.visible_noise(scene, centres, timestep, schedule, rng, **settings)


def _native(
    scene: FlatScene,
    centres: Tensor,
    timestep: Tensor | None,
    schedule: Tensor | None,
    rng: Tensor,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    if _traced(centres):
        return _op(*scene.tensors, centres, timestep, schedule, rng, **settings, impl="native")
    _check_timesteps(timestep, schedule)  # the library itself looks at the centres
    mix = None if timestep is None or schedule is None else schedule.index_select(0, timestep)
    return native.visible_noise(scene, centres, mix, rng, **settings)


def _triton(
    scene: FlatScene,
    centres: Tensor,
    timestep: Tensor | None,
    schedule: Tensor | None,
    rng: Tensor,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    if _traced(centres):
        return _op(*scene.tensors, centres, timestep, schedule, rng, **settings, impl="triton")
    from fastdiffclip.kernels.triton.visible_noise import visible_noise as launch

    scene.check_centres_inside(centres)
    _check_timesteps(timestep, schedule)
    return launch(scene, centres, timestep, schedule, rng, **settings)


def _traced(tensor: Tensor) -> bool:
    # Else the op runs without the dispatcher, whose round trip costs 40 microseconds, a quarter of 16 native windows.
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


@torch.library.custom_op("fastdiffclip::visible_noise", mutates_args=())
def _op(
    pixels: Tensor,
    scale: Tensor,
    offset: Tensor,
    valid: Tensor | None,
    extents: Tensor,
    centres: Tensor,
    timestep: Tensor | None,
    schedule: Tensor | None,
    rng: Tensor,
    window: int,
    visible: int,
    modality: int,
    valid_rows: Tensor | None,
    out_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """What a graph holds. Nothing in it is differentiated: x_t has no gradient."""
    run = _native if impl == "native" else _triton
    return run(
        FlatScene(pixels, scale, offset, valid, extents),
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


@_op.register_fake
def _(
    pixels: Tensor,
    scale: Tensor,
    offset: Tensor,
    valid: Tensor | None,
    extents: Tensor,
    centres: Tensor,
    timestep: Tensor | None,
    schedule: Tensor | None,
    rng: Tensor,
    window: int,
    visible: int,
    modality: int,
    valid_rows: Tensor | None,
    out_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor]:
    rows, channels = centres.shape[0], pixels.shape[1]
    x_BVC = centres.new_empty((rows, visible, channels), dtype=out_dtype)
    return x_BVC, centres.new_empty((rows, visible), dtype=torch.int32)


dispatch.register("visible_noise", {"reference": _reference, "native": _native, "triton": _triton})
