"""The call of the native GELU; the op is in :mod:`fastdiffclip.kernels.gelu`."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from fastdiffclip.kernels.native import loader

DTYPE_CODES = {torch.bfloat16: 3, torch.float32: 4}
_ARGS = struct.Struct("@4q3i")  # fdc_gelu_args of abi.h: three pointers, a size; three codes


def gelu(x: Tensor, grad: Tensor | None = None, isa: str | None = None) -> Tensor:
    """``x Phi(x)``, or ``grad`` times its slope, of CPU tensors, on ``torch.get_num_threads()`` threads.

    Args:
        x: float32 or bfloat16; copied unless contiguous. grad: as x.
        isa: a name out of ``loader.ISAS``; None takes the processor's best.

    Returns:
        As x, contiguous.

    Raises:
        ResourceError: the library is not available or the processor lacks ``isa``.
    """
    x, grad = x.contiguous(), None if grad is None else grad.contiguous()
    out = torch.empty_like(x)
    call, best = loader.function("fdc_gelu")
    code = call(
        _ARGS.pack(
            *(x.data_ptr(), 0 if grad is None else grad.data_ptr(), out.data_ptr(), x.numel(), DTYPE_CODES[x.dtype]),
            *(torch.get_num_threads(), best if isa is None else loader.ISAS.index(isa)),
        )
    )
    loader.require_done(code, "gelu", isa)
    return out
