"""``short_attention``: one contract for every implementation, and what each of them promises beyond it."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import dispatch, short_attention, short_attention_packed
from fastdiffclip.kernels.native import loader
from fastdiffclip.kernels.native import short_attention as native

from .attention_truth import assert_no_worse_than_eager, draw, eager, results

FOUND = dispatch.implementations("cpu")["short_attention"]
HERE = [name for name, state in FOUND.items() if state == "ok"]
native_only = pytest.mark.skipif(FOUND["native"] != "ok", reason=f"native: {FOUND['native']}")
DTYPES = (torch.float32, torch.bfloat16)
OPS = torch.ops.fastdiffclip


@pytest.fixture(params=tuple(FOUND))
def impl(request) -> str:
    found = FOUND[request.param]
    if found != "ok":
        pytest.skip(f"{request.param}: {found}")
    return request.param


@pytest.fixture(params=[name for name in FOUND if name != "reference"])
def compiled_impl(request) -> str:
    """What runs through the op, for it is no torch code."""
    found = FOUND[request.param]
    if found != "ok":
        pytest.skip(f"{request.param}: {found}")
    return request.param


def isas() -> list[str]:
    return list(loader.ISAS[: loader.ISAS.index(loader.best_isa()) + 1]) if FOUND["native"] == "ok" else []


SHAPES = [(16, 37, 37, 8, 16), (3, 122, 122, 8, 16), (2, 1, 122, 4, 16), (2, 5, 256, 2, 64), (1, 256, 3, 2, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_that_of_eager(impl, dtype, shape):
    if impl == "triton":  # interpreted: a program takes a tenth of a second
        shape = (1, *shape[1:3], 1, shape[4])
    q, k, v, g = draw(*shape, dtype)
    ours = results(lambda *x: short_attention(*x, impl=impl), q, k, v, g)
    assert_no_worse_than_eager(impl, ours, q, k, v, g, None, shape[-1] ** -0.5)


@native_only
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 37, 37, 8, 16), (1, 61, 50, 2, 24)])
def test_every_instruction_set(isa, dtype, shape):
    q, k, v, g = draw(*shape, dtype)
    lengths = torch.randint(1, shape[2] + 1, shape[:1], generator=torch.Generator().manual_seed(0))
    out, stats = native.forward(q, k, v, lengths, 0.25, isa)
    ours = [x.double() for x in (out, *native.backward(g, q, k, v, out, stats, lengths, 0.25, isa))]
    assert_no_worse_than_eager("native", ours, q, k, v, g, lengths, 0.25)


def any_shape(most: int, longest: int) -> dict[str, st.SearchStrategy]:
    return dict(
        batch=st.integers(1, most),
        queries=st.integers(1, longest) | st.just(256),
        keys=st.integers(1, longest) | st.just(256),
        heads=st.integers(1, most),
        width=st.sampled_from(range(8, 65, 8)),
        dtype=st.sampled_from(DTYPES),
        masked=st.booleans(),
        scale=st.none() | st.sampled_from([-0.3, 0.0, 1.0]),
        seed=st.integers(0, 99),
    )


def check_any_shape(impl, batch, queries, keys, heads, width, dtype, masked, scale, seed):
    q, k, v, g = draw(batch, queries, keys, heads, width, dtype, seed)
    lengths = None
    if masked:
        lengths = torch.randint(1, keys + 1, (batch,), generator=torch.Generator().manual_seed(seed))
    ours = results(lambda *x: short_attention(*x, lengths=lengths, scale=scale, impl=impl), q, k, v, g)
    scale = width**-0.5 if scale is None else scale
    assert_no_worse_than_eager(impl, ours, q, k, v, g, lengths, scale, any_score=True)


@settings(max_examples=40, deadline=None)
@given(**any_shape(3, 70))
@pytest.mark.parametrize("name", [name for name in HERE if name != "triton"])
def test_any_shape(name, **case):
    check_any_shape(name, **case)


@pytest.mark.skipif("triton" not in HERE, reason=f"triton: {FOUND['triton']}")
@settings(max_examples=8, deadline=None)
@given(**any_shape(1, 40))
def test_any_shape_interpreted(**case):
    check_any_shape("triton", **case)


@pytest.mark.parametrize("factor", [15.0, 17.0, 40.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_large_score_among_small_ones(impl, dtype, factor):
    """What is subtracted from the scores may depend on how large they are, the result must not."""
    q, k, v, g = draw(1, 11, 20, 1, 16, dtype, spread=0.3)
    k[:, 7] = q[:, 4] * (factor / 0.25 / q[:, 4].double().square().sum()).to(dtype)
    ours = results(lambda *x: short_attention(*x, impl=impl), q, k, v, g)
    assert_no_worse_than_eager(impl, ours, q, k, v, g, None, 0.25, any_score=True)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float16))
@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 0, 4])])
def test_packed_is_the_three_parts_in_one(impl, dtype, lengths):
    if impl == "native" and dtype == torch.float16:
        pytest.skip("the native one does not take float16")
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 9, 3, 2, 16, generator=generator).to(dtype).requires_grad_()
    g = torch.randn(3, 9, 2, 16, generator=generator).to(dtype)
    out = short_attention_packed(qkv, lengths=lengths, impl=impl)
    expected = short_attention(*qkv.unbind(2), lengths=lengths, impl=impl)
    assert torch.equal(out, expected)
    mine, other = (torch.autograd.grad(x, qkv, g)[0] for x in (out, expected))
    assert mine.shape == qkv.shape and torch.equal(mine, other)
    awkward = qkv.detach().transpose(1, 4).contiguous().transpose(1, 4)
    assert torch.equal(short_attention_packed(awkward, lengths=lengths, impl=impl), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_padding_tokens_have_no_influence(impl, dtype, index_dtype):
    q, k, v, g = draw(4, 9, 20, 2, 16, dtype)
    lengths = torch.tensor([20, 1, 17, 0], dtype=index_dtype)
    clean = results(lambda *x: short_attention(*x, lengths=lengths, impl=impl), q, k, v, g)
    for b, n in enumerate(lengths.tolist()):
        k[b, n:], v[b, n:] = 1e4, -1e4
    dirty = results(lambda *x: short_attention(*x, lengths=lengths, impl=impl), q, k, v, g)
    assert all(map(torch.equal, clean, dirty))
    out, grad_q, grad_k, grad_v = dirty
    for b, n in enumerate(lengths.tolist()):
        assert not grad_k[b, n:].any() and not grad_v[b, n:].any()
        if n:
            alone = results(
                lambda *x: short_attention(*x, impl=impl), q[b:][:1], k[b:, :n][:1], v[b:, :n][:1], g[b:][:1]
            )
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            for mine, other in zip((out[b], grad_q[b], grad_k[b, :n], grad_v[b, :n]), alone, strict=True):
                torch.testing.assert_close(mine, other[0], rtol=tolerance, atol=tolerance)
    assert not out[3].any() and not grad_q[3].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_most_of_a_long_sequence_may_be_padding(compiled_impl, dtype):
    q, k, v, g = draw(1, 5, 200, 1, 16, dtype)
    lengths = torch.tensor([3])
    found = results(lambda *x: short_attention(*x, lengths=lengths, impl=compiled_impl), q, k, v, g)
    cut = results(lambda *x: short_attention(*x, impl=compiled_impl), q, k[:, :3], v[:, :3], g)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for mine, other in zip(found, cut, strict=True):
        torch.testing.assert_close(mine[:, : other.shape[1]], other, rtol=tolerance, atol=tolerance)
        assert not mine[:, other.shape[1] :].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views(impl, dtype):
    """q, k and v as views of one projection, of heads before tokens, and with a last axis that is not contiguous."""
    tokens = 9 if impl == "triton" else 37
    q, k, v, g = draw(2, tokens, tokens, 2, 16, dtype)
    expected = results(lambda *x: short_attention(*x, impl=impl), q, k, v, g)
    packed = torch.stack([q, k, v], dim=2).unbind(2)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    awkward = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    grads = [g, torch.stack([g, g], dim=2)[:, :, 0], g.transpose(1, 3).contiguous().transpose(1, 3)]
    for views, grad in zip((packed, swapped, awkward), grads, strict=True):
        leaves = [x.detach().requires_grad_() for x in views]
        out = short_attention(*leaves, impl=impl)
        found = [out, *torch.autograd.grad(out, leaves, grad)]
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5)
    broadcast = g[:1, :1, :1, :1].expand_as(g)  # what sum().backward() hands over: strides of 0
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = short_attention(*leaves, impl=impl)
    one, two = (torch.autograd.grad(out, leaves, x, retain_graph=True) for x in (broadcast, broadcast.clone()))
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("spread", [1e-3, 30.0, 1e4])
def test_softmax_is_safe(impl, spread):
    q, k, v, g = draw(1, 37, 37, 2, 16, spread=spread)
    ours = results(lambda *x: short_attention(*x, impl=impl), q, k, v, g)
    assert all(bool(x.isfinite().all()) for x in ours)
    if spread < 100:
        exact = results(eager, *(x.double() for x in (q, k, v, g)), None, 0.25)
        torch.testing.assert_close(ours[0], exact[0], rtol=0, atol=2e-6 * max(1.0, spread**2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_rows(impl, dtype):
    q, k, v, _ = draw(2, 9, 20, 2, 16, dtype)
    plain = short_attention(q, k, v, impl=impl)
    q[0, 4, 1, 3], v[1, 19, 0, 7] = float("nan"), float("nan")
    out = short_attention(q, k, v, impl=impl)
    poisoned = torch.zeros_like(out, dtype=torch.bool)
    poisoned[0, 4, 1], poisoned[1, :, 0, 7] = True, True
    assert torch.equal(out.isnan(), poisoned)
    assert torch.equal(out[~poisoned], plain[~poisoned])


def test_equals_scaled_dot_product_attention(impl):
    q, k, v, _ = draw(1, 50, 122, 2, 16)
    other = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(short_attention(q, k, v, impl=impl), other, rtol=1e-5, atol=1e-5)


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype):
    q, k, v, g = draw(5, 50, 61, 3, 16, dtype)
    lengths = torch.tensor([61, 3, 0, 16, 17])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(lambda *x: short_attention(*x, lengths=lengths, impl="native"), q, k, v, g))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_batch_split(compiled_impl, dtype):
    tokens = 37 if compiled_impl == "native" else 9
    q, k, v, g = draw(4, tokens, tokens, 2, 16, dtype)

    def run(rows: slice) -> list[torch.Tensor]:
        return results(lambda *x: short_attention(*x, impl=compiled_impl), *(x[rows] for x in (q, k, v, g)))

    for whole, first, others in zip(*map(run, (slice(None), slice(1), slice(1, 4))), strict=True):
        assert torch.equal(whole, torch.cat([first, others]))


@pytest.mark.parametrize("shape", [(1, 1, 8), (37, 37, 24), (9, 17, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_and_writes_stay_inside(compiled_impl, dtype, shape):
    """Rows of NaN around every operand: none may reach a result."""
    queries, keys, width = shape
    q, k, v, g = draw(2, queries, keys, 2 if compiled_impl == "native" else 1, width, dtype)
    plain = results(lambda *x: short_attention(*x, impl=compiled_impl), q, k, v, g)
    framed = [
        torch.full((2, x.shape[1] + 2, x.shape[2] + 2, width + 16), float("nan"), dtype=dtype) for x in (q, k, v, g)
    ]
    views = [f[:, 1:-1, 1:-1, 8:-8] for f in framed]
    for view, x in zip(views, (q, k, v, g), strict=True):
        view.copy_(x)
    leaves = [x.detach().requires_grad_() for x in views[:3]]
    out = short_attention(*leaves, impl=compiled_impl)
    found = [out, *torch.autograd.grad(out, leaves, views[3])]
    assert all(torch.equal(a.double(), b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("packed", "masked"), [(False, True), (True, False)])
def test_opcheck(compiled_impl, dtype, packed, masked):
    q, k, v, _ = draw(2, 5, 5, 2, 8, dtype)
    lengths = torch.tensor([5, 4]) if masked else None
    operands = (torch.stack([q, k, v], dim=2), None, None) if packed else (q, k, v)
    leaves = [None if x is None else x.requires_grad_() for x in operands]
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=5e-2, atol=5e-2)
    torch.library.opcheck(OPS.short_attention.default, (*leaves, lengths, 0.25, compiled_impl), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_op_equals_its_short_cut(compiled_impl, dtype):
    """The dispatcher's op, which compiled code takes, and the function that eager code takes."""
    q, k, v, g = draw(2, 11, 9, 2, 16, dtype)
    lengths = torch.tensor([9, 4])
    op = results(lambda *x: OPS.short_attention(*x, lengths, 0.25, compiled_impl)[0], q, k, v, g)
    short = results(lambda *x: short_attention(*x, lengths=lengths, impl=compiled_impl), q, k, v, g)
    assert all(map(torch.equal, op, short))


@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 4])])
@pytest.mark.parametrize("chosen", [True, False])
def test_compiles_without_a_graph_break(impl, lengths, chosen):
    if not chosen and impl != "native":
        pytest.skip("what is chosen here is the native one")
    q, k, v, g = draw(2, 9, 9, 2, 16)
    name = impl if chosen else None

    def doubled(*x: torch.Tensor) -> torch.Tensor:
        packed = short_attention_packed(torch.stack(x, dim=2), lengths=lengths, impl=name)
        return 2 * short_attention(*x, lengths=lengths, impl=name) + packed

    torch.compiler.reset()  # the function is one and the same for all parameters: its versions would be too many
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for mine, other in zip(results(compiled, q, k, v, g), results(doubled, q, k, v, g), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v), doubled(q, k, v), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 3, 3, 1, 16), torch.float64, "takes float32 and bfloat16.*, not torch.float64"),
        ((1, 3, 3, 1, 12), torch.float32, "takes head dimensions 8, 16, ... 64, not 12"),
        ((1, 3, 3, 1, 72), torch.float32, "takes head dimensions 8, 16, ... 64, not 72"),
        ((1, 3, 257, 1, 16), torch.float32, "takes 1 to 256 tokens, not 3 queries and 257 keys"),
        ((1, 257, 3, 1, 16), torch.float32, "takes 1 to 256 tokens, not 257 queries and 3 keys"),
    ],
)
def test_what_goes_to_the_reference(compiled_impl, shape, dtype, reason, caplog):
    q, k, v, _ = draw(*shape, dtype)
    with pytest.raises(UsageError, match=reason):
        short_attention(q, k, v, impl=compiled_impl)
    with caplog.at_level(logging.DEBUG, logger="fastdiffclip.kernels.dispatch"):
        assert torch.equal(short_attention(q, k, v), short_attention(q, k, v, impl="reference"))
    if compiled_impl == "native":  # on a CPU nothing else is asked
        assert "not taken: it takes" in caplog.text


def test_float16(impl):
    q, k, v, g = draw(1, 11, 20, 2, 16, torch.float16)
    if impl == "native":
        with pytest.raises(UsageError, match=r"it takes float32 and bfloat16, not torch\.float16"):
            short_attention(q, k, v, impl=impl)
        return
    ours = results(lambda *x: short_attention(*x, impl=impl), q, k, v, g)
    assert_no_worse_than_eager(impl, ours, q, k, v, g, None, 0.25)


@native_only
@pytest.mark.parametrize(("keys", "width"), [(257, 16), (3, 72), (3, 12)])
def test_the_library_refuses_what_its_work_space_does_not_hold(keys, width):
    q, k, v, _ = draw(1, 3, keys, 1, width)
    with pytest.raises(UsageError, match=f"up to 256 keys and head dimensions .* got {keys} keys of {width}"):
        OPS.short_attention(q, k, v, None, 0.25, "native")


@pytest.mark.parametrize(
    ("qkv", "lengths", "message"),
    [
        (
            torch.zeros(2, 3, 4, 8),
            None,
            r"qkv must be a floating tensor \(B, L, 3, H, D\); got torch.float32 \(2, 3, 4",
        ),
        (torch.zeros(2, 3, 2, 4, 8), None, "qkv must be"),
        (torch.zeros(2, 3, 3, 4, 8, dtype=torch.int32), None, "qkv must be"),
        (
            torch.zeros(2, 3, 3, 4, 8),
            torch.ones(3, dtype=torch.int64),
            r"lengths must be an integer tensor of shape \(2,",
        ),
        (torch.zeros(2, 3, 3, 4, 8), torch.ones(2, dtype=torch.int64, device="meta"), "lengths must be on cpu"),
    ],
)
def test_packed_misuse_names_the_argument(qkv, lengths, message):
    with pytest.raises(UsageError, match=message):
        short_attention_packed(qkv, lengths=lengths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(2, 3, 4)), r"q, k, v must be \(B, L, H, D\)"),
        (dict(k=torch.zeros(2, 5, 2, 8)), "q, k, v must be"),
        (dict(q=torch.zeros(1, 3, 2, 8)), "q, k, v must be"),
        (dict(q=torch.zeros(2, 3, 1, 8)), "q, k, v must be"),
        (dict(q=torch.zeros(2, 3, 2, 16)), "q, k, v must be"),
        (dict(q=torch.zeros(2, 3, 2, 8, dtype=torch.bfloat16)), "q, k, v must share one floating dtype"),
        (dict(lengths=torch.ones(3, dtype=torch.int64)), r"lengths must be an integer tensor of shape \(2,\)"),
        (dict(lengths=torch.ones(2)), "lengths must be an integer tensor"),
        (dict(q=torch.zeros(2, 3, 2, 8, device="meta")), "must be on one device"),
    ],
)
def test_misuse_names_the_argument(change, message):
    call = dict(q=torch.zeros(2, 3, 2, 8), k=torch.zeros(2, 4, 2, 8), v=torch.zeros(2, 4, 2, 8))
    with pytest.raises(UsageError, match=message):
        short_attention(**{**call, **change})
