"""GELU: value and slope against float64 on every instruction set, and when the native one is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import ResourceError, UsageError
from fastdiffclip.kernels import gelu, native
from fastdiffclip.kernels import gelu as op
from fastdiffclip.kernels.native import loader

pytestmark = pytest.mark.skipif(not native.status()[0], reason=native.status()[1])


def isas() -> list[str]:
    return list(loader.ISAS[: loader.ISAS.index(loader.best_isa()) + 1]) if native.status()[0] else []


def truth(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x Phi(x) and its slope in float64; erfc keeps the digits of what is nearly 0."""
    x = x.double()
    cdf = torch.special.erfc(-x / 2**0.5) / 2
    return x * cdf, cdf + x * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5


@pytest.mark.parametrize("isa", isas())
def test_every_number_between_the_tails(isa: str) -> None:
    from fastdiffclip.kernels.native.gelu import gelu as native_gelu

    x = torch.cat([torch.linspace(-9, 9, 1_000_001), torch.logspace(-30, 30, 601), -torch.logspace(-30, 30, 601)])
    value, slope = truth(x)
    found, steep = native_gelu(x, isa=isa), native_gelu(x, torch.ones_like(x), isa=isa)
    assert ((found - value).abs() / x.abs().clamp(min=1)).max() <= 2e-7
    assert (steep - slope).abs().max() <= 3.5e-7
    assert not found[x < -5.3].any() and torch.equal(found[x > 5.3], x[x > 5.3])
    eager = F.gelu(x)
    assert ((found - value).abs() / x.abs().clamp(min=1)).max() <= (eager - value).abs()[x.abs() < 9].max()


@pytest.mark.parametrize("isa", isas())
def test_bfloat16_is_float32_rounded(isa: str) -> None:
    from fastdiffclip.kernels.native.gelu import gelu as native_gelu

    x = torch.arange(-32768, 32768).to(torch.int16).view(torch.bfloat16)  # all there are
    x = x[x.isfinite()]
    assert _equal_but_for_subnormal(native_gelu(x, isa=isa), native_gelu(x.float(), isa=isa).bfloat16())
    grad = torch.randn(x.shape).bfloat16()
    wide = native_gelu(x.float(), grad.float(), isa=isa).bfloat16()
    assert _equal_but_for_subnormal(native_gelu(x, grad, isa=isa), wide)


def _equal_but_for_subnormal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """AVX512-BF16 rounds subnormal numbers to 0."""
    tiny = torch.finfo(torch.bfloat16).tiny
    return bool(((found == wanted) | ((found.abs() <= tiny) & (wanted.abs() <= tiny))).all())


@pytest.mark.parametrize("isa", isas())
def test_special_numbers(isa: str) -> None:
    from fastdiffclip.kernels.native.gelu import gelu as native_gelu

    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    found = native_gelu(x, isa=isa)
    assert found[0] == torch.inf and found[1:3].isnan().all() and found[3:].tolist() == [0.0, 0.0]  # -inf times 0
    steep = native_gelu(x, torch.ones(5), isa=isa)
    assert torch.allclose(steep[[0, 1, 3]], torch.tensor([1.0, 0.0, 0.5]), atol=1e-7) and steep[2].isnan()


@pytest.mark.parametrize("impl", ["reference", "native"])
@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 300), cut=st.integers(0, 70), bf16=st.booleans())
def test_any_size_and_stride(impl: str, count: int, cut: int, bf16: bool) -> None:
    torch.manual_seed(count)
    dtype = torch.bfloat16 if bf16 else torch.float32
    x = torch.randn(count, 2).to(dtype)[min(cut, count) :, 0].requires_grad_()
    y = gelu(x, impl=impl)
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0))
    value, slope = truth(x.detach())
    room = 2.0**-8 if bf16 else 0.0  # and what float32 leaves: 4e-7 of torch's values, twice that of the slopes
    assert y.shape == x.shape and y.dtype == grad.dtype == dtype
    assert torch.allclose(y.double(), value, rtol=room, atol=1e-6)
    assert torch.allclose(grad.double(), 2 * slope, rtol=room, atol=1e-6)


def test_threads_change_no_bit() -> None:
    from fastdiffclip.kernels.native.gelu import gelu as native_gelu

    x, before, found = torch.randn(100_003), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((native_gelu(x), native_gelu(x, x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_taken_on_the_cpu_for_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiffclip.kernels.native import gelu as module

    taken, real = [], module.gelu
    monkeypatch.setattr(module, "gelu", lambda *args: taken.append(1) or real(*args))
    gelu(torch.randn(8))
    gelu(torch.randn(8).bfloat16())
    assert len(taken) == 2
    assert torch.equal(gelu(torch.ones(3).double()), F.gelu(torch.ones(3).double()))
    gelu(torch.randn(8, device="meta"))
    gelu(torch.randn(8), impl="reference")
    assert len(taken) == 2


def test_compiled_code_is_one_graph_of_torchs_own() -> None:
    x = torch.randn(32, 64, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: op(x).sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.gelu(x).sum())


def test_bad_input() -> None:
    from fastdiffclip.kernels.native.gelu import gelu as native_gelu

    with pytest.raises(UsageError, match="floating tensor; got torch.int64"):
        gelu(torch.arange(3))
    with pytest.raises(UsageError, match="float32 and bfloat16, not torch.float64"):
        gelu(torch.ones(3).double(), impl="native")
    with pytest.raises(UsageError, match="no implementation"):
        gelu(torch.ones(3), impl="triton")
    if loader.best_isa() != loader.ISAS[-1]:
        with pytest.raises(ResourceError, match="does not run"):
            native_gelu(torch.ones(3), isa=loader.ISAS[-1])
