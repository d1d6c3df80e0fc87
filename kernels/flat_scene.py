"""Scenes as the kernels read them: one flat pixel axis, a table of extents, a validity bitmap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiffclip.errors import UsageError

PIXEL_DTYPES = (torch.uint16, torch.int16, torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class FlatScene:
    """One modality of one or several scenes.

    Attributes:
        pixels: ``(N, C)``, contiguous, one of :data:`PIXEL_DTYPES`; all pixels of all scenes, row by row.
        scale, offset: ``(C,)`` float32; the value of a stored number is ``stored * scale + offset``.
        valid: ``(ceil(N / 8),)`` uint8 bitmap; pixel ``n`` is bit ``n % 8`` (least significant first) of byte
            ``n // 8``. None means that every pixel is valid.
        extents: ``(S, 3)`` int64; first pixel, height and width of each scene on the flat axis.

    Raises:
        UsageError: a tensor has another dtype, shape, device or layout; the message names it.
    """

    pixels: Tensor
    scale: Tensor
    offset: Tensor
    valid: Tensor | None
    extents: Tensor

    def __post_init__(self) -> None:
        pixels = self.pixels
        if pixels.ndim != 2 or pixels.dtype not in PIXEL_DTYPES or not pixels.is_contiguous():
            raise UsageError(
                f"pixels must be a contiguous (N, C) tensor of uint16, int16, float16, bfloat16 or float32; "
                f"got {tuple(pixels.shape)} {pixels.dtype}"
            )
        n, c = pixels.shape
        expected: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
            ("scale", self.scale, (c,), torch.float32),
            ("offset", self.offset, (c,), torch.float32),
        ]
        if self.valid is not None:
            expected.append(("valid", self.valid, ((n + 7) // 8,), torch.uint8))
        expected.append(("extents", self.extents, (self.extents.shape[0], 3), torch.int64))
        for name, tensor, shape, dtype in expected:
            if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != pixels.device:
                raise UsageError(
                    f"{name} must be a {dtype} tensor of shape {shape} on {pixels.device}; "
                    f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
                )

    @classmethod
    def from_numpy(
        cls,
        pixels: Any,
        scale: Any,
        offset: Any,
        valid: Any,
        extents: Any,
        device: torch.device | str = "cpu",
    ) -> FlatScene:
        """Wrap the arrays of one prepared modality (no copy on the CPU)."""
        tensors = [torch.from_numpy(a).to(device) for a in (pixels, scale, offset)]
        bitmap = None if valid is None else torch.from_numpy(valid).to(device)
        return cls(tensors[0], tensors[1], tensors[2], bitmap, torch.from_numpy(extents).to(device))

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return int(self.pixels.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the scene lives."""
        return self.pixels.device

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """The fields in order, as an op takes them: ``FlatScene(*scene.tensors)`` is the scene again."""
        return self.pixels, self.scale, self.offset, self.valid, self.extents

    def check_centres(self, centres: Tensor) -> None:
        """Raise :class:`UsageError` unless ``centres`` is ``(B, 3)`` int64 (scene, row, column) on this device."""
        if centres.ndim != 2 or centres.shape[1] != 3 or centres.dtype != torch.int64:
            raise UsageError(
                f"centres must be a (B, 3) int64 tensor of (scene, row, column); "
                f"got {tuple(centres.shape)} {centres.dtype}"
            )
        if centres.device != self.device:
            raise UsageError(f"centres must be on {self.device} like the scene; they are on {centres.device}")

    def check_centres_inside(self, centres: Tensor) -> None:
        """On the CPU, raise :class:`UsageError` for a centre outside the scenes; a GPU would have to be waited for."""
        if self.device.type != "cpu" or not len(centres):
            return
        scene = centres[:, 0]
        inside = (scene >= 0) & (scene < len(self.extents))
        size = self.extents[torch.where(inside, scene, 0), 1:]
        inside &= ((centres[:, 1:] >= 0) & (centres[:, 1:] < size)).all(1)
        if not bool(inside.all()):
            raise centre_outside(centres, int((~inside).nonzero()[0]))


def centre_outside(centres: Tensor, row: int) -> UsageError:
    """The error that names centre ``row``."""
    return UsageError(
        f"centre {row} is (scene, row, column) {tuple(centres[row].tolist())}, which lies outside the scenes; "
        "expected a scene of the extents, 0 <= row < height and 0 <= column < width"
    )
