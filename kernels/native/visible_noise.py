"""The native ``visible_noise``: ctypes mirror of ``fdc_visible_noise_args`` and its call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels.flat_scene import FlatScene, centre_outside
from fastdiffclip.kernels.native import loader

# Fields of the struct and codes, as in abi.h.
_POINTERS = ("pixels", "scale", "offset", "valid", "extents", "centres", "mix", "rng", "x", "ids")
_SIZES = ("pixel_count", "channels", "scenes", "rows", "valid_rows", "window", "visible", "modality")
_CODES = ("pixel_dtype", "out_dtype", "threads", "isa")
_DTYPE_CODES = {torch.uint16: 0, torch.int16: 1, torch.float16: 2, torch.bfloat16: 3, torch.float32: 4}


class _Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int32) for name in _CODES),
    ]


def visible_noise(
    scene: FlatScene,
    centres: Tensor,
    mix: Tensor | None,
    rng: Tensor,
    *,
    window: int,
    visible: int,
    modality: int,
    valid_rows: Tensor | int | None,
    out_dtype: torch.dtype,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The op of :mod:`fastdiffclip.kernels.visible_noise` on the CPU, on ``torch.get_num_threads()`` threads.

    Ids are the reference's bit by bit. Normals are computed in float32, within 4e-7 * max(1, |eps|) of the
    exact ones, and are the same bits for every number of threads, batch split and instruction set.

    Args:
        mix: ``(B, 2)`` float32, sqrt(abar_t) and sqrt(1 - abar_t) of each row, or None for clean windows.
        isa: a name out of ``loader.ISAS``; None takes the processor's best.

    Returns:
        ``(B, V, C)`` of ``out_dtype`` and ids ``(B, V)`` int32.

    Raises:
        UsageError: a dtype or shape is wrong, or a centre lies outside its scene (the row is named).
        ResourceError: the library is not available, memory is short or the processor lacks ``isa``.
    """
    library = loader.load()
    rows, channels = centres.shape[0], scene.channels
    _expect("centres", centres, (rows, 3), torch.int64)
    _expect("rng", rng, (3,), torch.int64)
    if mix is not None:
        _expect("mix", mix, (rows, 2), torch.float32)
    x_BVC = torch.empty((rows, visible, channels), dtype=out_dtype)
    ids_BV = torch.empty((rows, visible), dtype=torch.int32)
    tensors = (
        *(scene.pixels, scene.scale, scene.offset, scene.valid, scene.extents),
        *(centres, mix, rng, x_BVC, ids_BV),
    )
    # Held until the call is over: a copy made here owns the memory that its pointer names.
    held = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    args = _Args(
        *(None if tensor is None else tensor.data_ptr() for tensor in held),
        pixel_count=scene.pixels.shape[0],
        channels=channels,
        scenes=scene.extents.shape[0],
        rows=rows,
        valid_rows=rows if valid_rows is None else int(valid_rows),
        window=window,
        visible=visible,
        modality=modality,
        pixel_dtype=_DTYPE_CODES[scene.pixels.dtype],
        out_dtype=_DTYPE_CODES[out_dtype],
        threads=torch.get_num_threads(),
        isa=library.fdc_best_isa() if isa is None else loader.ISAS.index(isa),
    )
    run = library.fdc_visible_noise
    run.restype, run.argtypes = ctypes.c_int64, [ctypes.POINTER(_Args)]
    _check(run(ctypes.byref(args)), centres, isa)
    return x_BVC, ids_BV


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
        raise UsageError(
            f"{name} must be a {dtype} tensor of shape {shape} on the CPU; "
            f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )


def _check(code: int, centres: Tensor, isa: str | None) -> None:
    if code > 0:
        raise centre_outside(centres, code - 1)
    loader.require_done(code, "visible_noise", isa)
