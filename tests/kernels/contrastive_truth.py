"""What ``contrastive`` has to give: eq. 16 as written (N x N pairs), loops over classes, and what rounding may add."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from fastdiffclip.kernels import contrastive
from fastdiffclip.kernels.triton import interpreted

NAMES = ("loss", "image", "text", "logit_scale")


def draw(n: int, k: int, d: int, tau: float = 0.07, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(rows, d, generator=generator, dtype=dtype).requires_grad_() for rows in (n, k))
    labels = torch.randint(0, k, (n,), generator=generator)
    return image, text, labels, torch.tensor(1 / tau, dtype=dtype, requires_grad=True)


def cosines(image, text):
    return F.normalize(image, dim=1) @ F.normalize(text, dim=1).T


def pairs_loss(scores, labels):
    """Eq. 16: N images, N texts, one of each a pair."""
    logits, own = scores[:, labels], torch.arange(len(scores))
    return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))


def class_loss(scores, labels):
    """The class targets, image by image and class by class."""
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


def truth_of(targets, image, text, labels, scale):
    return TRUTH[targets](scale * cosines(image, text), labels)


def results(run, leaves):
    """Loss and gradients of ``run(*leaves)`` in float64; the leaves are copied."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    loss = run(*leaves)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [loss.detach().double(), *(g.double() for g in grads)]


def largest_terms(targets, image, text, labels, scale):
    """The largest sum of absolute terms behind each result: what a rounding of them amounts to."""
    image, text, scale = (x.detach().double() for x in (image, text, scale))
    size, scores = scale.abs(), (scale * cosines(image, text)).requires_grad_()
    loss = TRUTH[targets](scores, labels)
    (change,) = torch.autograd.grad(loss, scores)
    # dL/ds is what the softmaxes give less what the own score gives: here both are added.
    counts = torch.bincount(labels)
    own = (
        0.5 / (counts[labels] * (counts > 0).sum())
        if targets == "class"
        else torch.full((len(image),), 0.5 / len(image))
    )
    change = change + 2 * (own + 0.5 / len(image))[:, None] * F.one_hot(labels, len(text))
    norms = [x.norm(dim=1).clamp(min=1e-6) for x in (image, text)]
    return [
        float(size + loss.detach()),
        float((size * change.sum(1) / norms[0]).max()),
        float((size * change.sum(0) / norms[1]).max()),
        float((change * cosines(image, text).abs()).sum()),
    ]


def assert_right(impl, targets, image, text, labels, scale, real=None, **options):
    """Loss and gradients against float64.

    The reference computes in float64 too and must agree to 1e-10 of the terms. Other implementations get float32 (or
    what ``image`` is in), and may err by half more than eager torch in that dtype, four roundings of the terms on top,
    each of them once more for every unit of the scores: a score's rounding is an error of the weights.
    """
    rows = len(image) if real is None else real
    exact = functools.partial(truth_of, targets)
    leaves = [x.detach().double() for x in (image, text, scale)]
    known = [leaves[0][:rows], leaves[1], labels[:rows], leaves[2]]
    truth = results(lambda z, t, s: exact(z[:rows], t, labels[:rows], s), leaves)
    terms = largest_terms(targets, *known)

    def op(name, z, t, s):
        count = None if real is None else torch.tensor(real)
        return contrastive(z, t, labels, s, targets=targets, valid_rows=count, impl=name, **options)

    if impl == "reference" and image.dtype == torch.float64:
        allowed = [1e-10 * (1 + size) for size in terms]
        ours = results(functools.partial(op, impl), leaves)
    else:
        dtype = torch.float32 if image.dtype == torch.float64 else image.dtype
        given = [image.detach().to(dtype), text.detach().to(dtype), scale.detach().float()]
        if dtype != image.dtype:  # the truth is that of the rounded arguments
            truth = results(lambda z, t, s: exact(z[:rows], t, labels[:rows], s), [x.double() for x in given])
        eager = results(functools.partial(op, "reference"), given)
        ours = results(functools.partial(op, impl), given)
        rounding = 4 * 2.0**-24 * (1 + float(scale.detach().abs()))
        allowed = [1.5 * float((a - b).abs().max()) + rounding * s for a, b, s in zip(eager, truth, terms, strict=True)]
        if dtype == torch.bfloat16 and impl == "triton" and interpreted():  # it cuts gradients off, no rounding
            allowed[1:3] = [a + 2.0**-7 * float(b.abs().max()) for a, b in zip(allowed[1:3], truth[1:3], strict=True)]
    for name, mine, true, bound in zip(NAMES, ours, truth, allowed, strict=True):
        error = float((mine - true).abs().max())
        assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}"
