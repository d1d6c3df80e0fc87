"""The plain implementation computes what the engine computes: same masks and noise, same loss, same gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdiffclip.bench import op_jobs, plain
from fastdiffclip.bench.jobs import predict_setup
from fastdiffclip.bench.setups import Sizes, count_flops, draw_centres, flat_scene, flc_setup, umd_setup
from fastdiffclip.kernels import reference
from fastdiffclip.runtime import Compute

CPU = torch.device("cpu")
FP32 = Compute(CPU, torch.float32)


def assert_same_gradients(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5 * float(b.grad.abs().max()) + 1e-8, msg=name)


@pytest.mark.parametrize("number", [0, 1])  # a full batch, and the short one at the end of the epoch
def test_umd_step_gives_the_loss_of_the_engine(number: int) -> None:
    setup = umd_setup(Sizes.small(), FP32, samples=17, invalid=0.2, micro_batch=5)
    loss = setup.plain_loss(number)
    loss.backward()
    assert setup.engine_loss(number) == pytest.approx(float(loss.detach()), rel=2e-6)
    assert_same_gradients(setup.engine.model, setup.plain.model)


def test_umd_step_has_another_loss_with_other_masks_and_noise() -> None:
    setup = umd_setup(Sizes.small(), FP32)
    shared, own = (float(setup.plain_loss(0, rng_draw=shared).detach()) for shared in (True, False))
    assert own != pytest.approx(shared, rel=1e-4)
    assert own == pytest.approx(shared, rel=0.5)


@pytest.mark.parametrize("number", [0, 1])
def test_flc_step_gives_the_loss_of_the_engine(number: int) -> None:
    setup = flc_setup(Sizes.small(), FP32, samples=17, invalid=0.2)
    loss = setup.plain_loss(number)
    loss.backward()
    assert setup.engine_loss(number) == pytest.approx(float(loss.detach()), rel=2e-6)
    assert_same_gradients(setup.engine.model, setup.plain.model)


def test_prediction_agrees_pixel_by_pixel() -> None:
    with predict_setup(Sizes.small(side=9), CPU, "float32", invalid=0.2) as setup:
        engine, slow = setup.engine_probabilities(), setup.plain_probabilities()
        assert 20 < len(slow) < 81
        np.testing.assert_allclose(engine, slow, atol=1e-5)
        np.testing.assert_array_equal(setup.engine().class_map, setup.plain_map())


def test_windows_follow_the_edge_rule() -> None:
    scene = flat_scene([(4, 6), (1, 3)], 3, torch.uint16, CPU, invalid=0.3)
    centres = draw_centres([scene], 30)
    values, valid = plain.build_windows(plain.cubes(scene, 5), centres.numpy())
    index, known = reference.pixel_indices(scene, centres, 5)
    assert torch.equal(valid, known)
    torch.testing.assert_close(values, reference.read_pixels(scene, index))


def test_flops_of_the_paper_shapes() -> None:
    """84 GFLOP a step and 337 MFLOP a pixel, as counted by hand; UMD without the gradient of its inputs."""
    sizes = Sizes(umd_batch=2, flc_batch=2, side=12)
    flc = flc_setup(sizes, FP32)
    assert count_flops(lambda: flc.plain_loss(0).backward()) * 32 == pytest.approx(84e9, rel=0.01)
    with torch.no_grad():
        pixel = count_flops(lambda: plain.embed_images(flc.plain.model, flc.plain.scenes, flc.centres, CPU)) / 2
    assert pixel == pytest.approx(337e6, rel=0.01)
    umd = umd_setup(sizes, FP32)
    assert count_flops(lambda: umd.plain_loss(0).backward()) * 128 == pytest.approx(266e9, rel=0.01)


def test_chunked_eager_loss_is_the_pairwise_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_jobs, "CHUNK_ROWS", 4)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(11, 6, generator=generator, requires_grad=True) for _ in range(2)]
    scale, own = torch.tensor(14.3, requires_grad=True), torch.arange(11)
    chunked = op_jobs._chunked_pairs(*leaves, scale, own)
    whole = plain.pairwise_loss(*leaves, scale)
    torch.testing.assert_close(chunked, whole)
    for a, b in zip(*(torch.autograd.grad(loss, [*leaves, scale]) for loss in (chunked, whole)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
