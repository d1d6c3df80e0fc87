"""What attention has to equal: materialised in float64, and no worse than as one writes it in the same dtype."""

from __future__ import annotations

import torch

from fastdiffclip.kernels import triton


def draw(batch, queries, keys, heads, width, dtype=torch.float32, seed=0, spread=1.0):
    """q, k, v and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, n, heads, width) for n in (queries, keys, keys, queries)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return tuple((spread * x if i < 2 else x).to(dtype) for i, x in enumerate(tensors))


def eager(q, k, v, lengths, scale):
    """Materialised attention as one writes it, in the dtype of its arguments; float64 is the truth."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) * scale
    if lengths is not None:
        padding = torch.arange(k.shape[2]) >= lengths[:, None]
        scores = scores.masked_fill(padding[:, None, None], float("-inf"))
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)


def results(run, q, k, v, g, *args):
    """Output and gradients of q, k and v, in float64."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = run(*leaves, *args)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, g.to(out.dtype)))]


def largest_terms(q, k, v, g, lengths, scale):
    """Output and gradients with sums over absolute values (how large the terms are that may cancel); largest score."""
    q, k, v, g = (x.double().transpose(1, 2) for x in (q, k, v, g))
    scores = q @ k.transpose(2, 3) * scale
    if lengths is not None:
        padding = torch.arange(k.shape[2]) >= lengths[:, None]
        scores = scores.masked_fill(padding[:, None, None], float("-inf"))
    p = torch.softmax(scores, dim=-1)
    change = (g.abs() @ v.abs().transpose(2, 3)) * p
    change = abs(scale) * (change + p * change.sum(-1, keepdim=True))
    sums = p @ v.abs(), change @ k.abs(), change.transpose(2, 3) @ q.abs(), p.transpose(2, 3) @ g.abs()
    return [float(x.max()) for x in sums], float((q @ k.transpose(2, 3) * scale).abs().max())


def assert_no_worse_than_eager(impl, ours, q, k, v, g, lengths, scale, any_score=False):
    """Largest error of each result against float64, at most eager's in the same dtype.

    Both errors are maxima over few roundings, so chance decides which is larger where both are good: half of eager's
    is allowed on top, and one rounding of the largest terms (four in float32, where sums are what rounds).
    ``any_score``: a score's own rounding is an error of the weights relative to the score's size; one more is allowed.
    Triton's interpreter cuts bfloat16 off at a store where hardware rounds: a whole unit of the result instead of a
    half, and likewise of the output that the backward pass reads.
    """
    truth = results(eager, *(x.double() for x in (q, k, v, g)), lengths, scale)
    plain = results(eager, q, k, v, g, lengths, scale)
    rounding = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}.get(q.dtype, 4 * 2.0**-24)
    if impl == "triton" and q.dtype == torch.bfloat16 and triton.interpreted():
        rounding += 2 * 2.0**-9
    terms, score = largest_terms(q, k, v, g, lengths, scale)
    rounding *= 1 + score if any_score else 1
    for name, mine, other, exact, size in zip(("out", "q", "k", "v"), ours, plain, truth, terms, strict=True):
        error, others = float((mine - exact).abs().max()), float((other - exact).abs().max())
        allowed = 1.5 * others + rounding * size
        assert error <= allowed, f"{name}: error {error:.2e}, eager's {others:.2e}, allowed {allowed:.2e}"
