"""The linear layer: the native product against float64, its gradients, and when it is taken."""

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


def test_frozen_parts_get_no_gradient() -> None:
    x, weight = torch.randn(20, 32), torch.randn(48, 32, requires_grad=True)
    y = linear(x, weight, impl="native")
    (grad,) = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(grad, x.sum(0).expand(48, 32))
    y = linear(x.requires_grad_(True), weight.detach(), torch.zeros(48), impl="native")
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(20, 32))


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
    monkeypatch.setattr(module, "outruns_mkl", lambda: True)
    real = module.matmul
    monkeypatch.setattr(module, "matmul", lambda *args: taken.append(1) or real(*args))
    linear(x, weight)
    assert len(taken) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    linear(x.double(), weight.double())
    linear(x[:, :8], weight[:, :8])  # too few features
    linear(x[:3], weight)  # and rows
    linear(x[:0], weight)
    monkeypatch.setattr(module, "outruns_mkl", lambda: False)
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
    if loader.best_isa() != loader.ISAS[-1]:
        with pytest.raises(ResourceError, match="does not run"):
            matmul(x, weight.t(), isa=loader.ISAS[-1])
