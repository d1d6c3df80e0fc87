"""The call of the native ``masked_mse``; the op is in :mod:`fastdiffclip.kernels.masked_mse`."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from fastdiffclip.kernels.flat_scene import FlatScene, centre_outside
from fastdiffclip.kernels.masked_mse import ids_wrong
from fastdiffclip.kernels.native import loader

DTYPE_CODES = {torch.uint16: 0, torch.int16: 1, torch.float16: 2, torch.bfloat16: 3, torch.float32: 4}
_ARGS = struct.Struct("@18q2d4i")  # fdc_masked_mse_args of abi.h: ten pointers, eight sizes; weights; four codes


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
    with_grad: bool,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and, ``with_grad``, its gradient of :mod:`fastdiffclip.kernels.masked_mse`, in one pass over memory.

    On ``torch.get_num_threads()`` threads. Differences are the reference's bit by bit and the gradient is the same bits
    for every number of threads and every instruction set, the loss for every number of threads. Centres and ids of
    padding rows are not looked at.

    Args:
        prediction_BLC: float32 or bfloat16, on the CPU; copied unless contiguous.
        isa: a name out of ``loader.ISAS``; None takes the processor's best.

    Returns:
        Scalar float32 loss and the gradient in the shape and dtype of the prediction, without ``with_grad`` an empty
        tensor.

    Raises:
        UsageError: a centre lies outside its scene or ids are no choice of tokens; the row is named.
        ResourceError: the library is not available, memory is short or the processor lacks ``isa``.
    """
    rows, channels = len(centres), scene.channels
    real = rows if valid_rows is None else int(valid_rows)
    loss = torch.empty(())
    # Held until the call is over: a copy made here owns the memory that its pointer names.
    prediction_BLC, centres, ids_BV = (tensor.contiguous() for tensor in (prediction_BLC, centres, ids_BV))
    read = (prediction_BLC, *(None if tensor is None else tensor.contiguous() for tensor in scene.tensors))
    grad_BLC = torch.empty_like(prediction_BLC) if with_grad else prediction_BLC.new_empty(0)
    call, best = loader.function("fdc_masked_mse")
    code = call(
        _ARGS.pack(
            *(0 if tensor is None else tensor.data_ptr() for tensor in (*read, centres, ids_BV)),
            *(grad_BLC.data_ptr() if with_grad else 0, loss.data_ptr()),
            *(len(scene.pixels), channels, len(scene.extents), rows, real),
            *(real if total_rows is None else int(total_rows), window, ids_BV.shape[1], masked_weight, visible_weight),
            *(DTYPE_CODES[scene.pixels.dtype], DTYPE_CODES[prediction_BLC.dtype], torch.get_num_threads()),
            best if isa is None else loader.ISAS.index(isa),
        )
    )
    if code > rows:
        raise ids_wrong(code - rows - 1, window)
    if code > 0:
        raise centre_outside(centres, code - 1)
    loader.require_done(code, "masked_mse", isa)
    return loss, grad_BLC


def scale_in_place(values: Tensor, factor: Tensor) -> Tensor:
    """Multiply ``values`` by a scalar tensor, without touching them where it is 1; returns them."""
    return values if factor.item() == 1 else values.mul_(factor)
