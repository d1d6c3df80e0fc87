"""A residual and its LayerNorm: every implementation and instruction set against float64, and when which is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import ResourceError, UsageError
from fastdiffclip.kernels import native, residual_norm
from fastdiffclip.kernels import residual_norm as op
from fastdiffclip.kernels.native import loader

pytestmark = pytest.mark.skipif(not native.status()[0], reason=native.status()[1])
EPS = 2.0**-24
BF16 = torch.bfloat16


def isas() -> list[str]:
    return list(loader.ISAS[: loader.ISAS.index(loader.best_isa()) + 1]) if native.status()[0] else []


def leaves_of(shape: tuple[int, ...], delta: torch.dtype | None, seed: int = 0) -> list[torch.Tensor | None]:
    torch.manual_seed(seed)
    x, added, weight, bias = torch.randn(shape) + 1, torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1])
    return [x, None if delta is None else added.to(delta), weight, bias]


def exact(leaves: list[torch.Tensor | None], grads: list[torch.Tensor], eps: float = 1e-5) -> list[torch.Tensor]:
    """Stream, normed rows and the gradients in float64."""
    x, delta, weight, bias = (None if leaf is None else leaf.double().requires_grad_() for leaf in leaves)
    stream = x if delta is None else x + delta
    away = stream - stream.mean(-1, keepdim=True)
    normed = away / (away.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias
    inputs = [leaf for leaf in (x, delta, weight, bias) if leaf is not None]
    found = torch.autograd.grad((stream, normed), inputs, [g.double() for g in grads])
    return [stream.detach(), normed.detach(), *found]


def run(
    leaves: list[torch.Tensor | None], grads: list[torch.Tensor], out: torch.dtype, impl: str | None
) -> list[torch.Tensor]:
    leaves = [None if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
    outs = residual_norm(*leaves, out_dtype=out, impl=impl)  # type: ignore[arg-type]
    assert outs[0].dtype == torch.float32 and outs[1].dtype == out
    return [*outs, *torch.autograd.grad(outs, [leaf for leaf in leaves if leaf is not None], grads)]


def close(found: list[torch.Tensor], wanted: list[torch.Tensor], rows: int) -> bool:
    """float32: some additions more or less of numbers up to 5 round at most that often; bfloat16: one rounding more.

    Sums over rows (the last two) have as many terms as there are rows.
    """
    for n, (mine, truth) in enumerate(zip(found, wanted, strict=True)):
        terms = 40 + (rows if n >= len(found) - 2 else 0)
        room = terms * EPS * truth.abs().max().clamp(min=1) + (2.0**-8 * truth.abs() if mine.dtype == BF16 else 0)
        if mine.shape != truth.shape or not ((mine - truth).abs() <= room).all():
            return False
    return True


@pytest.mark.parametrize("impl", ["reference", "native"])
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 150), eighths=st.integers(2, 40), delta=st.sampled_from([None, torch.float32, BF16]),
    out=st.sampled_from([torch.float32, BF16]), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_shape_and_dtype(
    impl: str, rows: int, eighths: int, delta: torch.dtype | None, out: torch.dtype, seed: int
) -> None:
    leaves = leaves_of((rows, 8 * eighths), delta, seed)
    grads = [torch.randn(rows, 8 * eighths), torch.randn(rows, 8 * eighths).to(out)]
    assert close(run(leaves, grads, out, impl), exact(leaves, grads), rows)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("width", [8, 24, 128, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_every_instruction_set(isa: str, width: int, dtype: torch.dtype) -> None:
    from fastdiffclip.kernels.native.residual_norm import backward, forward

    leaves = leaves_of((131, width), dtype)
    grads = [torch.randn(131, width), torch.randn(131, width).to(dtype)]
    stream, normed, stats = forward(*leaves, 1e-5, dtype, isa)  # type: ignore[arg-type]
    of_x, of_delta, pair = backward(*grads, stream, stats, leaves[2], dtype, isa)  # type: ignore[arg-type, misc]
    assert of_delta is not None and of_delta.dtype == dtype
    assert close([stream, normed, of_x, of_delta, *pair], exact(leaves, grads), 131)


def test_gradients_are_no_worse_than_torchs() -> None:
    """Rows far from zero, where a mean that is taken away late costs digits."""
    leaves = leaves_of((64, 61, 128), torch.float32)
    assert leaves[0] is not None
    leaves[0] = leaves[0] * 0.1 + 30
    grads = [torch.randn(64, 61, 128), torch.randn(64, 61, 128)]
    truth = exact(leaves, grads)
    ours, eager = (run(leaves, grads, torch.float32, impl) for impl in ("native", "reference"))
    for exactly, theirs, mine in zip(truth, eager, ours, strict=True):
        # Both round some hundred additions; another order of them moves the largest error by less than this.
        assert (mine - exactly).abs().max() <= 2 * (theirs - exactly).abs().max() + 4 * EPS * exactly.abs().max()


@pytest.mark.parametrize("rows", [1, 64, 65, 1000])
def test_threads_change_no_bit(rows: int) -> None:
    leaves, before, found = leaves_of((rows, 136), BF16), torch.get_num_threads(), []
    grads = [torch.randn(rows, 136), torch.randn(rows, 136).bfloat16()]
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(leaves, grads, BF16, "native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_odd_strides_give_the_same_bits() -> None:
    base, other = torch.randn(5, 9, 64, 2), torch.randn(9, 5, 64)
    x, delta, weight, bias = base[:, ::2, :, 0], other.transpose(0, 1)[:, 4:], torch.randn(64, 2)[:, 1], torch.randn(64)
    grads = [torch.ones(5, 5, 64), torch.ones(64).expand(5, 5, 64)]
    strided = run([x, delta, weight, bias], grads, torch.float32, "native")
    dense = run([part.contiguous() for part in (x, delta, weight, bias)], grads, torch.float32, "native")
    assert all(map(torch.equal, strided, dense))


def test_nan_stays_in_its_row() -> None:
    x, delta, weight, bias = leaves_of((40, 24), BF16)
    assert x is not None
    x[3, 5] = float("nan")
    stream, normed = residual_norm(x, delta, weight, bias, impl="native")  # type: ignore[arg-type]
    assert normed[3].isnan().all() and stream[3].isnan().sum() == 1
    keep = [i for i in range(40) if i != 3]
    assert normed[keep].isfinite().all() and stream[keep].isfinite().all()


def test_without_delta_the_stream_is_x_and_its_gradient_is_added() -> None:
    x, _, weight, bias = leaves_of((6, 16), None)
    assert x is not None and weight is not None and bias is not None
    x.requires_grad_()
    stream, normed = residual_norm(x, None, weight, bias, impl="native")
    assert torch.equal(stream, x) and stream.data_ptr() == x.data_ptr()
    (both,) = torch.autograd.grad((stream * 3).sum() + normed.square().sum(), x, retain_graph=True)
    (one,) = torch.autograd.grad(normed.square().sum(), x, retain_graph=True)
    torch.testing.assert_close(both, one + 3)
    (other,) = torch.autograd.grad((stream * 3).sum(), x)  # the normed rows lead nowhere
    torch.testing.assert_close(other, torch.full_like(x, 3.0))


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_part_of_the_gradients(impl: str) -> None:
    x, delta, weight, bias = leaves_of((7, 16), BF16)
    assert delta is not None
    delta.requires_grad_()
    stream, normed = residual_norm(x, delta, weight, bias, impl=impl)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(stream.sum(), delta)
    assert grad.dtype == BF16 and torch.equal(grad, torch.ones_like(delta))


def test_taken_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiffclip.kernels.native import residual_norm as module

    taken, real = [], module.forward
    monkeypatch.setattr(module, "forward", lambda *args: taken.append(1) or real(*args))
    x, delta, weight, bias = leaves_of((4, 16), BF16)
    residual_norm(x, delta, weight, bias, out_dtype=BF16)  # type: ignore[arg-type]
    assert len(taken) == 1
    wide = [part.double() for part in (x, weight, bias) if part is not None]
    stream, normed = residual_norm(wide[0], None, wide[1], wide[2])
    assert stream is wide[0] and torch.equal(normed, F.layer_norm(wide[0], (16,), wide[1], wide[2]))
    residual_norm(torch.ones(3, 12), None, torch.ones(12), torch.ones(12))  # no multiple of 8
    residual_norm(torch.ones(0, 16), None, torch.ones(16), torch.ones(16))
    residual_norm(*(torch.ones(n, device="meta") for n in ((2, 16), (2, 16), 16, 16)))
    assert len(taken) == 1


def test_compiled_code_is_one_graph_of_torchs_own() -> None:
    x, delta, weight, bias = leaves_of((8, 16), None)
    assert x is not None and weight is not None and bias is not None
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: op(*a, out_dtype=BF16), fullgraph=True, backend="aot_eager")
    stream, normed = compiled(x, x.bfloat16(), weight.requires_grad_(), bias)
    torch.testing.assert_close(stream, x + x.bfloat16())
    torch.testing.assert_close(normed, F.layer_norm(stream, (16,), weight, bias).bfloat16())


def test_bad_input() -> None:
    from fastdiffclip.kernels.native.residual_norm import forward

    x, w = torch.ones(3, 16), torch.ones(16)
    for wrong in (
        (x, x[:2], w, w),
        (x, None, w[:8], w),
        (x, None, w, torch.ones(1, 16)),
        (torch.tensor(1.0), None, w, w),
    ):
        with pytest.raises(UsageError, match="takes x"):
            residual_norm(*wrong)
    with pytest.raises(UsageError, match="floating tensors on one device; got torch.int64 on cpu"):
        residual_norm(x.long(), None, w, w)
    with pytest.raises(UsageError, match="on one device"):
        residual_norm(x, None, w.to("meta"), w)
    with pytest.raises(UsageError, match="rows of 8, 16, 24"):
        residual_norm(torch.ones(3, 12), None, torch.ones(12), torch.ones(12), impl="native")
    with pytest.raises(UsageError, match="must be float32"):
        residual_norm(x.double(), None, w.double(), w.double(), impl="native")
    with pytest.raises(UsageError, match="delta and the output must be float32 or bfloat16"):
        residual_norm(x, x.half(), w, w, impl="native")
    with pytest.raises(UsageError, match="no implementation"):
        residual_norm(x, None, w, w, impl="triton")
    if loader.best_isa() != loader.ISAS[-1]:
        with pytest.raises(ResourceError, match="does not run"):
            forward(x, None, w, w, 1e-5, torch.float32, loader.ISAS[-1])
