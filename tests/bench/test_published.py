"""Contrastive losses from the package index: how they are called, and that they are left out where they cannot run."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastdiffclip.bench import gate, plain
from fastdiffclip.bench.cases import CASES
from fastdiffclip.bench.gate import Gate
from fastdiffclip.bench.published import PUBLISHED, leaves_of, published_loss
from fastdiffclip.bench.setups import SkipCase

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Memeff:
    """What the package's page says of its loss."""

    def __init__(self, temperature: float = 0.07, normalized_inputs: bool = False, stable: bool = True) -> None:
        assert not stable and not normalized_inputs
        self.temperature = temperature

    def __call__(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return plain.pairwise_loss(image, text, torch.tensor(1 / self.temperature))


def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
    """What the package's page says of its loss: one direction, image by image; the width is cut into heads."""
    assert q.shape[1] % head_dim == 0 and q.dtype == torch.float32
    return F.cross_entropy(scale * q @ k.T, torch.arange(len(q)), reduction="none")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "memeff", SimpleNamespace(MemoryEfficientCLIPLoss=Memeff))
    monkeypatch.setitem(sys.modules, "inf_cl", SimpleNamespace(cal_flash_loss=cal_flash_loss))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("impl", PUBLISHED)
@pytest.mark.parametrize("width", [16, 512])
def test_they_are_asked_for_eq_16(impl: str, width: int) -> None:
    given = [torch.randn(9, width).requires_grad_() for _ in range(2)] + [torch.tensor(14.3, requires_grad=True)]
    leaves = leaves_of(impl, *given)
    ours, truth = published_loss(impl, CUDA, 14.3)(*leaves), plain.pairwise_loss(*given)
    assert ours.shape == () and ours.item() == pytest.approx(truth.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(truth, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", PUBLISHED)
def test_without_the_package_or_a_gpu_they_are_left_out(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SkipCase, match=f"the kernels of {impl} need a CUDA device"):
        Gate(CPU).admit("contrastive", impl, "bfloat16")
    monkeypatch.setitem(sys.modules, impl.replace("-", "_"), None)
    with pytest.raises(ModuleNotFoundError) as missing:
        published_loss(impl, CUDA, 14.3)
    assert missing.value.name == impl.replace("-", "_")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("impl", PUBLISHED)
def test_they_are_judged_before_they_are_timed(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "published_loss", lambda name, device, scale: published_loss(name, CUDA, scale))
    assert Gate(CPU).admit("contrastive", impl, "bfloat16").green
    wrong = SimpleNamespace(
        cal_flash_loss=lambda q, k, scale, head_dim: cal_flash_loss(q, k, None, 0.9 * scale, head_dim)
    )
    monkeypatch.setitem(sys.modules, "inf_cl", wrong)
    monkeypatch.setattr(Memeff, "__call__", lambda self, image, text: (image @ text.T).logsumexp(1).mean())
    assert not Gate(CPU).admit("contrastive", impl, "bfloat16").green


def test_they_stand_beside_our_own_where_the_scores_would_not_fit() -> None:
    sizes = [case.sizes["N"] for case in CASES for impl, _ in case.variants if impl in PUBLISHED]
    assert sizes and min(sizes) == 65536
    assert all("cpu" not in case.devices for case in CASES for impl, _ in case.variants if impl in PUBLISHED)
