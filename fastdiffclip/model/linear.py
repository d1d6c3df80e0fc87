"""The linear layer of the image side."""

from __future__ import annotations

from torch import Tensor, nn

from fastdiffclip.kernels import linear


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`fastdiffclip.kernels.linear`, which is faster in float32 on some processors.

    Attributes:
        impl: forces an implementation; None leaves the choice to the op.
    """

    impl: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, impl=self.impl)
