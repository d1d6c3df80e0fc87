"""``contrastive`` against eq. 16 as written (N x N pairs) and against loops, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import contrastive, contrastive_columns, dispatch

TARGETS = ("pairwise", "class")


def available(op: str = "contrastive") -> list[str]:
    return [name for name, state in dispatch.implementations("cpu")[op].items() if state == "ok"]


def draw(n: int, k: int, d: int, tau: float = 0.07, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(rows, d, generator=generator, dtype=dtype).requires_grad_() for rows in (n, k))
    labels = torch.randint(0, k, (n,), generator=generator)
    return image, text, labels, torch.tensor(1 / tau, dtype=dtype, requires_grad=True)


def pairs_loss(image, text, labels, scale):
    """Eq. 16: N images, N texts, one of each a pair."""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text[labels], dim=1).T
    own = torch.arange(len(image))
    return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))


def class_loss(image, text, labels, scale):
    """The class targets, image by image and class by class."""
    scores = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    n, k = scores.shape
    to_text = sum(torch.logsumexp(scores[i], 0) - scores[i, labels[i]] for i in range(n)) / n
    per_class = []
    for c in range(k):
        members = [i for i in range(n) if labels[i] == c]
        if members:
            terms = [torch.logsumexp(scores[:, c], 0) - scores[i, c] for i in members]
            per_class.append(sum(terms) / len(members))
    return 0.5 * (to_text + sum(per_class) / len(per_class))


TRUTH = {"pairwise": pairs_loss, "class": class_loss}


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def assert_same(ours, truth, leaves, tolerance=1e-10):
    assert ours.item() == pytest.approx(truth.item(), rel=tolerance, abs=tolerance)
    for a, b in zip(gradients(ours, leaves), gradients(truth, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 24), k=st.integers(1, 12), d=st.integers(1, 9), seed=st.integers(0, 99))
@pytest.mark.parametrize("targets", TARGETS)
def test_value_and_gradients_for_any_shape(targets, n, k, d, seed):
    image, text, labels, scale = draw(n, k, d, seed=seed)
    truth = TRUTH[targets](image, text, labels, scale)
    ours = contrastive(image, text, labels, scale, targets=targets, impl="reference")
    # In one dimension the gradient is a difference of equal numbers of size 1 / tau.
    assert_same(ours, truth, (image, text, scale), 1e-9)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("impl", available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision_is_near_the_truth(targets, impl, dtype):
    image, text, labels, _ = draw(64, 15, 128)
    image, text = (x.detach().to(dtype) for x in (image, text))
    leaves = [x.clone().requires_grad_() for x in (image, text, torch.tensor(1 / 0.07))]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    ours = contrastive(leaves[0], leaves[1], labels, leaves[2], targets=targets, impl=impl)
    truth = TRUTH[targets](exact[0], exact[1], labels, exact[2])
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(truth.item(), rel=2e-6)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(gradients(ours, leaves), gradients(truth, exact), strict=True):
        assert float((a.double() - b).abs().max()) <= rounding * float(b.abs().max())


@pytest.mark.parametrize("targets", TARGETS)
def test_finite_differences(targets):
    image, text, labels, scale = draw(6, 4, 3, tau=0.5)

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        return contrastive(leaves[0], leaves[1], labels, leaves[2], targets=targets, impl="reference")

    assert torch.autograd.gradcheck(loss, (image, text, scale))


@pytest.mark.parametrize("targets", TARGETS)
def test_absent_classes_take_no_part_where_the_equations_say_so(targets):
    image, text, labels, scale = draw(10, 8, 5)
    labels = labels % 3 + 2
    ours = contrastive(image, text, labels, scale, targets=targets, impl="reference")
    assert_same(ours, TRUTH[targets](image, text, labels, scale), (image, text, scale))
    absent = [0, 1, 5, 6, 7]
    moved = gradients(contrastive(image, text, labels, scale, targets=targets, impl="reference"), (text,))[0][absent]
    # Eq. 16 has no pair of an absent class; cross-entropy over all classes pushes away from it.
    assert bool(moved.any()) == (targets == "class")


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("real", [1, 5, 12])
def test_padding_rows_weigh_nothing(targets, real):
    image, text, labels, scale = draw(12, 4, 6)
    ours = contrastive(image, text, labels, scale, targets=targets, valid_rows=torch.tensor(real), impl="reference")
    truth = TRUTH[targets](image[:real], text, labels[:real], scale)
    assert_same(ours, truth, (image, text, scale))


@pytest.mark.parametrize("targets", TARGETS)
def test_a_block_of_padding_alone_is_zero(targets):
    image, text, labels, scale = draw(5, 4, 6)
    loss = contrastive(image, text, labels, scale, targets=targets, valid_rows=torch.tensor(0), impl="reference")
    assert loss.item() == 0
    assert not any(g.any() for g in gradients(loss, (image, text, scale)))


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("blocks", [(12,), (5, 7), (1, 0, 4, 7)])
def test_blocks_of_ranks_add_up(targets, blocks):
    """Ranks hold padded blocks; exchanged are counts and column sums only."""
    rows = max(blocks) + 2
    image, text, labels, scale = draw(sum(blocks), 5, 6)
    labels[:3] = 4  # a class that the later ranks may not have
    leaves = (image, text, scale)
    shares, columns, start = [], [], 0
    for block in blocks:
        own, number = slice(start, start + block), torch.tensor(block)
        filler = torch.full((rows - block, 6), 3.0, dtype=image.dtype)
        padded = torch.cat([image[own], filler])
        names = torch.cat([labels[own], torch.zeros(rows - block, dtype=torch.int64)])
        shares.append((padded, names, number))
        columns.append(contrastive_columns(padded.detach(), text.detach(), scale.detach(), number, impl="reference"))
        start += block
    counts = torch.bincount(labels, minlength=5)
    together = torch.logsumexp(torch.stack(columns), dim=0)
    losses = [
        contrastive(
            padded,
            text,
            names,
            scale,
            targets=targets,
            valid_rows=number,
            counts=counts,
            column_logsumexp=together,
            impl="reference",
        )
        for padded, names, number in shares
    ]
    assert_same(sum(losses), TRUTH[targets](image, text, labels, scale), leaves)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("impl", available())
@pytest.mark.parametrize("tau", [1e-3, 1e-2, 1.0, 1e2])
@pytest.mark.parametrize("kind", ["random", "identical", "zero", "tiny"])
def test_extreme_inputs_stay_finite(targets, impl, tau, kind):
    image, text, labels, scale = (x.detach().float() if x.is_floating_point() else x for x in draw(16, 6, 8, tau))
    if kind == "identical":
        image[:], text[:] = image[0], text[0]
    elif kind == "zero":
        image[:4], text[1] = 0, 0
    elif kind == "tiny":
        image, text = image * 1e-20, text * 1e-20
    leaves = [x.requires_grad_() for x in (image, text, scale)]
    loss = contrastive(image, text, labels, scale, targets=targets, impl=impl)
    assert math.isfinite(loss.item())
    assert all(bool(g.isfinite().all()) for g in gradients(loss, leaves))
    if kind == "identical":
        present = labels.unique()
        entropy = math.log(16) if targets == "pairwise" else 0.5 * (math.log(6) + math.log(16))
        assert len(present) > 1 and loss.item() == pytest.approx(entropy, rel=1e-4)


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
        (dict(labels=torch.zeros(3, dtype=torch.int64)), "labels must be an int64 tensor"),
        (dict(labels=torch.zeros(4)), "labels must be an int64 tensor"),
        (dict(labels=torch.tensor([0, 1, 2, 0])), r"labels must lie in 0\.\.1"),
        (dict(labels=torch.tensor([0, 1, -1, 0])), r"labels must lie in 0\.\.1"),
        (dict(logit_scale=torch.ones(2)), "logit_scale must be a scalar"),
        (dict(counts=torch.ones(3)), "counts must have shape"),
        (dict(column_logsumexp=torch.ones(1, 2)), "column_logsumexp must have shape"),
    ],
)
def test_misuse_names_the_argument(change, message):
    with pytest.raises(UsageError, match=message):
        contrastive(**{**GOOD, **change})
