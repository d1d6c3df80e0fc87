"""Nothing that is wrong is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdiffclip.bench import cases
from fastdiffclip.bench.gate import OPS, Gate
from fastdiffclip.bench.runner import run
from fastdiffclip.bench.setups import SkipCase
from fastdiffclip.errors import UsageError
from fastdiffclip.kernels import dispatch, reference

CPU = torch.device("cpu")


@pytest.fixture
def with_native(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], None]:
    """Register a native implementation of an op for this test."""

    def register(op: str, call: Callable[..., Any]) -> None:
        monkeypatch.setitem(dispatch._OPS, op, {**dispatch._OPS[op], "native": call})
        monkeypatch.setattr(dispatch, "unavailable", lambda impl, device: "" if impl != "triton" else "not here")

    return register


def slightly(factor: float, op: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = op(*args, **kwargs)
        return (out[0] * factor, out[1]) if isinstance(out, tuple) else out * factor

    return wrong


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", sorted(OPS))
def test_the_reference_is_green(op: str, dtype: str) -> None:
    verdict = Gate(CPU).admit(op, "reference", dtype)
    assert verdict.green and verdict.bound > 0


@pytest.mark.parametrize("op", sorted(OPS))
def test_a_copy_of_the_reference_is_green_and_one_part_in_ten_thousand_is_red(
    op: str, with_native: Callable[..., None]
) -> None:
    right = dispatch._OPS[op]["reference"]
    with_native(op, right)
    assert Gate(CPU).admit(op, "native", "float32").green
    with_native(op, slightly(1.0001, right))
    verdict = Gate(CPU).admit(op, "native", "float32")
    assert not verdict.green and verdict.as_row()["green"] is False


def test_a_wrong_gradient_is_red(with_native: Callable[..., None]) -> None:
    def half_gradient(prediction: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return reference.masked_mse(0.5 * prediction + 0.5 * prediction.detach(), *args, **kwargs)

    with_native("masked_mse", half_gradient)
    assert not Gate(CPU).admit("masked_mse", "native", "float32").green


def test_ids_must_be_equal_to_the_last_one(with_native: Callable[..., None]) -> None:
    def other_masks(scene: Any, centres: Any, times: Any, schedule: Any, rng: torch.Tensor, **settings: Any) -> Any:
        return reference.visible_noise(scene, centres, times, schedule, rng + torch.tensor([0, 1, 0]), **settings)

    with_native("visible_noise", other_masks)
    assert Gate(CPU).admit("visible_noise", "native", "float32").error == float("inf")


def test_not_a_number_and_a_crash_are_red(with_native: Callable[..., None]) -> None:
    with_native("masked_mse", slightly(float("nan"), reference.masked_mse))
    verdict = Gate(CPU).admit("masked_mse", "native", "float32")
    assert not verdict.green and verdict.as_row()["error"] is None

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel image")

    with_native("masked_mse", broken)
    verdict = Gate(CPU).admit("masked_mse", "native", "float32")
    assert not verdict.green and "no kernel image" in verdict.why_red


def test_what_cannot_run_here_is_left_out_with_its_reason(with_native: Callable[..., None]) -> None:
    def refuses(*args: Any, **kwargs: Any) -> Any:
        raise UsageError("head dimension 16 is not supported")

    with_native("short_attention", refuses)
    with pytest.raises(SkipCase, match="head dimension 16"):
        Gate(CPU).admit("short_attention", "native", "float32")


def test_red_is_not_timed(with_native: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "CASES", tuple(case for case in cases.CASES if case.name == "visible_noise"))
    with_native("visible_noise", slightly(1.01, reference.visible_noise))
    result = run("kernels", threads=1, quick=True, device="cpu")
    timed = {row["impl"] for row in result["rows"] if row["case"] == "visible_noise"}
    assert timed == {"plain", "reference"}
    reasons = {s["reason"] for s in result["skipped"] if (s["case"], s["impl"]) == ("visible_noise", "native")}
    assert reasons and all("gate is red" in reason for reason in reasons)
