"""The LayerNorm of the image side's residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdiffclip.kernels import residual_norm


class ResidualNorm(nn.LayerNorm):
    """A LayerNorm by :func:`fastdiffclip.kernels.residual_norm`, which adds to the residual stream in the same pass.

    Attributes:
        impl: forces an implementation; None leaves the choice to the op.
    """

    impl: str | None = None

    def forward(  # type: ignore[override]
        self, x: Tensor, added: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x + added``, and its normed rows in ``out_dtype``, or in the dtype that a linear layer reads here."""
        if out_dtype is None and torch.is_autocast_enabled(x.device.type):
            out_dtype = torch.get_autocast_dtype(x.device.type)
        return residual_norm(x, added, self.weight, self.bias, self.eps, out_dtype=out_dtype, impl=self.impl)
