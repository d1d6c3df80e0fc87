"""The gate of whole steps, prediction and scene access: the engine against the plain implementation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fastdiffclip.bench import plain
from fastdiffclip.bench.setups import (
    FlcSetup,
    Sizes,
    UmdSetup,
    draw_centres,
    flat_scene,
    flc_setup,
    umd_setup,
)

# Relative to the plain loss in float32; gradients to the largest gradient of their tensor.
LOSS = {"float32": 1e-5, "bfloat16": 2e-2}
PROBABILITY = {"float32": 1e-4, "bfloat16": 5e-2}


def _step_error(setup: UmdSetup | FlcSetup, dtype: str) -> float:
    """Largest relative error of the losses of four steps, a short batch among them; in float32 of gradients too."""
    worst = 0.0
    for number in range(4):
        setup.engine.zero()
        setup.plain.model.zero_grad()
        found, truth = setup.engine_loss(number), setup.plain_loss(number)
        truth.backward()
        expected = float(truth.detach())
        worst = max(worst, abs(found - expected) / abs(expected) if found == found else float("inf"))
        if dtype == "float32":
            for ours, theirs in zip(setup.engine.model.parameters(), setup.plain.model.parameters(), strict=True):
                assert ours.grad is not None and theirs.grad is not None
                scale = float(theirs.grad.abs().max().clamp(min=1e-6))
                # Gradients pass through more roundings than the loss: a tenth of their error counts.
                worst = max(worst, 0.1 * float((ours.grad.cpu() - theirs.grad.cpu()).abs().max()) / scale)
    return worst


def gate_umd_step(impl: str, dtype: str, device: torch.device) -> tuple[float, float]:
    """Loss and gradients on the engine's masks and noise; the plain one runs on the CPU in float32."""
    from fastdiffclip.runtime import Compute

    where = Compute(device, getattr(torch, dtype))
    setup = umd_setup(Sizes.small(), where, torch.device("cpu"), samples=17, invalid=0.2, micro_batch=5)
    return _step_error(setup, dtype), LOSS[dtype]


def gate_flc_step(impl: str, dtype: str, device: torch.device) -> tuple[float, float]:
    """Loss and gradients on the engine's batches; K texts against N texts."""
    from fastdiffclip.runtime import Compute

    where = Compute(device, getattr(torch, dtype))
    return _step_error(flc_setup(Sizes.small(), where, torch.device("cpu"), samples=17, invalid=0.2), dtype), LOSS[
        dtype
    ]


def gate_umd_step_fed(impl: str, dtype: str, device: torch.device) -> tuple[float, float]:
    """Losses of steps over more than an epoch: the same numbers, wherever the windows come from."""
    from fastdiffclip.bench.jobs import fed_step, scene_on_disk
    from fastdiffclip.runtime import Compute

    sizes, losses = Sizes.small(side=40), []
    with scene_on_disk(sizes, invalid=0.2) as scene:
        for how in ("resident", impl):
            step = fed_step(scene, sizes, Compute(device, getattr(torch, dtype)), how)
            with step.data.feed(0, 6) as feed:
                assert (feed is None) == (how == "resident")
                for number in range(6):
                    if feed is not None:
                        feed.load(number)
                    losses.append(float(step(torch.tensor(number, device=device)).detach()))
    return (0.0 if losses[:6] == losses[6:] else float("inf")), 0.0


def gate_predict(impl: str, dtype: str, device: torch.device) -> tuple[float, float]:
    """Class probabilities of every pixel of a small scene on disk, edges and invalid pixels included."""
    from fastdiffclip.bench.jobs import predict_setup

    with predict_setup(Sizes.small(side=11), device, dtype, invalid=0.2) as setup:
        engine, truth = setup.engine_probabilities(), setup.plain_probabilities()
    return float(np.abs(engine - truth).max()), PROBABILITY[dtype]


def gate_scene_read(impl: str, dtype: str, device: torch.device) -> tuple[float, float]:
    """What is read is what was written."""
    from fastdiffclip.bench.jobs import read_blocks, read_plain, stored_scene

    with stored_scene(37, 23, 5) as (scene, pixels):
        found = read_blocks(scene) if impl == "engine" else read_plain(scene)
        return (0.0 if np.array_equal(found, pixels) else float("inf")), 0.0


def gate_window_gather(impl: str, dtype: str, device: torch.device) -> tuple[float, float]:
    """Windows across edges and invalid pixels, against one sliced at a time."""
    from fastdiffclip.bench.jobs import prepared
    from fastdiffclip.scene.windows import gather_windows

    flat = flat_scene([(5, 7), (1, 9), (12, 4)], 13, torch.uint16, torch.device("cpu"), invalid=0.25)
    centres = draw_centres([flat], 40).numpy()
    truth = plain.build_windows(plain.cubes(flat, 5), centres)[0].numpy()
    modality, extents = prepared(flat)
    found = truth if impl == "plain" else gather_windows(modality, extents, centres, 5)
    return float(np.abs(found - truth).max()), 1e-6


def gate_front_end(impl: str, dtype: str, device: torch.device) -> tuple[float, float]:
    """Components prepared block by block are those of the whole scene, and their variances average 1."""
    from fastdiffclip.bench.jobs import stored_scene
    from fastdiffclip.scene.prepare import fit_front_end, prepare_scenes

    with stored_scene(83, 41, 17) as (scene, pixels):
        front_end = fit_front_end("mnf", [scene], 17)
        found = prepare_scenes([scene], front_end).modalities["hsi"]
        truth = front_end.apply("hsi", pixels, np.ones(pixels.shape[:2], bool)).reshape(found.pixels.shape)
    spread = abs(float(found.pixels.var(axis=0).mean()) - 1.0)
    return max(float(np.abs(found.pixels * found.scale + found.offset - truth).max()), 1e-3 * spread), 1e-5


def gate_draw(impl: str, dtype: str, device: torch.device) -> tuple[float, float]:
    """Windows drawn from a scene in memory and from the disk are the same, and those of the scene."""
    from fastdiffclip.bench.jobs import stored_scene
    from fastdiffclip.scene.prepare import fit_front_end
    from fastdiffclip.train.data import umd_data

    with stored_scene(29, 31, 6) as (scene, _):
        front_end = fit_front_end("standard", [scene])
        held, read = (umd_data([scene], front_end, 50, 5, 3, budget, torch.device("cpu")) for budget in (1 << 40, 0))
    ours, theirs = (
        plain.build_windows(plain.cubes(data.flat[0], 5), data.centres.numpy())[0].numpy() for data in (held, read)
    )
    distinct = len(np.unique(held.centres.numpy(), axis=0)) == 50
    return (0.0 if distinct and np.array_equal(ours, theirs) else float("inf")), 0.0


JOBS: dict[str, Callable[[str, str, torch.device], tuple[float, float]]] = {
    "umd_step": gate_umd_step,
    "flc_step": gate_flc_step,
    "umd_step_fed": gate_umd_step_fed,
    "predict": gate_predict,
    "scene_read": gate_scene_read,
    "window_gather": gate_window_gather,
    "fit_front_end": gate_front_end,
    "prepare": gate_front_end,
    "draw_from_memory": gate_draw,
    "draw_from_disk": gate_draw,
}
