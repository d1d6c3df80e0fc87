"""The same run, computed four ways: ``python -m bench.loss_curves flc`` (or ``umd``) at the paper's shapes.

Plain code and the engine, each in float32 and under bfloat16 autocast, take the same steps on the same weights,
windows, masks and noise. Printed are the losses on the way, and how far each curve is from plain float32 as a share of
the first loss: the largest difference so far.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

LEARNING_RATE = 3e-4
CURVES = tuple((kind, dtype) for kind in ("plain", "engine") for dtype in ("float32", "bfloat16"))


def engine_losses(setup: Any, steps: int) -> list[float]:
    """Losses of ``steps`` optimiser steps of the engine; ``setup`` as ``umd_setup`` and ``flc_setup`` make it."""
    from fastdiffclip.train.steps import take_steps

    taken = take_steps(setup.step, setup.engine, lambda step: LEARNING_RATE, steps)
    losses: list[float] = []
    for number in range(steps):  # on CUDA the first few one by one, then as a graph
        losses += taken.advance(number)
    return losses + taken.settle()


def plain_losses(setup: Any, steps: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """Losses of ``steps`` optimiser steps of the plain code, under autocast unless ``dtype`` is float32."""
    from fastdiffclip.train.loop import adam

    optimiser = adam(setup.plain.model, LEARNING_RATE, setup.step.config.umd.weight_decay)
    device, losses = next(setup.plain.model.parameters()).device, []
    for number in range(steps):
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32):
            loss = setup.plain_loss(number)
        loss.backward()
        losses.append(float(loss.detach()))
        optimiser.step()
    return losses


def curve(stage: str, kind: str, dtype: str, steps: int, batch: int, samples: int, seed: int) -> list[float]:
    """One of the four curves, from weights, data and masks that all four share; ``seed`` of order, masks and noise."""
    from fastdiffclip.bench.setups import Sizes, flc_setup, umd_setup
    from fastdiffclip.runtime import Compute

    sizes = replace(Sizes(), umd_batch=batch, flc_batch=batch)
    precision = getattr(torch, dtype)
    where = Compute(torch.device("cpu"), precision if kind == "engine" else torch.float32)
    setup = (umd_setup if stage == "umd" else flc_setup)(sizes, where, samples=samples, seed=seed)
    if kind == "plain":
        return plain_losses(setup, steps, precision)
    setup.plain = None  # type: ignore[assignment]
    return engine_losses(setup, steps)


def far(losses: list[float], plain: list[float]) -> list[float]:
    """Largest difference so far at each step, as a share of the first loss."""
    apart = torch.tensor(losses, dtype=torch.float64) - torch.tensor(plain, dtype=torch.float64)
    return (apart.abs().cummax(0).values / plain[0]).tolist()


def main(arguments: list[str] | None = None) -> int:
    """Compute, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.loss_curves", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", choices=("umd", "flc"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64, help="windows in all; a step has BATCH of them")
    parser.add_argument("--seed", type=int, default=3, help="of order, masks and noise")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON of all losses; curves that stand in it are not computed again")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    settings = {name: getattr(given, name) for name in ("stage", "steps", "batch", "samples", "seed")}
    found: dict[str, Any] = {"settings": settings, "losses": {}}
    if given.out is not None and given.out.exists():
        kept = json.loads(given.out.read_text(encoding="utf-8"))
        found = kept if kept["settings"] == settings else found
    for kind, dtype in CURVES:
        name = f"{kind} {dtype}"
        if name not in found["losses"]:
            found["losses"][name] = curve(given.stage, kind, dtype, given.steps, given.batch, given.samples, given.seed)
        if given.out is not None:
            given.out.write_text(json.dumps(found) + "\n", encoding="utf-8")
        print(name, "done", file=sys.stderr, flush=True)
    marks = sorted({max(1, given.steps * tenth // 10) for tenth in range(1, 11)})
    plain = found["losses"]["plain float32"]
    print("| step | " + " | ".join(map(str, marks)) + " |\n" + "| --- " * (len(marks) + 1) + "|")
    for name, losses in found["losses"].items():
        print(f"| loss, {name} | " + " | ".join(f"{losses[mark - 1]:.3f}" for mark in marks) + " |")
    for name, losses in list(found["losses"].items())[1:]:
        apart = far(losses, plain)
        print(f"| apart, {name} | " + " | ".join(f"{apart[mark - 1]:.1e}" for mark in marks) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
