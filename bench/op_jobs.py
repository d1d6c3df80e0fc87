"""From a case of the suite `kernels` to calls that can be timed, and to the work that they have to do at least."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdiffclip.bench import plain
from fastdiffclip.bench.cases import Case
from fastdiffclip.bench.floors import Work
from fastdiffclip.bench.gate import attention_call
from fastdiffclip.bench.measure import captured
from fastdiffclip.bench.published import PUBLISHED, leaves_of, published_loss
from fastdiffclip.bench.setups import SkipCase, draw_centres, flat_scene
from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import (
    FlatScene,
    contrastive,
    gelu,
    linear,
    masked_mse,
    philox,
    reference,
    residual_norm,
    visible_noise,
)

CHUNK_ROWS = 4096
Variant = tuple[str, str]


@dataclass
class Jobs:
    """The calls of one case by (implementation, dtype), what each has to do, and what could not be built."""

    work: Work
    calls: dict[Variant, Callable[[], Any]] = field(default_factory=dict)
    skipped: dict[Variant, str] = field(default_factory=dict)

    def add(self, variant: Variant, make: Callable[[], Callable[[], Any]], probe: bool = False) -> None:
        """Keep the call that ``make`` returns, or the reason why there is none; ``probe`` calls it once."""
        try:
            call = make()
            if probe:
                call()
        except (SkipCase, UsageError) as error:
            self.skipped[variant] = str(error)
        except NotImplementedError as error:  # xformers has no operator for these tensors
            self.skipped[variant] = str(error).strip().splitlines()[0]
        except torch.OutOfMemoryError:
            self.skipped[variant] = "does not fit the device's memory"
        else:
            self.calls[variant] = call


def backward(call: Callable[..., Any], leaves: list[Tensor], mode: str) -> Callable[[], Any]:
    """``call(*leaves)``; beyond mode ``fwd`` the gradients of its sum weighted by ones, ``graph``: as a CUDA graph.

    ``call`` gives a tensor or a tuple of them.
    """
    if mode == "fwd":
        leaves = [leaf.detach() for leaf in leaves]
        return lambda: call(*leaves)

    def both() -> Any:
        out = call(*leaves)
        outs = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])

    return captured(both, leaves[0].device) if mode.endswith(" graph") else both


@contextmanager
def op_jobs(case: Case, sizes: Mapping[str, int], device: torch.device, variants: list[Variant]) -> Iterator[Jobs]:
    """Inputs, made once, and the calls of ``variants``."""
    make = {
        "visible_noise": _visible_noise,
        "masked_mse": _masked_mse,
        "contrastive": _contrastive,
        "short_attention": _short_attention,
        "linear": _linear,
        "gelu": _gelu,
        "residual_norm": _residual_norm,
    }[case.name]
    yield make(case, sizes, device, variants)


def _scene(sizes: Mapping[str, int], device: torch.device) -> FlatScene:
    stored = torch.uint16 if sizes["C"] > 1 else torch.float32
    return flat_scene([(sizes["H"], sizes["W"])], sizes["C"], stored, device)


def _visible_noise(case: Case, sizes: Mapping[str, int], device: torch.device, variants: list[Variant]) -> Jobs:
    scene, dtype = _scene(sizes, device), getattr(torch, variants[0][1])
    batch, window, visible = sizes["B"], sizes["P"], sizes["V"]
    centres, steps = draw_centres([scene], batch), 1000
    schedule = torch.linspace(1.0, 0.1, steps, device=device)
    schedule = torch.stack([schedule, (1 - schedule**2).sqrt()], dim=1)
    rng = philox.rng_state(1, device=device)
    times = philox.uniform_integers(rng, philox.TIMESTEP, batch, steps)
    values = batch * visible * sizes["C"]
    moved = values * (scene.pixels.element_size() + dtype.itemsize) + batch * visible * 4
    jobs = Jobs(Work(bytes=moved, normals=values))
    draw = plain.torch_draw(window * window, visible, device)
    every = torch.arange(len(scene.pixels), device=device)
    normalised = reference.read_pixels(scene, every) if "plain" in dict(variants) else scene.pixels  # once, as a whole

    def eager() -> Any:
        whole = normalised[reference.pixel_indices(scene, centres, window)[0]]
        ids, eps = draw(0, batch, scene.channels)
        return plain.take_tokens(plain.add_noise(whole, eps, schedule[times]), ids).to(dtype), ids.int()

    for impl, name in variants:
        op = functools.partial(
            visible_noise,
            scene,
            centres,
            times,
            schedule,
            rng,
            window=window,
            visible=visible,
            out_dtype=dtype,
            impl=impl,
        )
        jobs.add((impl, name), functools.partial(_itself, eager if impl == "plain" else op), probe=True)
    return jobs


def _itself(call: Callable[[], Any]) -> Callable[[], Any]:
    return call


def _attention(impl: str, qkv: Tensor, mode: str) -> Callable[[], Any]:
    return backward(attention_call(impl, qkv.device), [qkv], mode)


def _masked_mse(case: Case, sizes: Mapping[str, int], device: torch.device, variants: list[Variant]) -> Jobs:
    scene, dtype = _scene(sizes, device), getattr(torch, variants[0][1])
    batch, tokens = sizes["B"], sizes["P"] ** 2
    centres, rng = draw_centres([scene], batch), philox.rng_state(1, device=device)
    ids = philox.visible_ids(rng, batch, tokens, sizes["V"], 0).int()
    prediction = torch.randn(batch, tokens, sizes["C"], device=device).to(dtype).requires_grad_(True)
    # The prediction and the target are read once, the gradient is written once.
    jobs = Jobs(Work(bytes=prediction.numel() * (2 * dtype.itemsize + scene.pixels.element_size())))
    for impl, name in variants:
        op = functools.partial(masked_mse, scene=scene, centres=centres, ids=ids, window=sizes["P"], impl=impl)
        jobs.add((impl, name), functools.partial(backward, op, [prediction], case.mode), probe=True)
    return jobs


def _contrastive(case: Case, sizes: Mapping[str, int], device: torch.device, variants: list[Variant]) -> Jobs:
    images, texts, width = sizes["N"], sizes["K"], sizes["D"]
    dtype = getattr(torch, variants[0][1])
    image = torch.randn(images, width, device=device).to(dtype).requires_grad_(True)
    text = torch.randn(texts, width, device=device).to(dtype).requires_grad_(True)
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    labels = torch.arange(images, device=device) % texts
    passes = 1 if case.mode == "fwd" else 3
    work = Work(2.0 * passes * images * texts * width, (images + texts) * width * dtype.itemsize * min(passes, 2))
    jobs = Jobs(work)
    eager = _chunked_pairs if images * texts > 1 << 28 else _repeated_pairs

    for impl, name in variants:
        leaves = [image, text, scale]
        if impl in PUBLISHED:
            call, leaves = published_loss(impl, device, 14.3), leaves_of(impl, *leaves)
        elif impl == "plain":
            call = functools.partial(eager, labels=labels)
        else:
            call = functools.partial(_op_contrastive, labels=labels, impl=impl)
        jobs.add((impl, name), functools.partial(backward, call, leaves, case.mode), probe=True)
    return jobs


def _op_contrastive(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor, impl: str) -> Tensor:
    return contrastive(image, text, labels, scale, impl=impl)


def _repeated_pairs(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    return plain.pairwise_loss(image, text[labels], scale)


def _chunked_pairs(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    """Eq. 16 over N pairs in eager torch with a block of rows in memory at a time, recomputed for the gradient."""
    from torch.utils.checkpoint import checkpoint

    unit_image, unit_text = (torch.nn.functional.normalize(x.float(), dim=1).to(x.dtype) for x in (image, text))

    def half(rows: Tensor, others: Tensor, own: Tensor) -> Tensor:
        scores = scale * (rows @ others.T).float()
        return torch.nn.functional.cross_entropy(scores, own, reduction="sum")

    total = torch.zeros((), device=image.device)
    for first in range(0, len(image), CHUNK_ROWS):
        part = slice(first, first + CHUNK_ROWS)
        for rows, others in ((unit_image[part], unit_text), (unit_text[part], unit_image)):
            total = total + checkpoint(half, rows, others, labels[part], use_reentrant=False)
    return total / (2 * len(image))


def _short_attention(case: Case, sizes: Mapping[str, int], device: torch.device, variants: list[Variant]) -> Jobs:
    shape, dtype = (sizes["B"], sizes["L"], sizes["H"], sizes["E"]), getattr(torch, variants[0][1])
    # As the model has them: one projection, and one gradient of it.
    packed = torch.randn(shape[0], shape[1], 3, *shape[2:], device=device).to(dtype).requires_grad_(True)
    passes = 3 if case.mode == "fwd+bwd" else 1
    flops = passes * 4.0 * shape[0] * shape[2] * shape[1] ** 2 * shape[3]
    # Forward: q, k, v in, the output out. Backward: those and the output's gradient in, three gradients out.
    tensors = 4 if passes == 1 else 12
    jobs = Jobs(Work(flops, tensors * math.prod(shape) * dtype.itemsize))
    for impl, name in variants:
        jobs.add((impl, name), functools.partial(_attention, impl, packed, case.mode), probe=True)
    return jobs


def _linear(case: Case, sizes: Mapping[str, int], device: torch.device, variants: list[Variant]) -> Jobs:
    rows, inside, outside = sizes["R"], sizes["I"], sizes["O"]
    dtype = getattr(torch, variants[0][1])
    shapes = ((rows, inside), (outside, inside), (outside,))
    x, weight, bias = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    leaves = [x.detach().to(dtype).requires_grad_(True), weight, bias]  # as autocast reads them
    backwards = case.mode == "fwd+bwd"
    # Forward: x and weight in, the output out. Backward: these and the output's gradient in, two gradients out.
    moved = (rows * inside + rows * outside) * dtype.itemsize + inside * outside * 4
    jobs = Jobs(Work(2.0 * (3 if backwards else 1) * rows * inside * outside, (3 if backwards else 1) * moved))

    def run(impl: str, *args: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return linear(*args, impl=impl)

    for impl, name in variants:
        jobs.add((impl, name), functools.partial(backward, functools.partial(run, impl), leaves, case.mode), probe=True)
    return jobs


def _gelu(case: Case, sizes: Mapping[str, int], device: torch.device, variants: list[Variant]) -> Jobs:
    dtype = getattr(torch, variants[0][1])
    x = torch.randn(sizes["R"], sizes["W"], device=device).to(dtype).requires_grad_(True)
    # Forward: x in, the output out. Backward: x and the output's gradient in, one gradient out.
    jobs = Jobs(Work(bytes=(2 if case.mode == "fwd" else 5) * x.numel() * dtype.itemsize))
    for impl, name in variants:
        op = functools.partial(gelu, impl=impl)
        jobs.add((impl, name), functools.partial(backward, op, [x], case.mode), probe=True)
    return jobs


def _residual_norm(case: Case, sizes: Mapping[str, int], device: torch.device, variants: list[Variant]) -> Jobs:
    """A float32 stream, to which a layer's output is added, and its normed rows, both in the dtype of the case."""
    shape, dtype = (sizes["R"], sizes["W"]), getattr(torch, variants[0][1])
    x, weight, bias = (torch.randn(s, device=device, requires_grad=True) for s in (shape, shape[1:], shape[1:]))
    delta = torch.randn(shape, device=device).to(dtype).requires_grad_(True)
    # Forward: stream and addition in, stream and normed rows out. Backward: the stream and two gradients in, two out.
    wide, narrow = (2, 2) if case.mode == "fwd" else (5, 4)
    jobs = Jobs(Work(bytes=x.numel() * (wide * 4 + narrow * dtype.itemsize)))
    for impl, name in variants:
        op = functools.partial(residual_norm, out_dtype=dtype, impl=impl)
        jobs.add((impl, name), functools.partial(backward, op, [x, delta, weight, bias], case.mode), probe=True)
    return jobs
