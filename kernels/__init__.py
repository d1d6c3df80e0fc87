"""The ops of the engine, each with one public function and ``impl=None|"reference"|"native"|"triton"``.

``impl=None`` takes the best implementation that is there for the device of the arguments. All implementations of an
op draw the same random numbers (:mod:`fastdiffclip.kernels.philox`) and agree within rounding.
"""

from __future__ import annotations

if __name__ != "fastdiffclip.kernels":
    raise ImportError(
        "this folder is the package 'fastdiffclip.kernels'; import it under that name "
        "(the package index has an unrelated 'kernels')"
    )

from fastdiffclip.kernels.contrastive import contrastive, contrastive_columns
from fastdiffclip.kernels.dispatch import implementations
from fastdiffclip.kernels.flat_scene import FlatScene
from fastdiffclip.kernels.gelu import gelu
from fastdiffclip.kernels.linear import linear
from fastdiffclip.kernels.masked_mse import masked_mse
from fastdiffclip.kernels.residual_norm import residual_norm
from fastdiffclip.kernels.short_attention import short_attention, short_attention_packed
from fastdiffclip.kernels.visible_noise import visible_noise

__all__ = [
    "FlatScene",
    "contrastive",
    "contrastive_columns",
    "gelu",
    "implementations",
    "linear",
    "masked_mse",
    "residual_norm",
    "short_attention",
    "short_attention_packed",
    "visible_noise",
]
