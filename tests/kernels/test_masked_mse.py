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
    # The target has float32's resolution at the size of the stored values, the gradient that of its dtype.
    allowed = 1e-5 * float(want_grad.abs().max()) + (2**-8 if dtype == torch.bfloat16 else 0) * want_grad.abs()
    assert bool(((prediction.grad.double() - want_grad).abs() <= allowed + 1e-9).all())


@pytest.mark.parametrize("dtype", PIXEL_DTYPES)
@pytest.mark.parametrize("prediction_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_dtypes(impl, scene_truth, dtype, prediction_dtype):
    check(scene_truth(dtype, channels=4), impl, 10, 5, 8, prediction_dtype)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.25, 3.0)])
@pytest.mark.parametrize("invalid", [0.0, 0.3, 0.8])
def test_weights_and_invalid_tokens(impl, scene_truth, weights, invalid):
    check(scene_truth(invalid=invalid), impl, 12, 7, 15, weights=weights)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    radius=st.integers(0, 5),
    share=st.floats(0, 1),
    channels=st.integers(1, 9),
    rows=st.integers(1, 5),
    invalid=st.sampled_from([0, 0.5]),
    valid_rows=st.none() | st.integers(0, 5),
    total=st.none() | st.integers(1, 99),
)
def test_any_shape(impl, scene_truth, radius, share, channels, rows, invalid, valid_rows, total):
    window = 2 * radius + 1
    truth = scene_truth(torch.float32, channels, invalid)
    check(truth, impl, rows, window, max(1, round(share * window**2)), valid_rows=valid_rows, total_rows=total)


def test_equation_9_when_all_tokens_are_valid(impl, scene_truth):
    """With weights 1, 1 and no invalid pixel it is the plain mean over all tokens and channels."""
    truth = scene_truth(torch.float32, invalid=0.0)
    centres, ids, prediction = draw(truth, 12, 5, 8, dtype=torch.float64)
    loss = masked_mse(prediction, truth.flat, centres, ids, window=5, impl=impl)
    target = torch.stack([torch.from_numpy(truth.values(truth.window(c, 5)[0])) for c in centres])
    assert loss.item() == pytest.approx(float((prediction - target).square().mean()), rel=1e-6)


def test_gradient_by_finite_differences(impl, scene_truth):
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
    centres, ids, prediction = draw(truth, 10, 5, 8)
    whole = prediction.clone().requires_grad_()
    loss = masked_mse(whole, truth.flat, centres, ids, window=5, impl=impl)
    loss.backward()
    parts = prediction.clone().requires_grad_()
    shares = [
        masked_mse(
            parts[rows],
            truth.flat,
            centres[rows],
            ids[rows],
            window=5,
            total_rows=torch.tensor(10),
            impl=impl,
        )
        for rows in (slice(0, split), slice(split, 10))
    ]
    sum(shares).backward()
    torch.testing.assert_close(sum(shares), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=1e-9)


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
        (dict(centres=torch.tensor([[0, 9, 0], [0, 0, 0]])), "centres lie outside"),
    ],
)
def test_misuse_names_the_argument(scene_truth, change, message):
    call = dict(
        prediction=torch.zeros(2, 9, 5),
        scene=scene_truth().flat,
        centres=torch.zeros(2, 3, dtype=torch.int64),
        ids=torch.zeros(2, 3, dtype=torch.int32),
        window=3,
    )
    with pytest.raises(UsageError, match=message):
        masked_mse(**{**call, **change})
