"""What is the native ``masked_mse``'s own: instruction sets, threads, the numbers it reads, and when it is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import ResourceError, UsageError
from fastdiffclip.kernels import FlatScene, masked_mse, native
from fastdiffclip.kernels.flat_scene import PIXEL_DTYPES
from fastdiffclip.kernels.native import loader

pytestmark = pytest.mark.skipif(not native.status()[0], reason=native.status()[1])
BF16 = torch.bfloat16


def isas() -> list[str]:
    return list(loader.ISAS[: loader.ISAS.index(loader.best_isa()) + 1]) if native.status()[0] else []


def call(flat, centres, ids, prediction, window, isa=None, with_grad=True, **changes):
    from fastdiffclip.kernels.native.masked_mse import masked_mse as launch

    wanted = dict(masked_weight=1.3, visible_weight=0.4, valid_rows=None, total_rows=torch.tensor(31)) | changes
    return launch(prediction, flat, centres, ids, window=window, with_grad=with_grad, isa=isa, **wanted)


def inputs(truth, rows, window, visible, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = truth.centres(rows, seed)
    shape = (len(centres), window * window, truth.flat.channels)
    ids = torch.stack([torch.randperm(shape[1], generator=generator)[:visible] for _ in centres]).int()
    return centres, ids, torch.randn(shape, generator=generator).to(dtype)


def reference_gradient(flat, centres, ids, prediction, window):
    """The reference's differences times the factor, which is found in float64; rounded as the dtype asks for."""
    from fastdiffclip.kernels import reference

    index, valid = reference.pixel_indices(flat, centres, window)
    difference = prediction.float() - reference.read_pixels(flat, index)
    seen = torch.zeros(valid.shape, dtype=torch.bool).scatter(1, ids.long(), True)
    tokens, channels = prediction.shape[1:]
    factor = torch.zeros(valid.shape, dtype=torch.float64)
    for weight, share, chosen in (
        (1.3, tokens - ids.shape[1], ~seen & valid),
        (0.4, ids.shape[1], seen & valid),
    ):
        count = chosen.sum(1, keepdim=True).clamp(min=1).double()
        factor = torch.where(chosen, 2 * weight * share * (1 / (tokens * channels) / 31) / count, factor)
    return (factor[:, :, None] * difference.double()), valid


@pytest.mark.parametrize("dtype", PIXEL_DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 24, 41])
@pytest.mark.parametrize("prediction_dtype", [torch.float32, BF16])
def test_every_instruction_set_gives_the_same_gradient(scene_truth, dtype, channels, prediction_dtype):
    flat = (truth := scene_truth(dtype, channels, invalid=0.3)).flat
    centres, ids, prediction = inputs(truth, 9, 5, 8, prediction_dtype)
    wanted, valid = reference_gradient(flat, centres, ids, prediction, 5)
    losses, grads = zip(*(call(flat, centres, ids, prediction, 5, isa) for isa in isas()), strict=True)
    # The factor is rounded to float32 once, its product with the difference once, the result to bfloat16.
    room = 2.0**-23 + (2.0**-8 if prediction_dtype == BF16 else 0)
    assert ((grads[0].double() - wanted).abs() <= room * wanted.abs()).all() and not grads[0][~valid].any()
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    for loss in losses:  # sums of a token's squares in another order
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=0)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 20), window=st.integers(1, 8), channels=st.integers(1, 50), bf16=st.booleans(),
       share=st.floats(0, 1), real=st.integers(0, 20))  # fmt: skip
def test_threads_change_no_bit(scene_truth, rows, window, channels, bf16, share, real):
    truth = scene_truth(torch.uint16, channels, invalid=0.2)
    visible = round(share * window**2)
    if rows:
        centres, ids, prediction = inputs(truth, rows, window, visible, BF16 if bf16 else torch.float32)
    else:
        centres, ids = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, visible, dtype=torch.int32)
        prediction = torch.zeros(0, window**2, channels)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(call(truth.flat, centres, ids, prediction, window, valid_rows=torch.tensor(real)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert not found[0][1][real:].any() and bool(found[0][1].isfinite().all())


def test_bfloat16_gradient_is_the_float32_one_rounded(scene_truth):
    truth = scene_truth(torch.float32, 40)
    centres, ids, prediction = inputs(truth, 6, 5, 8, BF16)
    for isa in isas():
        narrow = call(truth.flat, centres, ids, prediction, 5, isa)
        wide = call(truth.flat, centres, ids, prediction.float(), 5, isa)
        assert torch.equal(narrow[1], wide[1].bfloat16()) and torch.equal(narrow[0], wide[0])


@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32])
@pytest.mark.parametrize("channels", [3, 16])
def test_special_stored_numbers(dtype, channels):
    """Every half there is, and the special numbers of the others, read as torch reads them."""
    if dtype == torch.float16:
        stored = torch.arange(-32768, 32768).to(torch.int16).view(torch.float16)
    else:
        stored = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-39, -3e38, 1.0]).to(dtype)
    stored = stored[: len(stored) // channels * channels].reshape(-1, channels)
    flat = FlatScene(stored, torch.ones(channels), torch.zeros(channels), None, torch.tensor([[0, len(stored), 1]]))
    centres = torch.zeros(len(stored), 3, dtype=torch.int64)
    centres[:, 1] = torch.arange(len(stored))
    ids = torch.zeros(len(stored), 1, dtype=torch.int32)
    for isa in isas():
        weight = channels / 2  # with a factor of 1/2 the gradient is the difference from 0
        _, grad = call(flat, centres, ids, torch.zeros(len(stored), 1, channels), 1, isa, visible_weight=weight,
                       total_rows=torch.tensor(1))  # fmt: skip
        assert torch.equal(grad[:, 0].nan_to_num(7.0, 8.0, -8.0), (0 - stored.float()).nan_to_num(7.0, 8.0, -8.0))


def test_padding_rows_are_not_looked_at(scene_truth):
    truth = scene_truth()
    centres, ids, prediction = inputs(truth, 6, 5, 8, torch.float32)
    loss, grad = call(truth.flat, centres[:3], ids[:3], prediction[:3], 5)
    centres[3:], ids[3:], prediction[3:] = -99, 1 << 30, torch.nan
    padded, padded_grad = call(truth.flat, centres, ids, prediction, 5, valid_rows=torch.tensor(3))
    assert torch.equal(padded, loss) and torch.equal(padded_grad[:3], grad) and not padded_grad[3:].any()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("wrong", [-1, 25, 2**31 - 1, -(2**31), None])
def test_the_first_wrong_row_of_ids_is_named(scene_truth, threads, wrong):
    truth = scene_truth()
    centres, ids, prediction = inputs(truth, 9, 5, 8, torch.float32)
    for row in (8, 4):
        ids[row, 3] = ids[row, 0] if wrong is None else wrong
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(UsageError, match=r"ids of row 4 must be different numbers in 0\.\.24"):
            call(truth.flat, centres, ids, prediction, 5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("centre", [[3, 0, 0], [-1, 0, 0], [0, 9, 0], [0, 0, 14], [1, 0, 2**62], [2, -1, 0]])
def test_centre_outside_is_named(scene_truth, centre):
    truth = scene_truth()
    centres, ids, prediction = inputs(truth, 2, 5, 8, torch.float32)
    centres[1] = torch.tensor(centre)
    with pytest.raises(UsageError, match=r"centre 1 is \(scene, row, column\) \("):
        call(truth.flat, centres, ids, prediction, 5)


def test_extents_beyond_the_pixels_are_refused(scene_truth):
    truth = scene_truth()
    truth.flat.extents[2, 1] = 2**62
    _, ids, prediction = inputs(truth, 1, 5, 8, torch.float32)
    with pytest.raises(UsageError, match="centre 0"):
        call(truth.flat, torch.tensor([[2, 0, 0]]), ids, prediction, 5)


def test_tensors_of_any_strides(scene_truth):
    truth = scene_truth(channels=9)
    centres, ids, prediction = inputs(truth, 7, 3, 4, torch.float32)
    flat = truth.flat
    strided = FlatScene(
        flat.pixels, *(torch.stack([x, x], 1)[:, 0] for x in (flat.scale, flat.offset)), flat.valid,
        flat.extents.T.contiguous().T,
    )  # fmt: skip
    turned = prediction.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    found = call(strided, centres.T.contiguous().T, ids.T.contiguous().T, turned, 3)
    assert all(map(torch.equal, found, call(flat, centres, ids, prediction, 3)))


def test_a_factor_of_one_touches_nothing():
    from fastdiffclip.kernels.native.masked_mse import scale_in_place

    values = torch.tensor([1.0, torch.nan, -2.0])
    kept = scale_in_place(values, torch.tensor(1.0))
    assert kept is values and values._version == 0
    assert scale_in_place(torch.tensor([1.0, -2.0]).bfloat16(), torch.tensor(3.0)).tolist() == [3.0, -6.0]


def test_taken_on_the_cpu_for_what_it_knows(monkeypatch, scene_truth):
    from fastdiffclip.kernels.native import masked_mse as module

    taken, real = [], module.masked_mse
    monkeypatch.setattr(module, "masked_mse", lambda *args, **more: taken.append(1) or real(*args, **more))
    truth = scene_truth()
    for dtype, count in ((torch.float32, 1), (BF16, 2), (torch.float16, 2), (torch.float64, 2)):
        centres, ids, prediction = inputs(truth, 3, 5, 8, dtype)
        masked_mse(prediction, truth.flat, centres, ids, window=5)
        assert len(taken) == count


def test_no_windows_at_all(scene_truth):
    prediction = torch.zeros(0, 9, 5, requires_grad=True)
    centres, ids = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int32)
    loss = masked_mse(prediction, scene_truth().flat, centres, ids, window=3, impl="native")
    loss.backward()
    assert loss.item() == 0 and prediction.grad.shape == (0, 9, 5)


def test_a_processor_without_the_instruction_set(scene_truth):
    truth = scene_truth()
    if loader.best_isa() == loader.ISAS[-1]:
        pytest.skip("this processor runs them all")
    with pytest.raises(ResourceError, match="does not run"):
        call(truth.flat, *inputs(truth, 1, 3, 2, torch.float32), 3, loader.ISAS[-1])
