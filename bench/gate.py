"""The correctness gate: nothing is timed that does not agree with the truth, in float64 where it is arithmetic.

Rule for an op: |op - truth| <= |eager torch in the same dtype - truth| + tolerance. The reference is the eager code of
most ops, so it is held to the tolerance of its dtype alone. All gates run on small, awkward shapes: several scenes,
odd sizes, invalid pixels, padding rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiffclip.bench import plain
from fastdiffclip.bench.published import PUBLISHED, leaves_of, published_loss
from fastdiffclip.bench.setups import SkipCase, draw_centres, flat_scene, without_paths
from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import (
    contrastive,
    gelu,
    linear,
    masked_mse,
    philox,
    residual_norm,
    short_attention_packed,
    visible_noise,
)

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # of the reference, relative to the largest true value
SLACK = {"float32": 1e-6, "bfloat16": 2e-3}  # what another order of sums may add to eager's error
Attend = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Verdict:
    """One implementation of one case: its largest error and the bound, relative to the largest true value."""

    case: str
    impl: str
    device: str
    dtype: str
    error: float
    bound: float
    note: str = ""

    @property
    def green(self) -> bool:
        """Whether it may be timed. An error that is not a number is red."""
        return self.error <= self.bound

    @property
    def why_red(self) -> str:
        """One line for the report."""
        return self.note or f"error {self.error:.3g}, allowed {self.bound:.3g}"

    def as_row(self) -> dict[str, Any]:
        """The verdict as the JSON holds it; the error is null where it is no finite number."""
        return {**asdict(self), "error": self.error if math.isfinite(self.error) else None, "green": self.green}


class Gate:
    """Asks each question once and keeps the answer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.verdicts: dict[tuple[str, str, str], Verdict] = {}

    def admit(self, case: str, impl: str, dtype: str) -> Verdict:
        """Judge ``impl`` of ``case`` in ``dtype``. Raises :class:`SkipCase` where it cannot run here."""
        key = (case, impl, dtype)
        if key not in self.verdicts:
            self.verdicts[key] = Verdict(case, impl, self.device.type, dtype, *self._judge(case, impl, dtype))
        return self.verdicts[key]

    def _judge(self, case: str, impl: str, dtype: str) -> tuple[float, float, str]:
        from fastdiffclip.bench.gate_jobs import JOBS

        try:
            return (*(OPS | JOBS)[case](impl, dtype, self.device), "")
        except (UsageError, NotImplementedError) as error:
            raise SkipCase(str(error).strip().splitlines()[0]) from None
        except (SkipCase, ModuleNotFoundError):
            raise
        except Exception as error:  # whatever a kernel dies of, it is red, and the others still get their turn
            return math.inf, 0.0, without_paths(f"{type(error).__name__}: {str(error).strip()[:300]}")


def relative(values: list[Tensor], truths: list[Tensor]) -> float:
    """Largest difference over all tensors, each relative to the largest value of its truth."""
    worst = 0.0
    for value, truth in zip(values, truths, strict=True):
        scale = float(truth.abs().max().clamp(min=1e-30))
        error = float((value.double().cpu() - truth).abs().max()) / scale
        worst = error if not error <= worst else worst  # a NaN stays
    return worst


def with_gradients(call: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """Output of ``call`` and gradients of its sum, weighted by fixed numbers."""
    leaves = tuple(leaf.detach().clone().requires_grad_(True) for leaf in leaves)
    out = call(*leaves)
    weight = torch.linspace(-1.0, 1.5, out.numel(), dtype=torch.float64).reshape(out.shape)
    grads = torch.autograd.grad(out, leaves, weight.to(out))
    return [out.detach(), *grads]


def _random(*shape: int, dtype: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(getattr(torch, dtype))


def gate_visible_noise(impl: str, dtype: str, device: torch.device) -> tuple[float, float]:
    """Ids equal bit by bit; values within 1e-6 of the noise, a few roundings of float32 and one of the output."""
    if impl == "plain":
        return 0.0, 0.0  # its masks and noise are torch's own; the arithmetic is judged with umd_step
    worst = 0.0
    for channels, stored in ((13, torch.uint16), (1, torch.float32), (144, torch.int16)):
        scene = flat_scene([(5, 7), (1, 9), (12, 4)], channels, stored, torch.device("cpu"), invalid=0.25)
        centres, window, visible, rows = draw_centres([scene], 21), 5, 8, 20
        schedule, rng = (
            torch.rand(50, 2, generator=torch.Generator().manual_seed(0)),
            philox.rng_state(7, 3, 100),
        )
        times = philox.uniform_integers(rng, philox.TIMESTEP, 21, 50)
        ids = philox.visible_ids(rng, 21, window * window, visible, 2)
        eps = philox.normals(rng, ids, channels, 2).double()
        clean = plain.take_tokens(plain.build_windows(plain.cubes(scene, window), centres.numpy())[0].double(), ids)
        mix = schedule[times].double()[:, :, None, None]
        truth = mix[:, 0] * clean + mix[:, 1] * eps
        bound = 1e-6 * eps.abs().clamp(min=1.0) + 2.0**-21 * (mix[:, 0] * clean.abs() + 1.0)
        bound = bound + (2.0**-8 if dtype == "bfloat16" else 0.0) * truth.abs()
        there = [t.to(device) for t in (centres, times, schedule, rng, torch.tensor(rows))]
        x, found = visible_noise(
            _moved(scene, device), there[0], there[1], there[2], there[3], window=window, visible=visible, modality=2,
            valid_rows=there[4], out_dtype=getattr(torch, dtype), impl=impl,
        )  # fmt: skip
        if not torch.equal(found.cpu().long()[:rows], ids[:rows]) or x[rows:].abs().max() != 0:
            return float("inf"), 1.0
        error = float(((x.cpu().double() - truth).abs() / bound)[:rows].max())
        worst = error if not error <= worst else worst
    return worst, 1.0


def _moved(scene: Any, device: torch.device) -> Any:
    valid = None if scene.valid is None else scene.valid.to(device)
    parts = (scene.pixels.to(device), scene.scale.to(device), scene.offset.to(device))
    return type(scene)(*parts, valid, scene.extents.to(device))


def gate_masked_mse(impl: str, dtype: str, device: torch.device) -> tuple[float, float]:
    """Loss and gradient of the prediction, padding rows and a foreign divisor included."""
    window, rows, batch, weights = 5, 20, 21, (1.3, 0.4)
    scene = flat_scene([(5, 7), (1, 9), (12, 4)], 13, torch.uint16, torch.device("cpu"), invalid=0.25)
    centres = draw_centres([scene], batch)
    ids = philox.visible_ids(philox.rng_state(5), batch, window * window, 8, 0)
    prediction = _random(batch, window * window, 13, dtype=dtype, seed=2)
    clean, valid = plain.build_windows(plain.cubes(scene, window), centres.numpy())

    def exact(p: Tensor) -> Tensor:
        part = slice(0, rows)
        return plain.restoration_loss(p[part], clean[part].double(), valid[part], ids[part], weights) * rows / 33

    def op(p: Tensor, name: str) -> Tensor:
        return masked_mse(
            p, _moved(scene, device), centres.to(device), ids.int().to(device), window=window,
            masked_weight=weights[0], visible_weight=weights[1], valid_rows=torch.tensor(rows, device=device),
            total_rows=torch.tensor(33, device=device), impl=name,
        )  # fmt: skip

    truth = with_gradients(exact, prediction.double())
    return _against_eager(truth, lambda name: with_gradients(lambda p: op(p, name), prediction.to(device)), impl, dtype)


def _against_eager(
    truth: list[Tensor],
    run: Callable[[str], list[Tensor]],
    impl: str,
    dtype: str,
    eager: tuple[str, ...] = ("reference",),
    slack: float | None = None,
) -> tuple[float, float]:
    if impl in eager:
        return relative(run(impl), truth), TOLERANCE[dtype]
    slack = SLACK[dtype] if slack is None else slack
    return relative(run(impl), truth), max(relative(run(name), truth) for name in eager) + slack


def gate_contrastive(impl: str, dtype: str, device: torch.device) -> tuple[float, float]:
    """Both targets, loss and the gradients of images, texts and logit scale, against N x N pairs in float64."""
    if impl in PUBLISHED:
        return _gate_published(impl, dtype, device)
    if impl == "plain":
        dtype = "float32"  # its logits are rounded to bfloat16 there; at scale 100 that is 18 % of a gradient
    cases = [((29, 33, 7, 24), *how) for how in (("pairwise", 14.3), ("class", 3.0), ("pairwise", 100.0))]
    if impl == "triton":  # the kernels of larger batches
        cases.append(((190, 200, 150, 72), "pairwise", 100.0))
    if impl == "triton" and device.type == "cuda":  # so many texts, then images, that sums run over several blocks
        cases += [((190, 200, 8300, 24), "pairwise", 14.3), ((16450, 16500, 130, 24), "class", 14.3)]
    found = [_judge_contrastive(impl, dtype, device, *case) for case in cases]
    return max(found, key=lambda pair: float("inf") if pair[0] != pair[0] else pair[0] / pair[1])


def _judge_contrastive(
    impl: str, dtype: str, device: torch.device, sizes: tuple[int, int, int, int], targets: str, scale: float
) -> tuple[float, float]:
    rows, images, texts, width = sizes
    image, text = _random(images, width, dtype=dtype, seed=1), _random(texts, width, dtype=dtype, seed=2)
    labels = torch.arange(images) ** 2 % (texts - 2)  # the last texts have no image
    exact = functools.partial(_pairs, labels=labels[:rows], rows=rows, targets=targets)
    truth = with_gradients(exact, image.double(), text.double(), torch.tensor(scale, dtype=torch.float64))

    def run(name: str) -> list[Tensor]:
        there = [t.to(device) for t in (image, text, torch.tensor(scale))]
        if name == "plain":
            pairs = functools.partial(_pairs, labels=labels[:rows].to(device), rows=rows, targets=targets)
            return with_gradients(pairs, *there)
        count = torch.tensor(rows, device=device)
        op = functools.partial(contrastive, targets=targets, valid_rows=count, impl=name)
        return with_gradients(lambda z, t, s: op(z, t, labels.to(device), s), *there)

    # One more rounding of the largest score is an error of its weight.
    return _against_eager(truth, run, impl, dtype, ("reference", "plain"), max(SLACK[dtype], 2.0**-24 * scale))


def _gate_published(impl: str, dtype: str, device: torch.device) -> tuple[float, float]:
    """Pairs at an ordinary scale: one package multiplies in TF32, the other rounds unit vectors to ``dtype``."""
    loss, scale = published_loss(impl, device, 14.3), torch.tensor(14.3)
    image, text = (_random(200, 64, dtype=dtype, seed=seed) for seed in (1, 2))
    truth = with_gradients(plain.pairwise_loss, image.double(), text.double(), scale.double())
    there = leaves_of(impl, *(x.to(device) for x in (image, text, scale)))
    found = with_gradients(loss, *there)
    return relative(found, truth[: len(found)]), TOLERANCE["bfloat16"]


def _pairs(image: Tensor, text: Tensor, scale: Tensor, *, labels: Tensor, rows: int, targets: str) -> Tensor:
    """Eq. 16 over N pairs, or the class form written out class by class."""
    if targets == "pairwise":
        return plain.pairwise_loss(image[:rows], text[labels], scale)
    scores = scale * F.normalize(image[:rows], dim=1) @ F.normalize(text, dim=1).T
    columns = [F.log_softmax(scores[:, k], dim=0)[labels == k].mean() for k in labels.unique()]
    return 0.5 * (F.cross_entropy(scores, labels) - torch.stack(columns).mean())


def gate_short_attention(impl: str, dtype: str, device: torch.device) -> tuple[float, float]:
    """Output and the gradients of q, k, v at both lengths of the model; with padding where the backend knows it."""
    found = []
    for length, width, padded in ((37, 16, False), (122, 16, False), (5, 8, True), (50, 64, False)):
        qkv = _random(3, length, 3, 2, width, dtype=dtype, seed=1)
        if padded and impl in ATTENTION:
            continue
        lengths = torch.tensor([length, 1, length - 2]) if padded else None

        def run(attend: Attend, packed: Tensor) -> list[Tensor]:
            out, grad = with_gradients(attend, packed)
            return [out, *grad.unbind(2)]

        def of(name: str, packed: Tensor = qkv, n: Tensor | None = lengths) -> list[Tensor]:
            there = None if n is None else n.to(device)
            return run(attention_call(name, device, there), packed.to(device))

        truth = run(functools.partial(_attend, lengths=lengths), qkv.double())
        found.append(_against_eager(truth, of, impl, dtype, ("reference",) if padded else ("reference", "sdpa")))
    return max(found, key=lambda pair: float("inf") if pair[0] != pair[0] else pair[0] / pair[1])


def _attend(qkv: Tensor, lengths: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, each sequence cut to its length."""
    q, k, v = qkv.unbind(2)
    scores = torch.einsum("blhe,bmhe->bhlm", q, k) / math.sqrt(q.shape[-1])
    if lengths is not None:
        padding = torch.arange(k.shape[1]) >= lengths[:, None]
        scores = scores.masked_fill(padding[:, None, None, :], -math.inf)
    return torch.einsum("bhlm,bmhe->blhe", scores.softmax(dim=-1), v)


ATTENTION = ("sdpa", "xformers")


def attention_call(impl: str, device: torch.device, lengths: Tensor | None = None) -> Attend:
    """Self-attention of the model's packed projection ``(B, L, 3, H, E)``, as each implementation is called there.

    torch's and xformers' take its three parts, whose gradients autograd puts together again; an implementation of
    ``short_attention`` takes the whole.
    """
    if impl == "sdpa":

        def sdpa(qkv: Tensor) -> Tensor:
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        return sdpa
    if impl == "xformers":
        from fastdiffclip.model.attention import xformers_attention, xformers_unavailable

        reason = xformers_unavailable(device.type)
        if reason:
            raise SkipCase(f"xformers is not used: {reason}")
        return lambda qkv: xformers_attention(*qkv.unbind(2))
    return functools.partial(short_attention_packed, lengths=lengths, impl=impl)


def gate_linear(impl: str, dtype: str, device: torch.device) -> tuple[float, float]:
    """Output and the gradients of x, weight and bias, at sizes that fill no tile, and without a bias.

    In bfloat16 as autocast has it: weights are stored in float32, here with values that need no rounding.
    """
    half = dtype == "bfloat16"
    found = []
    odd = 0 if half else 1  # its native product takes even numbers of features
    for rows, inside, outside, biased in (
        (37, 144 + odd, 128, True),
        (131, 128, 384, True),
        (5, 6 + odd, 4 - odd, False),
    ):
        leaves = [_random(3, rows, inside, dtype=dtype, seed=1), _random(outside, inside, dtype=dtype, seed=2).float()]
        leaves += [_random(outside, dtype=dtype, seed=3).float()] if biased else []
        truth = with_gradients(_product, *(leaf.double() for leaf in leaves))

        def run(name: str, there: tuple[Tensor, ...] = tuple(leaf.to(device) for leaf in leaves)) -> list[Tensor]:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                return with_gradients(functools.partial(linear, impl=name), *there)

        found.append(_against_eager(truth, run, impl, dtype))
    return max(found, key=lambda pair: float("inf") if pair[0] != pair[0] else pair[0] / pair[1])


def _product(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
    """x W^T + b, as a sum over features."""
    return torch.einsum("brk,nk->brn", x, weight) + sum(bias)


def gate_gelu(impl: str, dtype: str, device: torch.device) -> tuple[float, float]:
    """Output and gradient, from where it is 0 to where it is x, at a size that fills no register."""
    x = torch.linspace(-8.0, 8.0, 4001).to(getattr(torch, dtype))
    truth = with_gradients(lambda v: v * (1 + torch.erf(v / math.sqrt(2))) / 2, x.double())
    return _against_eager(truth, lambda name: with_gradients(lambda v: gelu(v, impl=name), x.to(device)), impl, dtype)


def gate_residual_norm(impl: str, dtype: str, device: torch.device) -> tuple[float, float]:
    """Stream, normed rows and the four gradients; addition and normed rows are of ``dtype``, the rest float32."""
    found = []
    for rows, width in ((37, 128), (70, 24)):
        leaves = [_random(3, rows, width, dtype="float32", seed=1), _random(3, rows, width, dtype=dtype, seed=2)]
        leaves += [_random(width, dtype="float32", seed=seed) for seed in (3, 4)]
        truth = with_gradients(_stream_and_normed, *(leaf.double() for leaf in leaves))

        def run(name: str, there: tuple[Tensor, ...] = tuple(leaf.to(device) for leaf in leaves)) -> list[Tensor]:
            def both(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return torch.cat(residual_norm(x, delta, weight, bias, out_dtype=delta.dtype, impl=name))

            return with_gradients(both, *there)

        found.append(_against_eager(truth, run, impl, dtype))
    return max(found, key=lambda pair: float("inf") if pair[0] != pair[0] else pair[0] / pair[1])


def _stream_and_normed(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    stream = x + delta
    away = stream - stream.mean(-1, keepdim=True)
    normed = away / (away.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    return torch.cat([stream, normed])


OPS: dict[str, Callable[[str, str, torch.device], tuple[float, float]]] = {
    "visible_noise": gate_visible_noise,
    "masked_mse": gate_masked_mse,
    "contrastive": gate_contrastive,
    "short_attention": gate_short_attention,
    "linear": gate_linear,
    "gelu": gate_gelu,
    "residual_norm": gate_residual_norm,
}
