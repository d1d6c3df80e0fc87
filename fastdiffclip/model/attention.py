"""The one attention call of the image side, and the choice of its backend. The only file that names xformers.

On CUDA the encoder uses xformers memory-efficient attention wherever it loads, the decoders use ``short_attention``;
on a CPU both use ``short_attention``; SDPA is the fallback of all. Where torch is to be deterministic xformers is left
out: its backward pass adds in no fixed order.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import linear, short_attention, short_attention_packed
from fastdiffclip.model.linear import Linear

logger = logging.getLogger(__name__)
# What importing or calling a wheel built for another torch, CUDA or Python has been seen to raise.
UNUSABLE = (ImportError, NotImplementedError, OSError, RuntimeError, AttributeError, TypeError, ValueError)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled dot product attention on ``(B, L, H, D)``."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xformers memory-efficient attention on ``(B, L, H, D)``."""
    from xformers.ops import memory_efficient_attention

    attended: Tensor = memory_efficient_attention(q, k, v)
    return attended


BACKENDS: dict[str, Attend] = {"xformers": xformers_attention, "short": short_attention, "sdpa": sdpa}


def self_attention(backend: str, qkv: Tensor) -> Tensor:
    """The backend's attention of the three parts of one projection ``(B, L, 3, H, D)``."""
    if backend == "short":  # writes the gradient as one tensor, which the others have to put together from three
        return short_attention_packed(qkv)
    return BACKENDS[backend](*qkv.unbind(2))


@functools.cache
def xformers_unavailable(device_type: str) -> str:
    """Return why xformers attention cannot run on ``device_type``, or ``""`` when a small call works."""
    if device_type != "cuda":
        return "xformers has operators for CUDA only"
    logging.getLogger("xformers").setLevel(logging.ERROR)
    _preload_cuda12_runtime()
    try:
        probe = torch.zeros(1, 8, 1, 16, device=device_type, dtype=torch.bfloat16)
        xformers_attention(probe, probe, probe)
    except UNUSABLE as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return ""


def _preload_cuda12_runtime() -> None:
    """Make libcudart.so.12 of the wheel nvidia-cuda-runtime-cu12 known, which xformers links under a CUDA 13 torch."""
    spec = importlib.util.find_spec("nvidia")
    for root in list(spec.submodule_search_locations or []) if spec else []:
        library = Path(root) / "cuda_runtime" / "lib" / "libcudart.so.12"
        if library.is_file():
            try:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                logger.debug("cannot preload %s: %s", library, error)
            return


def choose(requested: str, role: str, device: torch.device | str) -> tuple[str, str]:
    """Return the backend for ``role`` (``"encoder"`` or ``"decoder"``) on ``device``, and why.

    Raises:
        UsageError: a backend was forced that cannot run there.
    """
    device_type = torch.device(device).type
    if requested != "fastest":
        reason = xformers_unavailable(device_type) if requested == "xformers" else ""
        if requested == "xformers" and not reason and torch.are_deterministic_algorithms_enabled():
            reason = "its gradients are not the same bytes every time, which --deterministic asks for"
        if reason:
            raise UsageError(f"model.attention=xformers cannot be used: {reason}; choose fastest, short or sdpa")
        return requested, "asked for"
    if device_type == "cpu":
        return "short", "the CPU's attention for short sequences"
    if role == "decoder":
        return "short", "the decoders' attention for short sequences"
    if torch.are_deterministic_algorithms_enabled():
        return "short", "its gradients are the same bytes every time, those of xformers are not"
    reason = xformers_unavailable(device_type)
    return ("sdpa", f"xformers is not used: {reason}") if reason else ("xformers", "loads on this device")


class Attention(nn.Module):
    """Multi-head self-attention; with ``queries`` only the first that many tokens are computed."""

    def __init__(self, width: int, heads: int, backend: str = "fastest", role: str = "encoder") -> None:
        super().__init__()
        self.heads, self.backend, self.role = heads, backend, role
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)

    def forward(self, x_BLD: Tensor, queries: int | None = None) -> Tensor:
        batch, length, width = x_BLD.shape
        backend = choose(self.backend, self.role, x_BLD.device)[0]
        if queries is None:
            attended = self_attention(backend, self.qkv(x_BLD).view(batch, length, 3, self.heads, -1))
        else:
            weight, bias, impl = self.qkv.weight, self.qkv.bias, self.qkv.impl
            q = linear(x_BLD[:, :queries], weight[:width], bias[:width], impl=impl)
            kv = linear(x_BLD, weight[width:], bias[width:], impl=impl)
            q, (k, v) = q.view(batch, queries, self.heads, -1), kv.view(batch, length, 2, self.heads, -1).unbind(2)
            attended = BACKENDS[backend](q, k, v)
        return self.out(attended.flatten(2))
