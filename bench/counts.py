"""What a call has to do whatever it runs on: FLOPs, bytes that pass through tensors, bytes kept for the backward pass.

Counted, not timed, on the CPU in float32, from the tensors that the program names; what the growth of measured times
and peaks is held against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Counts:
    """FLOPs of matrix products and attention; bytes that all operations read and write when nothing is fused."""

    flops: float
    bytes: float


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of every tensor that goes into or comes out of an operation; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = (x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
            # What is expanded is read where it lies.
            self.bytes += sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
        return out


def count_work(call: Callable[[], Any], model: nn.Module) -> Counts:
    """Run ``call`` once and count what it did; ``model`` attends and multiplies by torch's own operations meanwhile.

    What this project's library does goes past torch's dispatcher, where nothing can be counted.
    """
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    from fastdiffclip.model.attention import Attention
    from fastdiffclip.model.linear import Linear

    def forward(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    def backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(sdpa_backward_flop_count(grad, q, k, v))

    aten, layers = torch.ops.aten, [part for part in model.modules() if isinstance(part, Attention)]
    fused = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    products = [part for part in model.modules() if isinstance(part, Linear)]
    before, forced = [part.backend for part in layers], [part.impl for part in products]
    for part in layers:
        part.backend = "sdpa"
    for product in products:
        product.impl = "reference"
    try:
        with FlopCounterMode(display=False, custom_mapping=fused) as flops, _Traffic() as traffic:
            call()
    finally:
        for part, backend in zip(layers, before, strict=True):
            part.backend = backend
        for product, impl in zip(products, forced, strict=True):
            product.impl = impl
    return Counts(float(flops.get_total_flops()), float(traffic.bytes))


@dataclass
class _Kept:
    """Storages that autograd holds, each once however many tensors share it."""

    ignored: frozenset[int]
    holders: dict[int, int] = field(default_factory=dict)
    now: int = 0
    most: int = 0

    def pack(self, tensor: Tensor) -> _Held:
        return _Held(self, tensor)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.ignored:
            return
        self.holders[storage.data_ptr()] = self.holders.get(storage.data_ptr(), 0) + 1
        if self.holders[storage.data_ptr()] == 1:
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)

    def drop(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.ignored:
            return
        self.holders[storage.data_ptr()] -= 1
        if self.holders[storage.data_ptr()] == 0:
            self.now -= storage.nbytes()


class _Held:
    """A tensor in the hands of autograd; lets go of it with the graph."""

    def __init__(self, kept: _Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        kept.add(tensor)

    def __del__(self) -> None:
        self.kept.drop(self.tensor)


def kept_bytes(call: Callable[[], Any], model: nn.Module) -> float:
    """The most bytes that autograd keeps at any moment of ``call`` for its backward pass, parameters left out."""
    kept = _Kept(frozenset(p.untyped_storage().data_ptr() for p in model.parameters()))
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        call()
    return float(kept.most)
