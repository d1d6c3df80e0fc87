"""Every suite runs from end to end on tiny shapes, so that no bench can rot; the rows keep their promise."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiffclip.bench import render, run
from fastdiffclip.bench.__main__ import main
from fastdiffclip.bench.cases import CASES, select
from fastdiffclip.bench.gpu_check import QUICK_STEPS, training
from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.kernels import implementations

KEYS = ["suite", "case", "impl", "mode", "device", "dtype", "shape", "median_ms", "p20_ms", "p80_ms", "peak_mb",
        "ratio_vs_eager", "share_of_floor"]  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    before, folder = torch.get_num_threads(), tmp_path_factory.mktemp("bench")
    torch.set_num_threads(1)
    found = run("all", threads=1, quick=True, device="cpu", out=folder)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
    return {**found, "folder": folder}


def test_every_case_has_its_rows(result: dict[str, Any]) -> None:
    expected = {case.name for case in CASES}
    assert {row["case"] for row in result["rows"]} == expected
    for row in result["rows"]:
        assert list(row) == KEYS
        assert row["mode"] in ("fwd", "fwd+bwd") and row["device"] == "cpu"
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    for op, table in implementations("cpu").items():
        present = {row["impl"] for row in result["rows"] if row["case"] == op}
        if op in expected:
            ready = {impl for impl, state in table.items() if state == "ok"}
            assert ready - {"triton"} <= present and "triton" not in present  # interpreted, it is no figure
    for case in ("umd_step", "flc_step", "predict", "scene_read", "window_gather"):
        assert {row["impl"] for row in result["rows"] if row["case"] == case} == {"plain", "engine"}


def test_gate_is_green_and_nothing_is_left_out_silently(result: dict[str, Any]) -> None:
    assert result["gate"] and all(verdict["green"] for verdict in result["gate"])
    timed = {(r["case"], r["impl"], r["mode"], r["dtype"], r["shape"]) for r in result["rows"]}
    left = {(s["case"], s["impl"], s["mode"], s["dtype"], s["shape"]) for s in result["skipped"]}
    for case, sizes in select("all", "cpu", quick=True):
        shape = ",".join(f"{k}={v}" for k, v in sizes.items())
        for impl, dtype in case.variants:
            assert (case.name, impl, case.mode, dtype, shape) in timed | left
    assert all(s["reason"] for s in result["skipped"])


def test_ratio_is_eager_time_over_own_time(result: dict[str, Any]) -> None:
    wanted = ("short_attention", "fwd", "float32")
    rows = [r for r in result["rows"] if (r["case"], r["mode"], r["dtype"]) == wanted and "L=37" in r["shape"]]
    eager = min(r["median_ms"] for r in rows if r["impl"] in ("reference", "sdpa"))
    for row in rows:
        assert row["ratio_vs_eager"] == pytest.approx(eager / row["median_ms"], rel=2e-3)


def test_files_are_written_and_hold_no_path(result: dict[str, Any]) -> None:
    (path,) = result["folder"].glob("*.json")
    text = path.read_text(encoding="utf-8")
    stored = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert stored["rows"] == result["rows"] and stored["machine"]["commit"] == result["machine"]["commit"]
    assert str(Path(__file__).resolve().parents[2]) not in text and str(result["folder"]) not in text
    assert path.with_suffix(".md").read_text(encoding="utf-8") == render(stored)
    assert len(list(result["folder"].glob("*.png"))) == 4


def test_table_names_every_case(result: dict[str, Any]) -> None:
    text = render(result)
    assert all(case.name in text for case in CASES) and "Correctness gate" in text and "no figures" in text


def test_two_results_are_compared(result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = {k: v for k, v in result.items() if k != "folder"}
    b = copy.deepcopy(a)
    b["rows"] = b["rows"][1:]
    for name in ("median_ms", "p20_ms", "p80_ms"):
        b["rows"][0][name] = a["rows"][1][name] / 8
    for name, value in (("a.json", a), ("b.json", b)):
        (tmp_path / name).write_text(json.dumps(value), encoding="utf-8")
    found = run(compare=(tmp_path / "a.json", tmp_path / "b.json"))
    assert len(found["rows"]) == len(a["rows"]) - 1 and found["comparison"]["same_machine"]
    assert found["rows"][0]["ratio"] == pytest.approx(8, rel=1e-3)
    assert found["rows"][1]["ratio"] == 1 and not found["rows"][1]["distinct"]
    assert main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == found["rows"]


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"'kernel'.*did you mean 'kernels'"):
        run("kernel", device="cpu")
    (tmp_path / "x.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputDataError, match="not a bench result"):
        run(compare=(tmp_path / "x.json", tmp_path / "x.json"))
    assert main(["--compare", str(tmp_path / "no.json"), str(tmp_path / "x.json")]) == 3
    assert "no.json cannot be read" in capsys.readouterr().err


# Largest difference of two losses of the same step, relative to the first loss. float32: rounding alone, which 100
# steps amplify. bfloat16: a cosine is off by up to 2^-8, times the logit scale of 14.3 in the own logit and against it
# in the others makes 0.11 of the first FLC loss, 2.7; UMD has no such factor, only rounded products.
CURVE_BOUND = {
    ("umd", "float32"): 1e-5,
    ("umd", "bfloat16"): 0.01,
    ("flc", "float32"): 1e-4,
    ("flc", "bfloat16"): 0.042,
}


def test_loss_curves_of_100_steps_are_those_of_plain_code() -> None:
    rows = training(torch.device("cpu"), quick=True, steps=100)
    assert {(row["stage"], row["dtype"]) for row in rows} == set(CURVE_BOUND)
    for row in rows:
        assert 0 < row["largest_difference"] <= CURVE_BOUND[row["stage"], row["dtype"]], row["verdict"]
        assert row["loss_last"] < 0.6 * row["loss_first"]


def test_training_steps_of_the_device_check_agree_with_plain_code() -> None:
    rows = training(torch.device("cpu"), quick=True)
    assert [(r["stage"], r["dtype"]) for r in rows] == [(s, d) for s in ("umd", "flc") for d in ("float32", "bfloat16")]
    for row in rows:
        assert row["green"] and row["steps"] == QUICK_STEPS, row["verdict"]
        assert row["loss_last"] < row["loss_first"]
        assert row["largest_difference"] > 0  # two implementations, not one compared with itself
