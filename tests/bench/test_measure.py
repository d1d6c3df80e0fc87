"""Clock, memory and floors."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from fastdiffclip.bench import measure, op_jobs
from fastdiffclip.bench.floors import Floors, Work
from fastdiffclip.bench.setups import without_paths

CPU = torch.device("cpu")


def test_median_and_percentiles_of_the_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which the calls take 1, 2, ... 10 ms."""
    monkeypatch.setattr(measure, "peak_of", lambda call, device: None)
    ticks = itertools.chain.from_iterable((10 * n, 10 * n + 1e-3 * (n + 1)) for n in itertools.count())
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    timing = measure.time_calls({"a": lambda: None}, CPU, seconds=0.01)["a"]
    assert timing.repeats == 10
    assert (timing.p20_ms, timing.median_ms, timing.p80_ms) == pytest.approx((2.8, 5.5, 8.2))
    assert timing.peak_mb is None


@pytest.mark.parametrize(("milliseconds", "turn"), [(4.0, "aabb"), (6.0, "ab")])
def test_calls_take_turns_and_short_ones_are_warm(
    milliseconds: float, turn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "peak_of", lambda call, device: None)
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) * milliseconds * 1e-3)
    order: list[str] = []
    measure.time_calls({n: lambda n=n: order.append(n) for n in "ab"}, CPU, seconds=0.0, fewest=4)
    assert "".join(order) == "aa" + "bb" + turn * 3  # warm-up and first repeat of each, then turns


def test_a_mode_that_ends_in_graph_records_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []
    monkeypatch.setattr(op_jobs, "captured", lambda call, device: recorded.append(call) or "replay")
    leaf = torch.tensor([1.0, 2.0], requires_grad=True)
    assert op_jobs.backward(lambda x: (x * x).sum(), [leaf], "fwd+bwd graph") == "replay"
    assert torch.equal(recorded[0]()[0], torch.tensor([2.0, 4.0]))


def test_peak_of_one_call_is_what_it_takes_beyond_what_is_there() -> None:
    held = torch.ones(16 << 20)  # 64 MiB that are there before
    before = measure.peak_of(lambda: None, CPU)
    if before is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    peak = measure.peak_of(lambda: torch.ones(12 << 20).sum(), CPU)  # 48 MiB
    assert before < 4 and peak is not None and 46 < peak < 60
    assert len(held) == 16 << 20


def test_floor_of_a_cpu_adds_noise_to_the_copy_and_takes_the_larger_of_flops_and_bytes() -> None:
    floors = Floors(CPU, quick=True)
    floors._rates = {"copy_64KiB": 1e9, "matrix_float32": 1e11, "matrix_bfloat16": 4e11, "normals": 1e8}
    assert floors.of(Work(bytes=1e5), "float32") == pytest.approx(1e-4)
    assert floors.of(Work(bytes=1e5, normals=1e4), "float32") == pytest.approx(2e-4)
    assert floors.of(Work(flops=1e9, bytes=1e5), "float32") == pytest.approx(1e-2)
    assert floors.of(Work(flops=1e9, bytes=1e5), "bfloat16") == pytest.approx(2.5e-3)


def test_rates_are_measured_once_and_plausible() -> None:
    floors = Floors(CPU, quick=True)
    rates = floors.matrix_rate("float32"), floors.copy_rate(1e5), floors.normal_rate()
    assert rates == (floors.matrix_rate("float32"), floors.copy_rate(1e5), floors.normal_rate())
    assert 1e8 < rates[0] < 1e14 and 1e7 < rates[1] < 1e13 and 1e5 < rates[2] < 1e12
    assert set(floors.known()) == {"matrix_float32", "copy_64KiB", "normals"}


def test_machine_names_no_path() -> None:
    found = measure.describe_machine(CPU, 3)
    assert found["threads"] == 3 and found["device"] == "cpu" and found["versions"]["torch"]
    assert not any(isinstance(v, str) and ("/home" in v or "/root" in v) for v in found.values())


def test_reasons_name_files_but_no_folders() -> None:
    text = "/opt/x-1/lib/python3.11/libnative.so has ABI 1, see https://a.org/b/c and a/b or 1/2"
    assert without_paths(text) == "libnative.so has ABI 1, see https://a.org/b/c and a/b or 1/2"
