"""One script for any CUDA machine that has torch and triton, set up or not: is it right, and how fast is it?

Correctness of every implementation of every op on the device comes first, then 50 training steps of both stages against
plain code on the CPU, then the bench suites; what is red is not timed. Everything goes into one JSON. At most ten
minutes. ``python -m bench.gpu_check`` from a checkout; ``--cpu`` rehearses it on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

MINUTES = 10.0
STEPS, QUICK_STEPS = 50, 12
# Largest difference of a loss over the steps, as a share of the first loss: late losses of few windows come near 0.
STEP_BOUND = {"float32": 1e-3, "bfloat16": 3e-2}


def check(
    device: torch.device, quick: bool = False, minutes: float = MINUTES, out: Path | None = None
) -> dict[str, Any]:
    """Run all parts on ``device``; the result is written to ``out`` after each, so that a kill leaves what was found.

    Returns:
        ``{"machine", "ops", "gate", "training", "suites", "rows", "skipped", "floors", "seconds", "green", ...}``:
        ``ops`` says of each op which implementations run on the device and why the others do not, ``with_triton`` and
        ``without_triton`` name the ops by that; ``suites`` holds ``"done"`` or why a suite was not run.
    """
    from fastdiffclip.bench.measure import describe_machine
    from fastdiffclip.bench.setups import without_paths
    from fastdiffclip.kernels import implementations

    began = time.monotonic()
    known = implementations(device).items()
    ops = {op: {impl: without_paths(why) for impl, why in table.items()} for op, table in known}
    result: dict[str, Any] = {
        "machine": describe_machine(device, torch.get_num_threads()),
        "suite": "gpu-check",
        "quick": quick,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "ops": ops,
        "with_triton": sorted(op for op, table in ops.items() if "triton" in table),
        "without_triton": sorted(op for op, table in ops.items() if "triton" not in table),
        "rows": [], "gate": [], "training": [], "skipped": [], "floors": {}, "suites": {},
    }  # fmt: skip
    result["gate"], result["not_judged"] = judge(device)
    _note(result, began, out, f"ops: {sum(v['green'] for v in result['gate'])} of {len(result['gate'])} green")
    result["training"] = training(device, quick)
    steps = "; ".join(f"{t['stage']} {t['dtype']}: {t['verdict']}" for t in result["training"])
    _note(result, began, out, f"training steps: {steps}")
    for suite in ("kernels", "train", "infer", "io"):
        if (time.monotonic() - began) / 60 > 0.7 * minutes:
            result["suites"][suite] = f"not run: {0.7 * minutes:.0f} of {minutes:.0f} minutes were over"
        else:
            _add_suite(result, suite, device, quick)
        _note(result, began, out, f"suite {suite}: {result['suites'][suite]}")
    return result


def judge(device: torch.device) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Every registered implementation of every op, in both dtypes, against float64; and what cannot run here."""
    from fastdiffclip.bench.gate import ATTENTION, OPS, Gate
    from fastdiffclip.bench.setups import SkipCase, without_paths
    from fastdiffclip.kernels import implementations

    gate, missing, registered = Gate(device), [], implementations(device)
    for op in OPS:
        others = ATTENTION if op == "short_attention" else ()
        for impl in (*registered[op], *others):
            for dtype in ("float32", "bfloat16"):
                if impl == "triton" and device.type == "cpu":  # interpreted, its bfloat16 is cut off, not rounded
                    missing.append({"case": op, "impl": impl, "dtype": dtype, "reason": "needs a CUDA device"})
                    continue
                try:
                    gate.admit(op, impl, dtype)
                except SkipCase as skip:
                    missing.append({"case": op, "impl": impl, "dtype": dtype, "reason": without_paths(str(skip))})
    return [verdict.as_row() for verdict in gate.verdicts.values()], missing


def training(device: torch.device, quick: bool = False, steps: int | None = None) -> list[dict[str, Any]]:
    """``steps`` (50, or 12 when quick) of both stages on ``device``, in both dtypes, against plain code on the CPU."""
    from fastdiffclip.bench.loss_curves import engine_losses, plain_losses
    from fastdiffclip.bench.setups import Sizes, flc_setup, umd_setup
    from fastdiffclip.runtime import Compute

    sizes = Sizes.small() if quick else Sizes(bands=(48, 1), window=7, width=64, depth=2, decoder_depth=2, umd_batch=32,
                                              flc_batch=32, side=64)  # fmt: skip
    rows: list[dict[str, Any]] = []
    steps = steps or (QUICK_STEPS if quick else STEPS)
    for stage, make in (("umd", umd_setup), ("flc", flc_setup)):
        for dtype in ("float32", "bfloat16"):
            row: dict[str, Any] = {"stage": stage, "dtype": dtype, "device": device.type, "steps": steps}
            try:
                where = Compute(device, getattr(torch, dtype))
                setup = make(sizes, where, torch.device("cpu"), samples=3 * sizes.flc_batch - 5, invalid=0.1)
                ours, plain = engine_losses(setup, steps), plain_losses(setup, steps)
            except ModuleNotFoundError as error:
                row |= {"green": None, "verdict": f"not run: the package {error.name} is not installed"}
            else:
                row |= _compared(ours, plain, dtype)
            rows.append(row)
    return rows


def _compared(ours: list[float], plain: list[float], dtype: str) -> dict[str, Any]:
    differences = [abs(a - b) / plain[0] if a == a else float("inf") for a, b in zip(ours, plain, strict=True)]
    worst, bound = max(differences), STEP_BOUND[dtype]
    verdict = (
        f"losses agree to {worst:.2g} of the first" if worst <= bound else f"RED: {worst:.2g}, allowed {bound:.2g}"
    )
    return {
        "loss_first": ours[0],
        "loss_last": ours[-1],
        "plain_last": plain[-1],
        "largest_difference": worst,
        "bound": bound,
        "green": worst <= bound,
        "verdict": verdict,
    }


def _add_suite(result: dict[str, Any], suite: str, device: torch.device, quick: bool) -> None:
    from fastdiffclip.bench.runner import run

    found = run(suite, threads=torch.get_num_threads(), device=str(device), quick=quick)
    judged = {(v["case"], v["impl"], v["dtype"]) for v in result["gate"]}
    result["gate"] += [v for v in found["gate"] if (v["case"], v["impl"], v["dtype"]) not in judged]
    result["rows"] += found["rows"]
    result["skipped"] += found["skipped"]
    result["floors"] |= found["floors"]
    result["suites"][suite] = "done" if found["rows"] else "nothing of it runs on this device; see skipped"


def _note(result: dict[str, Any], began: float, out: Path | None, text: str) -> None:
    result["seconds"] = round(time.monotonic() - began, 1)
    right = [v["green"] for v in result["gate"]] + [t["green"] is not False for t in result["training"]]
    result["green"] = all(right)
    print(f"[{result['seconds']:6.1f} s] {text}", file=sys.stderr, flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when everything that ran is right, 1 when something is red, 4 without a CUDA device."""
    from fastdiffclip.bench.measure import describe_machine
    from fastdiffclip.bench.report import file_stem, render

    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="the JSON; bench/results/<device>-gpu-check-<date>.json when left out")
    parser.add_argument("--cpu", action="store_true", help="rehearse on the CPU, tiny shapes; no file without --out")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="no suite is begun after 70 %% of it")
    given = parser.parse_args(arguments)
    if not given.cpu and not torch.cuda.is_available():
        print("error: torch finds no CUDA device; --cpu rehearses the check without one", file=sys.stderr)
        return 4
    device, out = torch.device("cpu" if given.cpu else "cuda"), given.out
    if out is None and not given.cpu:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        stem = file_stem({"machine": describe_machine(device, 1), "suite": "gpu-check", "date": stamp})
        out = Path(__file__).resolve().parent / "results" / f"{stem}.json"
    result = check(device, quick=given.cpu, minutes=given.minutes, out=out)
    print(render(result))
    print(f"Ops with a Triton implementation: {', '.join(result['with_triton']) or 'none'}; without: "
          f"{', '.join(result['without_triton']) or 'none'}.")  # fmt: skip
    for row in result["training"]:
        print(f"{row['steps']} training steps, {row['stage']} in {row['dtype']}: {row['verdict']}.")
    if out is not None:
        print(f"Written to {out}.")
    return 0 if result["green"] else 1


if __name__ == "__main__":
    sys.exit(main())
