"""Growth is measured over the upper half, counted from what the program does, and drawn; every curve runs."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastdiffclip.bench import counts, render, run
from fastdiffclip.bench.cases import CASES, select
from fastdiffclip.bench.counts import count_work, kept_bytes
from fastdiffclip.bench.curve_jobs import CurveSizes, predict_point, step_need
from fastdiffclip.bench.curve_plots import panels, plot_curves
from fastdiffclip.bench.curves import (
    BASES,
    MARGIN,
    Curve,
    curves_of,
    growth,
    sizes_at,
    summaries,
    upper_half,
)
from fastdiffclip.bench.setups import count_flops, flc_setup, umd_setup
from fastdiffclip.runtime import Compute

CPU = torch.device("cpu")
FP32 = Compute(CPU, torch.float32)
SMALL = CurveSizes((6, 1), 5, 32, 2, 1, classes=3, umd_batch=8, flc_batch=8, side=9)


# --- exponents ------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 10**7), min_size=2, max_size=9, unique=True).map(sorted),
    st.floats(-3, 3),
    st.floats(1e-3, 1e3),
)
def test_a_power_has_its_exponent(x: list[int], slope: float, factor: float) -> None:
    assert growth(x, [factor * value**slope for value in x]) == pytest.approx(slope, abs=1e-6)


def test_fixed_costs_of_small_sizes_do_not_count() -> None:
    x = [1, 2, 4, 8, 16, 32, 64, 128]
    assert upper_half(x) == [16, 32, 64, 128]
    assert growth(x, [max(100.0, 10.0 * value) for value in x]) == pytest.approx(1.0)
    assert growth([3], [1.0]) is None
    assert growth([1, 100], [2.0, 200.0]) == pytest.approx(1.0)  # two are taken, whatever their middle


def rows(**columns: list[Any]) -> list[dict[str, Any]]:
    blank = {"case": "umd_step", "axis": "batch", "peak_mb": None, "gflop": 1.0, "moved_mb": 1.0, "least_mb": None,
             "most_mb": None}  # fmt: skip
    return [{**blank, **dict(zip(columns, line, strict=True))} for line in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize(
    ("measured", "differs"),
    [(1.0 - MARGIN - 0.01, True), (1.0 - MARGIN + 0.01, False), (1.5, False), (2.0 + MARGIN + 0.01, True)],
)
def test_growth_between_bytes_and_flops_is_what_the_counts_allow(measured: float, differs: bool) -> None:
    x = [8, 16, 32, 64]
    own = rows(
        value=x, p20_ms=[v**measured for v in x], gflop=[float(v**2) for v in x], moved_mb=[3.0 * v for v in x],
        peak_mb=[0.5, 1.0, 10.0, 20.0], least_mb=[10.0] * 4, most_mb=[1.0 * v for v in x],
    )  # fmt: skip
    time, memory = summaries(Curve("umd_step", "batch", tuple(x)), own)
    assert time["expected"] == [1.0, 2.0] and time["differs"] is differs
    assert time["exponent"] == pytest.approx(measured, abs=1e-3) and time["upper"] == [32, 64]
    # Peaks below two MiB are pages; what must be held allows everything from constant to linear.
    assert memory["exponent"] == 1.0 and memory["expected"] == [0.0, 1.0] and not memory["differs"]


def test_what_nothing_was_counted_for_is_never_marked() -> None:
    own = rows(value=[1, 2], p20_ms=[1.0, 9.0], gflop=[0.0, 0.0], moved_mb=[0.0, 0.0])
    time, memory = summaries(Curve("umd_step", "batch", (1, 2)), own)
    assert time["expected"] is None and not time["differs"] and time["exponent"] == pytest.approx(3.17)
    assert memory["exponent"] is None and memory["expected"] is None and memory["upper"] == []


# --- counts ---------------------------------------------------------------------------------------------------------


def test_a_product_counts_its_flops_its_bytes_and_what_it_keeps() -> None:
    layer, x = nn.Linear(6, 5, bias=False), torch.randn(4, 6)

    def call() -> None:
        layer.zero_grad(set_to_none=True)
        torch.relu(layer(x)).sum().backward()

    work = count_work(call, layer)
    assert work.flops == 2 * 2 * 4 * 6 * 5  # the output and the gradient of the weight; nobody needs that of x
    least = 4 * (4 * 6 + 6 * 5 + 4 * 5)
    assert 3 * least < work.bytes < 12 * least
    # x and the output of relu; the weight is a parameter.
    assert kept_bytes(call, layer) == 4 * (4 * 6 + 4 * 5)


def test_views_share_what_they_keep_and_what_is_expanded_is_read_once() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    assert kept_bytes(lambda: sum(part.square().sum() for part in x[:, :].unbind(0)), nn.Identity()) == 4 * 3 * 8
    with counts._Traffic() as traffic:
        torch.ones(1, 1).expand(1000, 1000).sum()
    assert traffic.bytes < 100


@pytest.mark.parametrize("make", [umd_setup, flc_setup])
def test_attention_is_counted_and_left_as_it_was(make: Any) -> None:
    """FLOPs of the engine's step are near the plain ones, which project more and encode more texts."""
    setup = make(SMALL, FP32)
    model, loss = setup.engine.model, setup.engine_loss(0)
    before = [part.backend for part in model.modules() if hasattr(part, "backend")]
    work = count_work(lambda: setup.engine_loss(0), model)
    assert [part.backend for part in model.modules() if hasattr(part, "backend")] == before
    assert setup.engine_loss(0) == pytest.approx(loss, rel=1e-6)
    plain = count_flops(lambda: setup.plain_loss(0).backward())
    assert (0.9 if make is umd_setup else 0.2) * plain < work.flops <= plain


@pytest.mark.parametrize(("case", "make"), [("umd_step", umd_setup), ("flc_step", flc_setup)])
def test_needs_of_a_batch_follow_from_two_small_ones(case: str, make: Any) -> None:
    need = step_need(case, SMALL, CPU)
    setup = make(SMALL, FP32)
    model, call = setup.engine.model, lambda: setup.engine_loss(0)
    work = count_work(call, model)
    assert need.flops == pytest.approx(work.flops, rel=1e-6)
    assert need.bytes == pytest.approx(work.bytes + 32.0 * sum(p.numel() for p in model.parameters()), rel=0.02)
    kept, gradients = kept_bytes(call, model), 4.0 * sum(p.numel() for p in model.parameters())
    assert need.memory == pytest.approx((max(kept, gradients), kept + gradients), rel=0.02)


def test_micro_batches_keep_what_one_of_them_keeps() -> None:
    small, large = (step_need("umd_step", replace(SMALL, umd_batch=batch), CPU) for batch in (32, 320))
    assert small.memory == large.memory and large.flops == pytest.approx(10 * small.flops, rel=1e-6)
    assert 5 * small.bytes < large.bytes < 10 * small.bytes  # the optimiser's part stays


def test_prediction_is_counted_whatever_the_threads() -> None:
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with ExitStack() as stack:
            found.append(predict_point(stack, replace(SMALL, window=3, side=7), CPU, "float32").need)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert found[0] == found[1] and found[0].flops > 1e6


# --- curves ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_size_changes_along_a_curve(device: str) -> None:
    base, curves = curves_of(device)
    for curve in curves:
        assert len(curve.values) > 1 and list(curve.values) == sorted(set(curve.values))
        points = [sizes_at(base, curve, value) for value in curve.values]
        changed = [{name for name, now in vars(point).items() if now != vars(points[0])[name]} for point in points[1:]]
        assert all(names == changed[0] and names for names in changed)
        for point in points:
            model = point.config().model
            assert model.width % model.heads == 0 and model.width // model.heads == 16
    axes = {(curve.case, curve.axis) for curve in curves}
    assert {("umd_step", axis) for axis in ("batch", "bands", "window", "depth", "width")} <= axes


def test_the_axes_of_the_plan_are_covered_on_a_cpu() -> None:
    ends = {(c.case, c.axis): (c.values[0], c.values[-1]) for c in curves_of("cpu")[1]}
    assert ends["umd_step", "bands"] == ends["predict", "bands"] == (1, 512)
    assert ends["flc_step", "window"] == (3, 15) and ends["umd_step", "batch"] == (16, 512)
    assert ends["scene_read", "pixels"] == pytest.approx((1e4, 1e7), rel=1e-3)
    for curve in curves_of("cpu")[1]:
        for value in curve.values if curve.axis == "pixels" else ():
            assert sizes_at(BASES["cpu"], curve, value).side ** 2 == value


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    before, folder = torch.get_num_threads(), tmp_path_factory.mktemp("curves")
    torch.set_num_threads(1)
    found = run("curves", threads=1, quick=True, device="cpu", out=folder)
    torch.set_num_threads(before)
    return {**found, "folder": folder}


def test_every_point_has_its_row(result: dict[str, Any]) -> None:
    assert all(verdict["green"] for verdict in result["gate"]) and not result["skipped"]
    expected = [(c.case, c.axis, value) for c in curves_of("cpu", quick=True)[1] for value in c.values]
    assert [(row["case"], row["axis"], row["value"]) for row in result["rows"]] == expected
    for row in result["rows"]:
        assert row["suite"] == "curves" and row["impl"] == "engine" and row["ratio_vs_eager"] is None
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["moved_mb"] > 0 and row["share_of_floor"] >= 0
        assert (row["gflop"] > 0) == (row["case"] in ("umd_step", "flc_step", "predict"))
    assert len(result["curves"]) == 2 * len(curves_of("cpu", quick=True)[1])


def test_counts_grow_with_the_size(result: dict[str, Any]) -> None:
    for curve in curves_of("cpu", quick=True)[1]:
        own = [row for row in result["rows"] if (row["case"], row["axis"]) == (curve.case, curve.axis)]
        # Small windows fill batches of more of them, and this map, of 36 pixels, one that is mostly padding.
        if (curve.case, curve.axis) != ("predict", "window"):
            assert own[-1]["moved_mb"] > own[0]["moved_mb"], curve
        if curve.case in ("umd_step", "flc_step"):
            assert own[-1]["gflop"] > own[0]["gflop"], curve


def test_files_hold_the_table_and_two_pictures(result: dict[str, Any]) -> None:
    (path,) = result["folder"].glob("cpu-curves-*.json")
    stored = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name}: not JSON"))
    assert stored["curves"] == result["curves"] and stored["margin"] == MARGIN
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert text == render(stored) and "grows as x^" in text
    for case, axis in {(found["case"], found["axis"]) for found in stored["curves"]}:
        assert f"| {case} " in text and axis in text
    names = {file.name.removeprefix(path.stem) for file in result["folder"].glob("*.png")}
    assert names == {"-time.png", "-memory.png"}
    assert all(file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for file in result["folder"].glob("*.png"))


def test_a_panel_for_every_curve(result: dict[str, Any], tmp_path: Path) -> None:
    drawn = [panel for line in panels(result) for panel in line]
    assert sorted(drawn) == sorted({(found["case"], found["axis"]) for found in result["curves"]})
    assert max(map(len, panels(result))) <= 5
    # What could not be timed leaves a gap, and no curve at all an empty picture.
    bare = {**result, "rows": [row for row in result["rows"] if row["axis"] == "bands"]}
    assert {axis for line in panels(bare) for _, axis in line} == {"bands"}
    for found in (bare, {**result, "rows": []}):
        assert len(plot_curves(found, tmp_path / "x.json")) == 2


def test_curves_are_no_part_of_all() -> None:
    assert "curves" not in {case.suite for case in CASES}
    assert select("curves", "cpu") == []
