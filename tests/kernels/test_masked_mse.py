"""``masked_mse`` against explicit loops in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import dispatch, masked_mse
from fastdiffclip.kernels.flat_scene import PIXEL_DTYPES


@pytest.fixture(params=tuple(dispatch.implementations("cpu")["masked_mse"]))
def impl(request) -> str:
    found = dispatch.implementations("cpu")["masked_mse"][request.param]
    if found != "ok":
        pytest.skip(f"{request.param}: {found}")
    return request.param


def few(impl: str, rows: int, interpreted: int = 3) -> int:
    """Windows of a test: an interpreted one takes some 10 ms."""
    return interpreted if impl == "triton" else rows


def draw(truth, rows: int, window: int, visible: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Centres, ids and a prediction."""
    generator = torch.Generator().manual_seed(seed)
    centres = truth.centres(rows, seed)
    order = [torch.randperm(window * window, generator=generator)[:visible].sort().values for _ in centres]
    shape = (len(centres), window * window, truth.flat.channels)
    prediction = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return centres, torch.stack(order).int(), prediction


def loops(truth, centres, ids, prediction, window, masked_weight, visible_weight, valid_rows, total_rows):
    """The loss and its gradient, token by token."""
    rows, tokens, channels = prediction.shape
    loss, grad = 0.0, torch.zeros(prediction.shape, dtype=torch.float64)
    for b in range(min(rows, valid_rows)):
        index, valid = truth.window(centres[b], window)
        seen = set(ids[b].tolist())
        for weight, group in (
            (masked_weight, [n for n in range(tokens) if n not in seen]),
            (visible_weight, [n for n in range(tokens) if n in seen]),
        ):
            counted = [n for n in group if valid[n]]
            for n in counted:
                difference = prediction[b, n].double() - torch.from_numpy(truth.values(index[n]))
                factor = weight * len(group) / tokens / len(counted) / channels / total_rows
                loss += factor * float((difference**2).sum())
                grad[b, n] = 2 * factor * difference
    return loss, grad


def check(
    truth,
    impl,
    rows,
    window,
    visible,
    dtype=torch.float32,
    weights=(1.0, 1.0),
    valid_rows=None,
    total_rows=None,
):
    centres, ids, prediction = draw(truth, rows, window, visible, dtype=dtype)
    count = len(centres) if valid_rows is None else valid_rows
    divisor = max(1, count if total_rows is None else total_rows)
    want, want_grad = loops(truth, centres, ids, prediction, window, *weights, count, divisor)
    prediction.requires_grad_()
    loss = masked_mse(
        prediction,
        truth.flat,
        centres,
        ids,
        window=window,
        masked_weight=weights[0],
        visible_weight=weights[1],
        valid_rows=None if valid_rows is None else torch.tensor(valid_rows),
        total_rows=None if total_rows is None else torch.tensor(total_rows),
        impl=impl,
    )
    loss.backward()
    assert loss.shape == () and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(want, rel=1e-5, abs=1e-9)
    # The target has float32's resolution at the size of the stored values, the gradient that of its dtype. Triton's
    # interpreter cuts bfloat16 off, where a GPU rounds.
    rounding = {torch.bfloat16: 2**-7 if impl == "triton" else 2**-8, torch.float16: 2**-11}.get(dtype, 0)
    allowed = 1e-5 * float(want_grad.abs().max()) + rounding * want_grad.abs()
    assert bool(((prediction.grad.double() - want_grad).abs() <= allowed + 1e-9).all())


@pytest.mark.parametrize("dtype", PIXEL_DTYPES)
@pytest.mark.parametrize("prediction_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_all_dtypes(impl, scene_truth, dtype, prediction_dtype):
    refused = {
        ("triton", torch.float64): "'triton' cannot be used: it computes in float32, the prediction is float64",
        (
            "native",
            torch.float64,
        ): "'native' cannot be used: it takes predictions in float32 and bfloat16, not torch.fl",
        (
            "native",
            torch.float16,
        ): "'native' cannot be used: it takes predictions in float32 and bfloat16, not torch.fl",
    }
    if (impl, prediction_dtype) in refused:
        with pytest.raises(UsageError, match=refused[impl, prediction_dtype]):
            check(scene_truth(dtype, channels=4), impl, 1, 5, 8, prediction_dtype)
        return
    check(scene_truth(dtype, channels=8), impl, few(impl, 10), 5, 8, prediction_dtype)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.25, 3.0)])
@pytest.mark.parametrize("invalid", [0.0, 0.3, 0.8])
def test_weights_and_invalid_tokens(impl, scene_truth, weights, invalid):
    check(scene_truth(invalid=invalid), impl, few(impl, 12), 7, 15, weights=weights)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    radius=st.integers(0, 5),
    share=st.floats(0, 1),
    channels=st.integers(1, 12),
    rows=st.integers(1, 5),
    invalid=st.sampled_from([0, 0.5]),
    valid_rows=st.none() | st.integers(0, 5),
    total=st.none() | st.integers(1, 99),
)
def test_any_shape(impl, scene_truth, radius, share, channels, rows, invalid, valid_rows, total):
    window = 2 * radius + 1
    truth = scene_truth(torch.float32, channels, invalid)
    visible = round(share * window**2)  # none and all included
    check(truth, impl, min(rows, few(impl, rows)), window, visible, valid_rows=valid_rows, total_rows=total)


def test_paper_shape_and_the_largest_window(impl, scene_truth):
    check(scene_truth(torch.uint16, channels=144), impl, few(impl, 4, 1), 11, 36)
    check(scene_truth(torch.float32, channels=2), impl, 1, 31, 288)
    if impl == "triton":
        with pytest.raises(UsageError, match="'triton' cannot be used: it takes windows up to 31 x 31, not 33 x 33"):
            check(scene_truth(channels=1), impl, 1, 33, 300)


def test_equation_9_when_all_tokens_are_valid(impl, scene_truth):
    """With weights 1, 1 and no invalid pixel it is the plain mean over all tokens and channels."""
    truth = scene_truth(torch.float32, invalid=0.0)
    dtype = torch.float64 if impl == "reference" else torch.float32
    centres, ids, prediction = draw(truth, few(impl, 12), 5, 8, dtype=dtype)
    loss = masked_mse(prediction, truth.flat, centres, ids, window=5, impl=impl)
    target = torch.stack([torch.from_numpy(truth.values(truth.window(c, 5)[0])) for c in centres])
    assert loss.item() == pytest.approx(float((prediction - target).square().mean()), rel=1e-6)


def test_gradient_by_finite_differences(impl, scene_truth):
    if impl != "reference":
        pytest.skip("finite differences need float64")
    truth = scene_truth(torch.float32, channels=3, invalid=0.3)
    centres, ids, prediction = draw(truth, 4, 3, 4, dtype=torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return masked_mse(
            x,
            truth.flat,
            centres,
            ids,
            window=3,
            masked_weight=0.7,
            visible_weight=1.3,
            valid_rows=torch.tensor(3),
            total_rows=torch.tensor(5),
            impl=impl,
        )

    assert torch.autograd.gradcheck(loss, prediction.requires_grad_())


@pytest.mark.parametrize("split", [1, 5, 9])
def test_micro_batches_add_up(impl, scene_truth, split):
    truth = scene_truth()
    rows = 10 if impl != "triton" or split == 9 else split + 1
    centres, ids, prediction = draw(truth, rows, 5, 8)
    whole = prediction.clone().requires_grad_()
    loss = masked_mse(whole, truth.flat, centres, ids, window=5, impl=impl)
    loss.backward()
    parts = prediction.clone().requires_grad_()
    shares = [
        masked_mse(
            parts[part],
            truth.flat,
            centres[part],
            ids[part],
            window=5,
            total_rows=torch.tensor(rows),
            impl=impl,
        )
        for part in (slice(0, split), slice(split, rows))
    ]
    sum(shares).backward()
    torch.testing.assert_close(sum(shares), loss, rtol=1e-6, atol=0)
    if impl != "reference":
        assert torch.equal(parts.grad, whole.grad)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=1e-9)


def test_factor_of_the_loss_and_a_second_backward(impl, scene_truth):
    """The gradient of 3 * loss; a kept graph gives it again, and what was handed out before stays as it was."""
    truth = scene_truth()
    centres, ids, prediction = draw(truth, 3, 5, 8)
    leaf = prediction.requires_grad_()
    plain = torch.autograd.grad(masked_mse(leaf, truth.flat, centres, ids, window=5, impl=impl), leaf)[0]
    loss = masked_mse(leaf, truth.flat, centres, ids, window=5, impl=impl)
    first = torch.autograd.grad(3 * loss, leaf, retain_graph=True)[0]
    before = first.clone()
    second = torch.autograd.grad(loss, leaf)[0]
    torch.testing.assert_close(first, 3 * plain, rtol=1e-6, atol=0)
    assert torch.equal(first, before) and torch.equal(second, plain)


def test_prediction_of_any_strides(impl, scene_truth):
    truth = scene_truth(channels=4)
    centres, ids, prediction = draw(truth, 3, 5, 8)
    strided = prediction.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    leaf = prediction.clone().requires_grad_()
    for x in (strided, leaf):
        masked_mse(x, truth.flat, centres, ids, window=5, impl=impl).backward()
    torch.testing.assert_close(strided.grad, leaf.grad, rtol=1e-6, atol=0)


def test_without_gradients(impl, scene_truth):
    truth = scene_truth()
    centres, ids, prediction = draw(truth, 3, 5, 8)
    call = dict(scene=truth.flat, centres=centres, ids=ids, window=5, impl=impl)
    plain = masked_mse(prediction, **call)
    with torch.no_grad():
        quiet = masked_mse(prediction.requires_grad_(), **call)
    assert not plain.requires_grad and not quiet.requires_grad and torch.equal(plain, quiet)


def test_tokens_that_do_not_count_may_hold_anything(impl, scene_truth):
    """The loss does not see NaN in the predictions of invalid tokens and of padding rows."""
    truth = scene_truth(torch.float32, invalid=0.5)
    centres, ids, prediction = draw(truth, 4, 5, 8)
    call = dict(scene=truth.flat, centres=centres, ids=ids, window=5, valid_rows=torch.tensor(3), impl=impl)
    clean = masked_mse(prediction, **call)
    for row in range(3):
        prediction[row, ~torch.from_numpy(truth.window(centres[row], 5)[1])] = float("nan")
    prediction[3] = float("nan")
    assert torch.equal(masked_mse(prediction, **call), clean)
    if impl != "reference":  # autograd's own product of 0 and NaN spoils the reference's
        prediction.requires_grad_()
        masked_mse(prediction, **call).backward()
        assert bool(prediction.grad.isfinite().all()) and not prediction.grad[3].any()


def test_graphs_hold_the_op(impl, scene_truth):
    """Traced without a break, forward and backward, with and without a gradient."""
    truth = scene_truth(torch.uint16, channels=4)
    centres, ids, prediction = draw(truth, 3, 3, 4)

    def loss(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        share = masked_mse(x, truth.flat, centres, ids, window=3, valid_rows=count, total_rows=count, impl=impl)
        return 2 * share + masked_mse(x, truth.flat, centres, ids, window=3, masked_weight=0.5, impl=impl)

    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for run in (loss, traced):
        leaf = prediction.clone().requires_grad_()
        value = run(leaf, torch.tensor(2))
        value.backward()
        results.append((value.detach(), leaf.grad, run(prediction, torch.tensor(2))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("with_grad", [True, False])
def test_op_is_what_torch_expects(impl, scene_truth, with_grad):
    if impl == "reference":
        pytest.skip("plain torch, no op of its own")
    flat = scene_truth(torch.float16, channels=2).flat
    prediction = torch.randn(2, 9, 2, requires_grad=with_grad)
    centres, ids = torch.tensor([[0, 1, 1], [1, 0, 0]]), torch.tensor([[0, 4], [1, 8]], dtype=torch.int32)
    count = torch.tensor(1) if with_grad else None
    arguments = (prediction, *flat.tensors, centres, ids, 3, 1.0, 0.5, count, None, with_grad, impl)
    torch.library.opcheck(torch.ops.fastdiffclip.masked_mse.default, arguments)


def test_padding_rows_weigh_nothing(impl, scene_truth):
    truth = scene_truth()
    centres, ids, prediction = draw(truth, 8, 5, 8)
    call = dict(window=5, impl=impl)
    short = masked_mse(prediction[:3], truth.flat, centres[:3], ids[:3], **call)
    prediction[3:] = 1e6
    padded = prediction.requires_grad_()
    loss = masked_mse(padded, truth.flat, centres, ids, valid_rows=torch.tensor(3), **call)
    loss.backward()
    torch.testing.assert_close(loss, short, rtol=1e-6, atol=0)
    assert padded.grad[:3].any() and not padded.grad[3:].any()
    nothing = masked_mse(prediction, truth.flat, centres, ids, valid_rows=torch.tensor(0), **call)
    assert nothing.item() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prediction=torch.zeros(2, 8, 5)), r"prediction must be a floating tensor of shape \(2, 9, 5\)"),
        (dict(prediction=torch.zeros(2, 9, 5, dtype=torch.int32)), "prediction must be"),
        (dict(prediction=torch.zeros(2, 9, 4)), "prediction must be"),
        (dict(ids=torch.zeros(2, 3, dtype=torch.int64)), "ids must be"),
        (dict(ids=torch.zeros(1, 3, dtype=torch.int32)), "ids must be"),
        (dict(ids=torch.zeros(2, 10, dtype=torch.int32)), "ids must be"),
        (
            dict(centres=torch.tensor([[0, 0, 0], [0, 9, 0]])),
            r"centre 1 is \(scene, row, column\) \(0, 9, 0\), which lies",
        ),
        (dict(ids=torch.tensor([[0, 1, 8], [0, 1, 9]]).int()), r"ids of row 1 must be different numbers in 0\.\.8"),
        (dict(ids=torch.tensor([[0, -1, 8], [0, 1, 2]]).int()), r"ids of row 0 must be different numbers in 0\.\.8"),
        (dict(ids=torch.tensor([[0, 1, 8], [2, 1, 2]]).int()), r"ids of row 1 must be different numbers in 0\.\.8"),
        (dict(ids=torch.zeros(2, 3, dtype=torch.int32, device="meta")), "ids must be on cpu like the scene"),
        (dict(prediction=torch.zeros(2, 9, 5, device="meta")), "prediction must be on cpu like the scene"),
        (dict(valid_rows=torch.tensor(2, dtype=torch.int32)), "valid_rows must be a scalar int64"),
        (dict(total_rows=torch.tensor([2])), "total_rows must be a scalar int64"),
    ],
)
def test_misuse_names_the_argument(impl, scene_truth, change, message):
    call = dict(
        prediction=torch.zeros(2, 9, 5),
        scene=scene_truth().flat,
        centres=torch.zeros(2, 3, dtype=torch.int64),
        ids=torch.tensor([[0, 1, 2], [3, 5, 8]], dtype=torch.int32),
        window=3,
        impl=impl,
    )
    with pytest.raises(UsageError, match=message):
        masked_mse(**{**call, **change})
