"""What the logistic head sees of a window: means of the prepared pixels around its centre, and tokens of the encoder.

Shape suffixes: B windows, L tokens of a window, C channels of a modality, D width, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiffclip.kernels.reference import unit

if TYPE_CHECKING:
    from fastdiffclip.config import Config


@dataclass(frozen=True)
class FeatureLayout:
    """Where each part of a window stands in its row of features.

    The row begins with one part per size, the mean of all modalities over ``size`` x ``size`` pixels, each part of
    length 1; class tokens of all layers and the mean token follow where the encoder is read, and the restored window
    means, part by part of length 1, where the network over bands is.

    Attributes:
        sizes: sides of the window means, ascending. channels: of all modalities together.
        class_tokens, mean_token: number of features that the encoder adds, 0 where it is not read.
        restored_sizes: sides of the window means that are restored, none where the network over bands is not read.
    """

    sizes: tuple[int, ...]
    channels: int
    class_tokens: int
    mean_token: int
    restored_sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, channels: Mapping[str, int], config: Config) -> FeatureLayout:
        """The layout that the settings ask for; sizes beyond the window are left out, 1 x 1 stands in for none."""
        settings, model = config.logistic, config.model
        sizes = sorted({*config.mean_sizes, *([1] if "pixel" in settings.views else [])})
        read = "tokens" in settings.views
        side = len(channels) * model.width
        return cls(
            tuple(sizes),
            sum(channels.values()),
            side * model.depth if read and settings.class_tokens > 0 else 0,
            side if read and settings.mean_token > 0 else 0,
            config.mean_sizes if "restored" in settings.views else (),
        )

    @property
    def reads_tokens(self) -> bool:
        """Whether the encoder is read."""
        return self.class_tokens + self.mean_token > 0

    @property
    def means(self) -> int:
        """Number of features that are window means."""
        return len(self.sizes) * self.channels

    @property
    def total(self) -> int:
        """Features of a window, F."""
        return self.means + self.class_tokens + self.mean_token + self.restored

    @property
    def restored(self) -> int:
        """Number of features that are restored window means, the last ones of the row."""
        return len(self.restored_sizes) * self.channels

    def mean_of(self, size: int) -> slice:
        """Where the window mean of a size stands."""
        first = self.sizes.index(size) * self.channels
        return slice(first, first + self.channels)


def means_of_windows(windows_BLC: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """``(B, S * sum of C)``: mean of the centred size x size pixels of windows ``(B, L, C_m)``, size by size."""
    side = round(windows_BLC[0].shape[1] ** 0.5)
    parts = []
    for size in sizes:
        low, high = (side - size) // 2, (side + size) // 2
        for window in windows_BLC:
            parts.append(window.unflatten(1, (side, side))[:, low:high, low:high].mean(dim=(1, 2)))
    return torch.cat(parts, dim=1)


def means_of_grid(grid_HWC: Tensor, valid_HW: Tensor | None, sizes: Sequence[int], radius: int) -> list[Tensor]:
    """``(h, w, C)`` per size: :func:`means_of_windows` for every pixel of a grid at once.

    Sums are taken column by column, then row by row, in one order for every pixel, so that the bits of a mean do not
    depend on where in a grid its pixel lies.

    Args:
        grid_HWC: ``(h + 2 radius, w + 2 radius, C)``; an invalid pixel is 0.
        valid_HW: which pixels are valid, None for all. An invalid neighbour counts as the centre pixel.
    """
    height, width = grid_HWC.shape[0] - 2 * radius, grid_HWC.shape[1] - 2 * radius
    centre = grid_HWC[radius : radius + height, radius : radius + width]
    known = None if valid_HW is None else valid_HW[:, :, None].to(grid_HWC.dtype)
    means = []
    for size in sizes:
        total = _box_sum(grid_HWC, size, radius, height, width)
        if known is not None:
            missing = size * size - _box_sum(known, size, radius, height, width)
            total = total + missing * centre
        means.append(total / (size * size))
    return means


def _box_sum(grid_HWC: Tensor, size: int, radius: int, height: int, width: int) -> Tensor:
    """``(height, width, C)`` sums over size x size pixels."""
    first = radius - size // 2
    rows = grid_HWC[first : first + height + size - 1]
    across = rows[:, first : first + width].clone()
    for shift in range(1, size):
        across += rows[:, first + shift : first + shift + width]
    total = across[:height].clone()
    for shift in range(1, size):
        total += across[shift : shift + height]
    return total


def unit_means(means_BF: Tensor, sizes: int) -> Tensor:
    """Window means with the part of every size scaled to length 1, ``(B, S * sum of C)``."""
    return unit(means_BF.unflatten(1, (sizes, -1))).flatten(1)
