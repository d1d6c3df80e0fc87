"""The suite ``curves``: time and memory against one size at a time, and how both grow against what they should.

A curve's exponent is the slope of log time, or log peak, over log size, by least squares over the upper half of the
sizes, where fixed costs weigh little. What it should be is counted (see ``curve_jobs``): a call whose time goes into
arithmetic grows like its FLOPs, one whose time goes into memory like the bytes that pass through its tensors, and any
mixture of the two lies between. A curve beyond that by more than ``MARGIN`` is marked; ``NOTES.md`` says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastdiffclip.bench.cases import CURVES
from fastdiffclip.bench.curve_jobs import CurveSizes, Need, Point, predict_point, scene_point, step_point
from fastdiffclip.bench.floors import Floors, Work
from fastdiffclip.bench.gate import Gate
from fastdiffclip.bench.measure import Timing, time_calls
from fastdiffclip.bench.runner import admit_variants, pin_threads, rounded
from fastdiffclip.bench.setups import SkipCase, named, without_paths
from fastdiffclip.runtime import Progress, resolve_precision

MARGIN = 0.15  # between a measured exponent and the nearest one that the counts allow
SMALLEST_PEAK = 2.0  # MiB; below it a peak is pages and what the allocator keeps
SECONDS, QUICK_SECONDS = 0.4, 0.002
STEPS = ("umd_step", "flc_step")
SCENES = ("scene_read", "fit_front_end", "prepare", "draw_from_memory", "draw_from_disk")
Values = Mapping[str, tuple[int, ...]]
BASES = {
    "cpu": CurveSizes((48, 1), 9, 64, 2, 2, classes=8, umd_batch=64, flc_batch=64, side=24),
    "cuda": CurveSizes(umd_batch=256, flc_batch=256, side=128),
    "quick": CurveSizes((4, 1), 3, 16, 1, 1, classes=3, umd_batch=4, flc_batch=4, side=6),
}
MODEL_VALUES: dict[str, Values] = {
    "cpu": {
        "batch": (16, 32, 64, 128, 256, 512), "bands": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        "window": (3, 5, 7, 9, 11, 13, 15), "depth": (1, 2, 3, 4, 6, 8), "width": (32, 64, 96, 128, 192, 256),
    },
    "cuda": {  # each point is compiled first, which takes longer than all its steps
        "batch": (64, 256, 1024, 4096), "bands": (8, 32, 144, 512), "window": (3, 7, 11, 15), "depth": (2, 4, 8),
        "width": (64, 128, 256),
    },
    "quick": {"batch": (2, 4), "bands": (1, 4), "window": (3, 5), "depth": (1, 2), "width": (16, 32)},
}  # fmt: skip
PIXELS = (10_000, 31_684, 99_856, 315_844, 1_000_000, 3_161_284, 9_998_244)  # squares
PIXEL_VALUES: dict[str, Values] = {
    "cpu": {"predict": PIXELS[:4], **dict.fromkeys(SCENES, PIXELS)},
    "cuda": {"predict": (PIXELS[0], PIXELS[2], PIXELS[4])},
    "quick": {"predict": (25, 49), **dict.fromkeys(SCENES, (100, 400))},
}
MODEL_AXES = {"bands", "window", "depth", "width"}
SCENE_BANDS = 16


@dataclass(frozen=True)
class Curve:
    """One size of one case, and its values in ascending order."""

    case: str
    axis: str
    values: tuple[int, ...]


def curves_of(device: str, quick: bool = False) -> tuple[CurveSizes, list[Curve]]:
    """The base point and the curves of a device type."""
    kind = "quick" if quick else device
    values, pixels = MODEL_VALUES[kind], PIXEL_VALUES[kind]
    steps = [Curve(case, axis, values[axis]) for case in STEPS for axis in values]
    maps = [Curve("predict", axis, values[axis]) for axis in values if axis in MODEL_AXES]
    return BASES[kind], steps + maps + [Curve(case, "pixels", pixels[case]) for case in pixels]


def sizes_at(base: CurveSizes, curve: Curve, value: int) -> CurveSizes:
    """The base point with one size changed.

    Maps of many pixels are made by a small model: what grows with them is the same, and the base model would take
    minutes. Scenes that are only read have one modality.
    """
    if curve.axis == "pixels":
        side = math.isqrt(value)
        if curve.case in SCENES:
            return replace(base, bands=(SCENE_BANDS,), side=side)
        return replace(base, bands=(SCENE_BANDS, 1), window=3, width=16, depth=1, decoder_depth=1, side=side)
    changes: dict[str, dict[str, Any]] = {
        "batch": {"umd_batch": value, "flc_batch": value},
        "bands": {"bands": (value, 1)},
        "window": {"window": value},
        "depth": {"depth": value, "decoder_depth": value},
        "width": {"width": value},
    }
    return replace(base, **changes[curve.axis])


def run_curves(device: torch.device, threads: int, quick: bool, progress: Progress) -> dict[str, Any]:
    """Time every point of every curve; ``rows``, ``curves``, ``gate``, ``skipped`` and ``floors`` of the result."""
    gate, floors = Gate(device), Floors(device, quick)
    dtype = str(resolve_precision("auto", device)).removeprefix("torch.")
    base, curves = curves_of(device.type, quick)
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for number, curve in enumerate(curves):
        progress("bench", number, len(curves), f"{curve.case} against {curve.axis}")
        precision = "uint16" if curve.case in SCENES else dtype
        reasons: dict[tuple[str, str], str] = {}
        torch.manual_seed(0)
        if admit_variants(curve.case, (("engine", precision),), gate, reasons):
            pin_threads(threads)
            found, left = _timed(curve, base, device, precision, quick)
            rows += [_row(curve, base, value, device, precision, *found[value], floors) for value in found]
            skipped += [_skip(curve, base, value, precision, left[value]) for value in left]
        skipped += [_skip(curve, base, value, precision, why) for why in reasons.values() for value in curve.values]
    progress("bench", len(curves), len(curves), "")
    return {
        "rows": rows,
        "curves": [summary for curve in curves for summary in summaries(curve, rows)],
        "base": f"{base.umd_batch} windows of {base.window} x {base.window} pixels, {sum(base.bands)} bands, "
        f"width {base.width}, {base.depth} blocks",
        "margin": MARGIN,
        "gate": [verdict.as_row() for verdict in gate.verdicts.values()],
        "skipped": skipped,
        "floors": floors.known(),
    }


def _timed(
    curve: Curve, base: CurveSizes, device: torch.device, dtype: str, quick: bool
) -> tuple[dict[int, tuple[Timing, Need]], dict[int, str]]:
    """Timing and need of each value, all points of the curve in turns; and why the others were left out."""
    points: dict[int, Point] = {}
    left: dict[int, str] = {}
    with ExitStack() as stack:
        for value in curve.values:
            sizes = sizes_at(base, curve, value)
            try:
                points[value] = _point(stack, curve.case, sizes, device, dtype)
            except SkipCase as skip:
                left[value] = str(skip)
            except torch.OutOfMemoryError:
                left[value] = "does not fit the device's memory"
            except ModuleNotFoundError as error:
                left[value] = f"the package {error.name} is not installed"
        calls: Mapping[int, Callable[[], Any]] = {value: point.call for value, point in points.items()}
        timings = time_calls(calls, device, QUICK_SECONDS if quick else SECONDS, 2 if quick else 3)
    return {value: (timings[value], points[value].need) for value in timings}, left


def _point(stack: ExitStack, case: str, sizes: CurveSizes, device: torch.device, dtype: str) -> Point:
    if case in STEPS:
        return step_point(case, sizes, device, dtype)
    if case == "predict":
        return predict_point(stack, sizes, device, dtype)
    return scene_point(stack, case, sizes, device)


def _shape(curve: Curve, base: CurveSizes, value: int) -> str:
    sizes = sizes_at(base, curve, value)
    scene = {"H": sizes.side, "W": sizes.side, "C": sum(sizes.bands)}
    if curve.case in SCENES:
        return named(scene)
    model = {"P": sizes.window, "C": sum(sizes.bands), "D": sizes.width, "depth": sizes.depth}
    batch = sizes.umd_batch if curve.case == "umd_step" else sizes.flc_batch
    return named({"H": sizes.side, "W": sizes.side, **model} if curve.case == "predict" else {"B": batch, **model})


def _skip(curve: Curve, base: CurveSizes, value: int, dtype: str, reason: str) -> dict[str, str]:
    mode = "fwd+bwd" if curve.case in STEPS else "fwd"
    return {"suite": CURVES, "case": curve.case, "impl": "engine", "mode": mode, "dtype": dtype,
            "shape": _shape(curve, base, value), "reason": without_paths(reason)}  # fmt: skip


def _row(
    curve: Curve, base: CurveSizes, value: int, device: torch.device, dtype: str, timing: Timing, need: Need,
    floors: Floors,
) -> dict[str, Any]:  # fmt: skip
    floor = floors.of(Work(need.flops, need.floor_bytes), dtype)
    low, high = (None, None) if need.memory is None else need.memory
    return {
        "suite": CURVES,
        "case": curve.case,
        "impl": "engine",
        "mode": "fwd+bwd" if curve.case in STEPS else "fwd",
        "device": device.type,
        "dtype": dtype,
        "shape": _shape(curve, base, value),
        "median_ms": rounded(timing.median_ms),
        "p20_ms": rounded(timing.p20_ms),
        "p80_ms": rounded(timing.p80_ms),
        "peak_mb": rounded(timing.peak_mb),
        "ratio_vs_eager": None,
        "share_of_floor": rounded(1e3 * floor / timing.median_ms),
        "axis": curve.axis,
        "value": value,
        "gflop": rounded(need.flops / 1e9),
        "moved_mb": rounded(need.bytes / 2**20),
        "least_mb": None if low is None else rounded(low / 2**20),
        "most_mb": None if high is None else rounded(high / 2**20),
    }


def summaries(curve: Curve, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Measured and counted growth of a curve's time and memory; None where fewer than two points tell."""
    own = [row for row in rows if (row["case"], row["axis"]) == (curve.case, curve.axis)]
    peaks = [row for row in own if (row["peak_mb"] or 0.0) >= SMALLEST_PEAK]
    return [
        _summary(curve, "time", own, "p20_ms", ("gflop", "moved_mb")),
        _summary(curve, "memory", peaks, "peak_mb", ("least_mb", "most_mb")),
    ]


def _summary(
    curve: Curve, measure: str, rows: Sequence[Mapping[str, Any]], measured: str, counted: tuple[str, ...]
) -> dict[str, Any]:
    sizes = [row["value"] for row in rows]
    exponent = growth(sizes, [row[measured] for row in rows])
    # A count of nothing, as of FLOPs where bytes are only moved, says nothing.
    slopes = [growth(sizes, [row[name] for row in rows]) for name in counted if all(row[name] for row in rows)]
    expected = sorted(slope for slope in slopes if slope is not None)
    off = False
    if exponent is not None and expected:
        off = not expected[0] - MARGIN <= exponent <= expected[-1] + MARGIN
    return {
        "case": curve.case,
        "axis": curve.axis,
        "measure": measure,
        "upper": sizes if exponent is None else upper_half(sizes),
        "exponent": None if exponent is None else _digits(exponent),
        "expected": [_digits(expected[0]), _digits(expected[-1])] if expected else None,
        "differs": off,
    }


def _digits(exponent: float) -> float:
    return round(exponent, 3) + 0.0  # no minus before a zero


def upper_half(x: Sequence[float]) -> list[float]:
    """The values from the geometric middle up, at least two where there are two."""
    middle = math.sqrt(min(x) * max(x))
    upper = [value for value in x if value >= middle]
    return upper if len(upper) > 1 else list(x)[-2:]


def growth(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Slope of log y over log x by least squares over the upper half; None where there are not two points."""
    if len(x) < 2:
        return None
    chosen = set(upper_half(x))
    logs = np.log([(a, b) for a, b in zip(x, y, strict=True) if a in chosen])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
