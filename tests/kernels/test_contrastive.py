"""``contrastive`` against eq. 16 as written (N x N pairs) and against loops, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import contrastive, contrastive_columns, dispatch
from fastdiffclip.kernels.triton import contrastive_ops, interpreted

from .contrastive_truth import NAMES, assert_right, draw, largest_terms, results, truth_of

TARGETS = ("pairwise", "class")
TILED = "triton in tiles"  # the kernels of large batches, made to take small ones


def available() -> list[str]:
    found = [name for name, state in dispatch.implementations("cpu")["contrastive"].items() if state == "ok"]
    return [*found, TILED] if "triton" in found else found


@pytest.fixture(params=available())
def impl(request, monkeypatch) -> str:
    if request.param == TILED:
        monkeypatch.setattr(contrastive_ops, "ONE_PROGRAM", ())
    return request.param.split()[0]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 24), k=st.integers(1, 12), d=st.integers(1, 9), seed=st.integers(0, 99))
@pytest.mark.parametrize("targets", TARGETS)
def test_value_and_gradients_for_any_shape(targets, n, k, d, seed):
    """The kernels' own shapes: see triton/test_contrastive.py."""
    assert_right("reference", targets, *draw(n, k, d, seed=seed))


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_training_batch(impl, targets, dtype):
    image, text, labels, scale = draw(64, 15, 128)
    assert_right(impl, targets, image.detach().to(dtype), text.detach().to(dtype), labels, scale)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision_is_near_the_truth(impl, targets, dtype):
    image, text, labels, scale = draw(64, 15, 128)
    given = image.detach().to(dtype), text.detach().to(dtype), torch.tensor(1 / 0.07)
    ours = results(lambda z, t, s: contrastive(z, t, labels, s, targets=targets, impl=impl), given)
    truth = results(lambda z, t, s: truth_of(targets, z, t, labels, s), [x.double() for x in given])
    cut_off = impl == "triton" and interpreted()  # where the last bit of a bfloat16 should be rounded
    rounding = 2.0 ** (-7 if cut_off else -8) if dtype == torch.bfloat16 else 1e-5
    assert ours[0].item() == pytest.approx(truth[0].item(), rel=2e-6)
    for a, b in zip(ours[1:], truth[1:], strict=True):
        assert float((a - b).abs().max()) <= rounding * float(b.abs().max())
    loss = contrastive(*given[:2], labels, given[2], targets=targets, impl=impl)
    assert loss.dtype == torch.float32 and loss.shape == ()


@pytest.mark.parametrize("targets", TARGETS)
def test_finite_differences(targets):
    image, text, labels, scale = draw(6, 4, 3, tau=0.5)

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        return contrastive(leaves[0], leaves[1], labels, leaves[2], targets=targets, impl="reference")

    assert torch.autograd.gradcheck(loss, (image, text, scale))


@pytest.mark.parametrize("targets", TARGETS)
def test_absent_classes_take_no_part_where_the_equations_say_so(impl, targets):
    image, text, labels, scale = draw(10, 8, 5)
    labels = labels % 3 + 2
    assert_right(impl, targets, image, text, labels, scale)
    moved = results(
        lambda z, t, s: contrastive(z, t, labels, s, targets=targets, impl=impl),
        [x.detach().float() for x in (image, text, scale)],
    )[2][[0, 1, 5, 6, 7]]
    # Eq. 16 has no pair of an absent class; cross-entropy over all classes pushes away from it.
    assert bool(moved.any()) == (targets == "class")


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("real", [1, 5, 12])
def test_padding_rows_weigh_nothing(impl, targets, real):
    assert_right(impl, targets, *draw(12, 4, 6), real=real)


@pytest.mark.parametrize("targets", TARGETS)
def test_a_block_of_padding_alone_is_zero(impl, targets):
    image, text, labels, scale = (x.detach().float() if x.is_floating_point() else x for x in draw(5, 4, 6))
    none = torch.tensor(0)
    found = results(
        lambda z, t, s: contrastive(z, t, labels, s, targets=targets, valid_rows=none, impl=impl),
        (image, text, scale),
    )
    assert not any(x.any() for x in found)
    sums = contrastive_columns(image, text, scale, none, impl=impl)
    assert bool((sums < -1e29).all() and sums.isfinite().all())


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("tau", [0.07, 1e-3])
@pytest.mark.parametrize("blocks", [(12,), (5, 7), (1, 0, 4, 7)])
def test_blocks_of_ranks_add_up(impl, targets, tau, blocks):
    """Ranks hold padded blocks; exchanged are counts and column sums only. In float32 but for the reference."""
    rows, exact = max(blocks) + 2, impl == "reference"
    image, text, labels, scale = (x.detach() for x in draw(sum(blocks), 5, 6, tau))
    labels[:3] = 4  # a class that the later ranks may not have
    leaves = [x if exact else x.float() for x in (image, text, scale)]
    counts = torch.bincount(labels, minlength=5)

    def padded(image):
        for own, block in zip(image.split(blocks), blocks, strict=True):
            yield torch.cat([own, torch.full((rows - block, 6), 3.0, dtype=own.dtype)]), torch.tensor(block)

    names = [torch.cat([own, torch.zeros(rows - len(own), dtype=torch.int64)]) for own in labels.split(blocks)]
    parts = [contrastive_columns(z, leaves[1], leaves[2], count, impl=impl) for z, count in padded(leaves[0])]
    together = torch.logsumexp(torch.stack(parts), dim=0)

    def loss(image, text, scale):
        given = dict(targets=targets, counts=counts, column_logsumexp=together, impl=impl)
        shares = zip(padded(image), names, strict=True)
        return sum(contrastive(z, text, own, scale, valid_rows=count, **given) for (z, count), own in shares)

    ours = results(loss, leaves)
    known = [x.double() for x in leaves]
    truth = results(lambda z, t, s: truth_of(targets, z, t, labels, s), known)
    terms = largest_terms(targets, known[0], known[1], labels, known[2])
    rounding = 1e-10 if exact else 4 * 2.0**-24 * (1 + 1 / tau)
    for name, mine, true, size in zip(NAMES, ours, truth, terms, strict=True):
        error = float((mine - true).abs().max())
        assert error <= rounding * (1 + 2 * size), f"{name}: {error:.2e}"


@pytest.mark.parametrize("targets", TARGETS)
def test_counts_without_column_sums(impl, targets):
    """Images elsewhere count in the weights; the columns are those of this block."""
    image, text, labels, scale = (x.detach() for x in draw(9, 4, 6))
    counts, single = torch.tensor([5, 0, 9, 3]), [x.float() for x in (image, text, scale)]
    labels = torch.tensor([0, 2, 3])[labels % 3]
    found = []
    for name, leaves in (("reference", (image, text, scale)), ("reference", single), (impl, single)):
        given = dict(targets=targets, counts=counts, impl=name)
        found.append(results(lambda z, t, s, given=given: contrastive(z, t, labels, s, **given), leaves))
    for true, eager, ours in zip(*found, strict=True):
        assert float((ours - true).abs().max()) <= 1.5 * float((eager - true).abs().max()) + 1e-5


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("tau", [1e-3, 1e-2, 1.0, 1e2])
@pytest.mark.parametrize("kind", ["random", "identical", "zero", "tiny", "huge"])
def test_extreme_inputs_stay_finite(impl, targets, tau, kind):
    image, text, labels, scale = (x.detach().float() if x.is_floating_point() else x for x in draw(16, 6, 8, tau))
    if kind == "identical":
        image[:], text[:] = image[0], text[0]
    elif kind == "zero":
        image[:4], text[1] = 0, 0
    elif kind == "tiny":
        image, text = image * 1e-20, text * 1e-20
    elif kind == "huge":
        image, text = image * 1e8, text * 1e8
    if kind in ("random", "huge"):
        assert_right(impl, targets, image, text, labels, scale)
    found = results(lambda z, t, s: contrastive(z, t, labels, s, targets=targets, impl=impl), (image, text, scale))
    assert all(bool(x.isfinite().all()) for x in found)
    if kind == "identical":
        present = labels.unique()
        entropy = math.log(16) if targets == "pairwise" else 0.5 * (math.log(6) + math.log(16))
        assert len(present) > 1 and found[0].item() == pytest.approx(entropy, rel=1e-4)


@pytest.mark.parametrize("logit_scale", [0.0, -5.0])
def test_logit_scales_that_no_training_has(impl, logit_scale):
    image, text, labels, _ = draw(7, 5, 6)
    assert_right(impl, "class", image, text, labels, torch.tensor(logit_scale, dtype=torch.float64))


GOOD = dict(
    image=torch.zeros(4, 3),
    text=torch.zeros(2, 3),
    labels=torch.tensor([0, 1, 1, 0]),
    logit_scale=torch.ones(()),
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(targets="classes"), r"targets must be .* \(did you mean 'class'\?\)"),
        (dict(image=torch.zeros(4, 2)), "image and text must be"),
        (dict(image=torch.zeros(4)), "image and text must be"),
        (dict(image=torch.zeros(4, 3, device="meta")), "must be on one device"),
        (dict(labels=torch.zeros(3, dtype=torch.int64)), "labels must be an int64 tensor"),
        (dict(labels=torch.zeros(4)), "labels must be an int64 tensor"),
        (dict(labels=torch.zeros(4, dtype=torch.int64, device="meta")), "labels must be on cpu"),
        (dict(labels=torch.tensor([0, 1, 2, 0])), r"labels must lie in 0\.\.1"),
        (dict(labels=torch.tensor([0, 1, -1, 0])), r"labels must lie in 0\.\.1"),
        (dict(logit_scale=torch.ones(2)), "logit_scale must be a scalar"),
        (dict(counts=torch.ones(3)), "counts must have shape"),
        (dict(column_logsumexp=torch.ones(1, 2)), "column_logsumexp must have shape"),
        (dict(valid_rows=torch.tensor(3.0)), "valid_rows must be a scalar int64"),
        (dict(impl="native"), "no implementation 'native'.*there is: reference, triton"),
    ],
)
def test_misuse_names_the_argument(change, message):
    with pytest.raises(UsageError, match=message):
        contrastive(**{**GOOD, **change})
