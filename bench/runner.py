"""Runs suites: the gate, then the clock, then one JSON-able result."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from fastdiffclip.bench.cases import CURVES, Case, select
from fastdiffclip.bench.floors import Floors
from fastdiffclip.bench.gate import Gate
from fastdiffclip.bench.jobs import jobs
from fastdiffclip.bench.measure import describe_machine, time_calls
from fastdiffclip.bench.op_jobs import Jobs, Variant, op_jobs
from fastdiffclip.bench.setups import SkipCase, named, without_paths
from fastdiffclip.errors import InputDataError
from fastdiffclip.runtime import Progress, resolve_device, set_threads, silent

SECONDS = 1.0  # on the clock for each call of a full run; slow calls are repeated three times in any case
QUICK_SECONDS = 0.005


def run(
    suite: str = "kernels",
    threads: int = 0,
    out: Path | str | None = None,
    device: str = "auto",
    compare: tuple[Path, Path] | None = None,
    quick: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time a suite on this machine, or compare two results.

    Args:
        suite: ``kernels``, ``io``, ``train``, ``infer`` or ``all`` of these; ``curves`` by itself.
        threads: CPU threads of torch, numba and the native library; 0 takes all that this process may use.
        out: folder for the JSON, the Markdown table and the plots; None writes nothing.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        compare: two JSON files of earlier runs; nothing is timed then.
        quick: tiny shapes and hardly any repeats, to see that everything runs. Not figures.

    Returns:
        ``{"machine", "rows", "gate", "skipped", "floors", "date", "suite", "quick"}``; a row is as in the README of the
        results. With ``compare``: ``{"machine", "rows", "comparison"}`` of the two.

    Raises:
        UsageError: an unknown suite or device. InputDataError: a file to compare is not a result.
    """
    from fastdiffclip.bench.report import compare_results, write_report

    if compare is not None:
        return compare_results(read_result(Path(compare[0])), read_result(Path(compare[1])))
    where, before = resolve_device(device), torch.get_num_threads()
    chosen = [] if suite == CURVES else select(suite, where.type, quick)
    used = set_threads(threads)
    try:
        if suite == CURVES:
            from fastdiffclip.bench.curves import run_curves

            result = run_curves(where, used, quick, progress or silent)
        else:
            result = _timed(chosen, where, used, quick, progress or silent)
    finally:
        pin_threads(before)
    result = {"machine": describe_machine(where, used), "suite": suite, "quick": quick, **result}
    result["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if out is not None:
        write_report(result, Path(out))
    return result


def read_result(path: Path) -> dict[str, Any]:
    """The JSON of an earlier run. Raises :class:`InputDataError`."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputDataError(f"the bench result {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputDataError(f"the bench result {path} is not JSON: {error}") from None
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list) or "machine" not in result:
        raise InputDataError(f"{path} is not a bench result: expected an object with 'machine' and 'rows'")
    return result


def pin_threads(count: int) -> None:
    """Set the number of threads, torch's last: numba, when it starts its threads, changes torch's number too."""
    set_threads(count)
    torch.set_num_threads(count)


def _timed(
    chosen: list[tuple[Case, Mapping[str, int]]], device: torch.device, threads: int, quick: bool, progress: Progress
) -> dict[str, Any]:
    gate, floors = Gate(device), Floors(device, quick)
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for number, (case, sizes) in enumerate(chosen):
        progress("bench", number, len(chosen), f"{case.name} {named(sizes)}")
        torch.manual_seed(0)
        reasons: dict[Variant, str] = {}
        admitted = admit_variants(case.name, case.variants, gate, reasons)
        pin_threads(threads)
        if admitted:
            try:
                with _build(case, sizes, device, admitted) as built:
                    reasons |= built.skipped
                    rows += _rows(case, sizes, device, built, floors, quick)
            except ModuleNotFoundError as error:
                reasons |= {variant: f"the package {error.name} is not installed" for variant in admitted}
        skipped += [
            {"suite": case.suite, "case": case.name, "impl": impl, "mode": case.mode, "dtype": dtype,
             "shape": named(sizes), "reason": without_paths(reason)}
            for (impl, dtype), reason in reasons.items()
        ]  # fmt: skip
    progress("bench", len(chosen), len(chosen), "")
    verdicts = [verdict.as_row() for verdict in gate.verdicts.values()]
    return {"rows": rows, "gate": verdicts, "skipped": skipped, "floors": floors.known()}


def _build(
    case: Case, sizes: Mapping[str, int], device: torch.device, variants: list[Variant]
) -> AbstractContextManager[Jobs]:
    return (op_jobs if case.suite == "kernels" else jobs)(case, sizes, device, variants)


def admit_variants(case: str, variants: Sequence[Variant], gate: Gate, reasons: dict[Variant, str]) -> list[Variant]:
    """The variants of ``case`` that agree with the truth; why not, for the others, goes into ``reasons``."""
    admitted = []
    for impl, dtype in variants:
        if impl == "triton" and gate.device.type == "cpu":
            reasons[impl, dtype] = "Triton kernels need a CUDA device; its interpreter is for tests"
            continue
        try:
            verdict = gate.admit(case, impl, dtype)
        except SkipCase as skip:
            reasons[impl, dtype] = str(skip)
        except ModuleNotFoundError as error:
            reasons[impl, dtype] = f"the package {error.name} is not installed"
        else:
            if verdict.green:
                admitted.append((impl, dtype))
            else:
                reasons[impl, dtype] = f"the correctness gate is red: {verdict.why_red}"
    return admitted


def _rows(
    case: Case, sizes: Mapping[str, int], device: torch.device, built: Jobs, floors: Floors, quick: bool
) -> list[dict[str, Any]]:
    timings = time_calls(built.calls, device, QUICK_SECONDS if quick else SECONDS, 2 if quick else 3)
    eager = min((t.median_ms for (impl, _), t in timings.items() if impl in case.eager), default=None)
    return [
        {
            "suite": case.suite,
            "case": case.name,
            "impl": impl,
            "mode": case.mode,
            "device": device.type,
            "dtype": dtype,
            "shape": named(sizes),
            "median_ms": rounded(timing.median_ms),
            "p20_ms": rounded(timing.p20_ms),
            "p80_ms": rounded(timing.p80_ms),
            "peak_mb": rounded(timing.peak_mb),
            "ratio_vs_eager": None if eager is None else rounded(eager / timing.median_ms),
            "share_of_floor": rounded(1e3 * floors.of(built.work, dtype) / timing.median_ms),
        }
        for (impl, dtype), timing in timings.items()
    ]


def rounded(value: float | None) -> float | None:
    """Four digits: what a result states."""
    return None if value is None else float(f"{value:.4g}")
