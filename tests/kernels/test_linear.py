"""The linear layer: the native products against float64, their gradients, and when they are taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import ResourceError, UsageError
from fastdiffclip.kernels import linear, native
from fastdiffclip.kernels import linear as op
from fastdiffclip.kernels.native import loader

pytestmark = pytest.mark.skipif(not native.status()[0], reason=native.status()[1])
EPS = 2.0**-24
pairs = pytest.mark.skipif(
    native.status()[0] and loader.best_isa() != "avx512_bf16", reason="this processor does not multiply bfloat16"
)


def isas() -> list[str]:
    return list(loader.ISAS[: loader.ISAS.index(loader.best_isa()) + 1]) if native.status()[0] else []


def bound(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Largest rounding error of each sum, by the textbook: (terms + 2) units in the last place of the sum of sizes."""
    return (a.shape[1] + 2) * EPS * (a.double().abs() @ b.double().abs())


@pytest.mark.parametrize("isa", isas())
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70), terms=st.integers(1, 420), columns=st.integers(1, 75), turned=st.booleans(),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_product_of_any_size(isa: str, rows: int, terms: int, columns: int, turned: bool, seed: int) -> None:
    from fastdiffclip.kernels.native.matmul import matmul

    torch.manual_seed(seed)
    a = torch.randn(terms, rows).t() if turned else torch.randn(rows, terms)
    b = torch.randn(columns, terms).t() if turned else torch.randn(terms, columns)
    bias = torch.randn(columns) if seed % 2 else None
    found = matmul(a, b, bias, isa)
    truth = a.double() @ b.double() + (0 if bias is None else bias.double())
    room = bound(a, b) + (0 if bias is None else 2 * EPS * truth.abs())
    assert found.shape == (rows, columns) and found.is_contiguous()
    assert ((found - truth).abs() <= room).all()


@pytest.mark.parametrize("isa", isas())
def test_any_strides_give_the_same_bits(isa: str) -> None:
    from fastdiffclip.kernels.native.matmul import matmul

    wide_a, wide_b = torch.randn(40, 300), torch.randn(300, 90)
    a, b = wide_a[::2, 3:203], wide_b[5:205, ::2]
    assert torch.equal(matmul(a, b, isa=isa), matmul(a.contiguous(), b.contiguous(), isa=isa))


@pairs
@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 120), terms=st.integers(1, 900), columns=st.integers(1, 75), turned_a=st.booleans(),
    turned_b=st.booleans(), full=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_bfloat16_product_of_any_size(
    rows: int, terms: int, columns: int, turned_a: bool, turned_b: bool, full: bool, seed: int
) -> None:
    """Products of bfloat16 are exact in float32; what is rounded are sums, and the result where it is bfloat16."""
    from fastdiffclip.kernels.native.matmul import matmul_bf16

    torch.manual_seed(seed)
    terms += terms % 2 if turned_b or not turned_a else 0
    a = (torch.randn(terms, rows).t() if turned_a else torch.randn(rows, terms)).bfloat16()
    b = (torch.randn(columns, terms).t() if turned_b else torch.randn(terms, columns)).bfloat16()
    bias = torch.randn(columns) if seed % 2 else None
    sums = torch.full((rows,), float("nan")) if turned_a and min(rows, terms) > 1 else None
    found = matmul_bf16(a, b, bias, torch.float32 if full else torch.bfloat16, sums)
    truth = a.double() @ b.double() + (0 if bias is None else bias.double())
    room = bound(a, b) + (0 if bias is None else 2 * EPS * truth.abs()) + (0 if full else 2.0**-8 * truth.abs())
    assert found.shape == (rows, columns) and found.is_contiguous()
    assert ((found - truth).abs() <= room + 2.0**-126).all()
    if sums is not None:
        assert ((sums - a.double().sum(1)).abs() <= (terms + 2) * EPS * a.double().abs().sum(1)).all()


@pairs
def test_rows_of_a_wider_matrix() -> None:
    from fastdiffclip.kernels.native.matmul import matmul_bf16

    wide_a, wide_b = torch.randn(40, 300).bfloat16(), torch.randn(300, 90).bfloat16()
    a, b = wide_a[::2, 3:203], wide_b[5:205, 7:50]
    assert torch.equal(matmul_bf16(a, b), matmul_bf16(a.contiguous(), b.contiguous()))
    a, b = wide_b.t()[9:60, 5:206], wide_b[5:206, 50:]
    assert torch.equal(matmul_bf16(a, b), matmul_bf16(a.t().contiguous().t(), b.contiguous()))


@pairs
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 144, 128), (2, 61, 128, 384), (300, 128, 130)])
def test_bfloat16_gradients_are_no_worse_than_torchs(shape: tuple[int, ...], stored: torch.dtype) -> None:
    torch.manual_seed(1)
    *lead, features, out = shape
    x = torch.randn(*lead, features).to(stored).requires_grad_()
    weight, bias = (torch.randn(out, features) / 12).requires_grad_(), torch.randn(out, requires_grad=True)
    grad = torch.randn(*lead, out).bfloat16()

    def results(impl: str) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(x, weight, bias, impl=impl)
        return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad)]

    read = [t.detach().bfloat16().double().requires_grad_() for t in (x, weight, bias)]
    truth = F.linear(*read)
    exact = [truth.detach(), *torch.autograd.grad(truth, read, grad.double())]
    for true, theirs, mine, like in zip(
        exact, results("reference"), results("native"), (grad, x, weight, bias), strict=True
    ):
        assert mine.shape == true.shape and mine.dtype == like.dtype
        # The bias is not rounded to bfloat16 as autocast does, hence half a unit of the output more.
        assert (mine - true).abs().max() <= (theirs - true).abs().max() * 1.05 + 2.0**-9 * float(
            bias.detach().abs().max()
        )


@pytest.mark.parametrize("shape", [(37, 145, 128), (2, 61, 128, 384), (300, 128, 129)])
def test_gradients_are_no_worse_than_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    *lead, features, out = shape
    leaves = [torch.randn(*lead, features), torch.randn(out, features) / 12, torch.randn(out)]
    grad = torch.randn(*lead, out)

    def results(dtype: torch.dtype, call: object) -> list[torch.Tensor]:
        x, weight, bias = (leaf.to(dtype).requires_grad_(True) for leaf in leaves)
        y = call(x, weight, bias)  # type: ignore[operator]
        return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad.to(dtype))]

    truth = results(torch.float64, F.linear)
    eager = results(torch.float32, F.linear)
    ours = results(torch.float32, lambda *args: linear(*args, impl="native"))
    for exact, theirs, mine in zip(truth, eager, ours, strict=True):
        assert mine.shape == exact.shape
        # Both round each of some hundred additions; another order of them moves the largest error by less than this.
        assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 4 * EPS * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pairs)])
def test_frozen_parts_get_no_gradient(dtype: torch.dtype) -> None:
    def product(*args: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return linear(*args, impl="native").float()

    x, weight = torch.randn(20, 32).to(dtype), torch.randn(48, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(product(x, weight).sum(), weight)
    torch.testing.assert_close(grad, x.float().sum(0).expand(48, 32))
    bias = torch.zeros(48, requires_grad=True)
    product(x.requires_grad_(True), weight.detach(), bias).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().to(dtype).float().sum(0).expand(20, 32).to(dtype))
    torch.testing.assert_close(bias.grad, torch.full((48,), 20.0))


@pytest.mark.parametrize("sizes", [(2000, 144, 130), (130, 2000, 144), (15, 64, 33)])
def test_threads_change_no_bit(sizes: tuple[int, int, int]) -> None:
    from fastdiffclip.kernels.native.matmul import matmul

    a, b = torch.randn(*sizes[:2]), torch.randn(*sizes[1:])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(matmul(a, b))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pairs
@pytest.mark.parametrize("sizes", [(2000, 144, 130), (130, 2000, 144), (15, 64, 33), (400, 1000, 128)])
@pytest.mark.parametrize("turned", [False, True])
def test_threads_change_no_bit_of_bfloat16(sizes: tuple[int, int, int], turned: bool) -> None:
    from fastdiffclip.kernels.native.matmul import matmul_bf16

    a, b = torch.randn(*sizes[:2]).bfloat16(), torch.randn(*sizes[1:]).bfloat16()
    a = a.t().contiguous().t() if turned else a
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums = torch.empty(len(a)) if turned else None
            found.append((matmul_bf16(a, b, row_sums=sums), torch.zeros(1) if sums is None else sums))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for rest in found[1:] for one, other in zip(found[0], rest, strict=True))


def test_nan_and_infinity_stay_in_their_rows() -> None:
    x, weight = torch.randn(40, 128), torch.randn(33, 128)
    x[3, 5], x[17, 0] = float("nan"), float("inf")
    y = linear(x, weight, impl="native")
    assert y[3].isnan().all() and not y[17].isfinite().any()
    keep = [i for i in range(40) if i not in (3, 17)]
    assert y[keep].isfinite().all()


def test_taken_where_it_pays_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiffclip.kernels.native import matmul as module

    x, weight, taken = torch.randn(64, 128), torch.randn(128, 128), []
    monkeypatch.setattr(module, "outruns_torch", lambda dtype: dtype == torch.float32)
    real = module.matmul
    monkeypatch.setattr(module, "matmul", lambda *args: taken.append(1) or real(*args))
    linear(x, weight)
    assert len(taken) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
        monkeypatch.setattr(module, "outruns_torch", lambda dtype: True)
        monkeypatch.setattr(module, "matmul_bf16", lambda *args, **_: taken.append(2) or args[0] @ args[1])
        assert linear(x, weight).dtype == torch.bfloat16 and taken == [1, 2]
        linear(torch.randn(64, 127), torch.randn(128, 127))  # an odd number of features
        taken.pop()
    linear(x.double(), weight.double())
    linear(x[:, :8], weight[:, :8])  # too few features
    linear(x[:3], weight)  # and rows
    linear(x[:0], weight)
    monkeypatch.setattr(module, "outruns_torch", lambda dtype: False)
    linear(x, weight)
    assert len(taken) == 1
    linear(x, weight, impl="native")
    assert len(taken) == 2


def test_compiled_code_is_one_graph_of_torchs_own() -> None:
    x, weight = torch.randn(32, 64), torch.randn(48, 64, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, w: op(x, w).sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight).sum())


def test_bad_input() -> None:
    from fastdiffclip.kernels.native.matmul import matmul

    x, weight = torch.randn(20, 32), torch.randn(48, 32)
    with pytest.raises(UsageError, match="float32"):
        linear(x.double(), weight.double(), impl="native")
    with pytest.raises(UsageError, match="last axis of x must be 32"):
        linear(x[:, :16], weight, impl="native")
    with pytest.raises(UsageError, match="not empty"):
        linear(x[:0], weight, impl="native")
    with pytest.raises(UsageError, match="no implementation"):
        linear(x, weight, impl="triton")
    with pytest.raises(UsageError, match="do not fit"):
        matmul(x, weight)
    with pytest.raises(UsageError, match="do not fit"):
        matmul(x, weight.t(), torch.zeros(3))
    with pytest.raises(UsageError, match="weights must be float32"):
        linear(x.bfloat16(), weight.bfloat16(), impl="native")
    if loader.best_isa() != loader.ISAS[-1]:
        with pytest.raises(ResourceError, match="does not run"):
            matmul(x, weight.t(), isa=loader.ISAS[-1])


def test_bad_bfloat16_input() -> None:
    from fastdiffclip.kernels.native.matmul import matmul_bf16

    a, b = torch.randn(20, 32).bfloat16(), torch.randn(32, 48).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UsageError, match="even numbers of features"):
        linear(torch.randn(20, 31), torch.randn(48, 31), impl="native")
    with pytest.raises(UsageError, match=r"takes torch\.bfloat16 CPU tensors"):
        matmul_bf16(a.float(), b.float())
    with pytest.raises(UsageError, match="contiguous rows or columns"):
        matmul_bf16(a[:, ::2], b[::2])
    with pytest.raises(UsageError, match="gives bfloat16 or float32"):
        matmul_bf16(a, b, out_dtype=torch.float16)
    with pytest.raises(UsageError, match="even number of terms"):
        matmul_bf16(a[:, :31], b[:31])
    with pytest.raises(UsageError, match="do not fit"):
        matmul_bf16(a, b, torch.zeros(48).bfloat16())
    with pytest.raises(UsageError, match="row_sums must be"):
        matmul_bf16(a, b, row_sums=torch.zeros(20))
    for isa in loader.ISAS[:-1]:
        with pytest.raises(ResourceError, match="does not run"):
            matmul_bf16(a, b, isa=isa)
