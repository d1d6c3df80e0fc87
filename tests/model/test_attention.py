"""One contract for every backend, and the choice between them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiffclip.errors import UsageError
from fastdiffclip.model import attention
from fastdiffclip.model.attention import BACKENDS, Attention, choose, self_attention, xformers_unavailable


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    xformers_unavailable.cache_clear()
    yield
    xformers_unavailable.cache_clear()


def stand_in(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """An xformers that computes with torch, on whatever device the tensors are."""
    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    ops.memory_efficient_attention = function  # type: ignore[attr-defined]
    package.ops = ops  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v on (B, L, H, D) in float64."""
    scores = torch.einsum("blhd,bmhd->bhlm", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v.double()).to(q.dtype)


def qkv(queries: int, length: int, requires_grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries + length)
    shapes = [(3, queries, 2, 16), (3, length, 2, 16), (3, length, 2, 16)]
    return [torch.randn(shape, generator=generator).requires_grad_(requires_grad) for shape in shapes]


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize(("queries", "length"), [(1, 1), (10, 10), (37, 37), (122, 122), (1, 37)])
def test_contract(monkeypatch: pytest.MonkeyPatch, backend: str, queries: int, length: int) -> None:
    stand_in(monkeypatch, plain)
    ours, truth = qkv(queries, length, True), qkv(queries, length, True)
    out, expected = BACKENDS[backend](*ours), plain(*truth)
    assert out.shape == (3, queries, 2, 16)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_self_attention_is_the_contract_on_one_projection(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    stand_in(monkeypatch, plain)
    projected = torch.stack(qkv(37, 37), dim=2)
    ours, truth = projected.clone().requires_grad_(), projected.clone().requires_grad_()
    out, expected = self_attention(backend, ours), plain(*truth.unbind(2))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, truth.grad, rtol=1e-4, atol=1e-5)


def module(backend: str) -> Attention:
    torch.manual_seed(0)
    return Attention(32, 2, backend)


def test_backends_agree_in_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, plain)
    monkeypatch.setattr(attention, "xformers_unavailable", lambda device_type: "")
    x = torch.randn(4, 10, 32)
    expected = module("sdpa")(x)
    for backend in ("short", "xformers", "fastest"):
        torch.testing.assert_close(module(backend)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["short", "sdpa"])
@pytest.mark.parametrize("queries", [1, 3, 10])
def test_first_queries_only(backend: str, queries: int) -> None:
    x, layer = torch.randn(4, 10, 32), module(backend)
    torch.testing.assert_close(layer(x, queries), layer(x)[:, :queries], rtol=1e-5, atol=1e-6)


def test_no_window_looks_at_another() -> None:
    x, layer = torch.randn(4, 10, 32), module("fastest")
    changed = x.clone()
    changed[1:] = 100.0
    assert torch.equal(layer(x)[0], layer(changed)[0])


def test_cpu_takes_short_and_says_so() -> None:
    for role in ("encoder", "decoder"):
        backend, reason = choose("fastest", role, "cpu")
        assert backend == "short" and "CPU" in reason
    assert choose("sdpa", "encoder", "cpu") == ("sdpa", "asked for")


def test_forced_xformers_on_a_cpu_says_why_not() -> None:
    with pytest.raises(UsageError, match="xformers cannot be used: xformers has operators for CUDA only; choose"):
        choose("xformers", "encoder", "cpu")
    with pytest.raises(UsageError, match="CUDA only"):
        Attention(32, 2, "xformers")(torch.zeros(1, 2, 32))


class OnCpu:
    """Probes of the CUDA path, run on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        zeros = torch.zeros
        monkeypatch.setattr(attention.torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k))


def test_cuda_encoder_takes_xformers_where_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    OnCpu(monkeypatch)
    stand_in(monkeypatch, plain)
    assert choose("fastest", "encoder", "cuda") == ("xformers", "loads on this device")
    assert choose("xformers", "encoder", "cuda") == ("xformers", "asked for")
    assert choose("fastest", "decoder", "cuda")[0] == "short"


def test_deterministic_runs_leave_xformers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    OnCpu(monkeypatch)
    stand_in(monkeypatch, plain)
    enabled = torch.are_deterministic_algorithms_enabled
    # Not switched on for real: that imports torch's compiler, which must not see the stand-in for torch.zeros.
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    backend, reason = choose("fastest", "encoder", "cuda")
    assert backend == "short" and "same bytes" in reason
    with pytest.raises(UsageError, match="--deterministic asks for; choose fastest, short or sdpa"):
        choose("xformers", "encoder", "cuda")
    assert choose("sdpa", "encoder", "cuda") == ("sdpa", "asked for")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", enabled)
    assert choose("fastest", "encoder", "cuda")[0] == "xformers"


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("No operator found for\nmemory_efficient_attention"),
        OSError("libcudart.so.12: cannot open shared object file"),
        RuntimeError("CUDA error"),
        AttributeError("module 'torch' has no attribute 'x'"),
        TypeError("unsupported operand"),
        ValueError("bad version"),
        RuntimeError(""),
    ],
)
def test_cuda_falls_back_and_keeps_the_reason(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    OnCpu(monkeypatch)

    def refuse(*_: Any) -> Tensor:
        raise error

    stand_in(monkeypatch, refuse)
    backend, reason = choose("fastest", "encoder", "cuda")
    assert backend == "sdpa" and reason.startswith(f"xformers is not used: {type(error).__name__}: ")
    assert "\n" not in reason and (str(error).split("\n")[0] or "no message") in reason
    with pytest.raises(UsageError, match=type(error).__name__):
        choose("xformers", "encoder", "cuda")


def test_cuda_without_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    OnCpu(monkeypatch)
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    backend, reason = choose("fastest", "encoder", "cuda")
    assert backend == "sdpa" and "ModuleNotFoundError" in reason


def test_a_bug_is_not_taken_for_a_missing_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    OnCpu(monkeypatch)

    def broken(*_: Any) -> Tensor:
        raise ZeroDivisionError

    stand_in(monkeypatch, broken)
    with pytest.raises(ZeroDivisionError):
        choose("fastest", "encoder", "cuda")
