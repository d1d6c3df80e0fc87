"""The loop that both stages share: schedule, decay groups, interrupts, what is left on disk."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastdiffclip.config import load_config
from fastdiffclip.errors import InputDataError, InterruptedRunError, UsageError
from fastdiffclip.train.engine import Loop, adam, fingerprint, settings_of, slices, weights_digest
from fastdiffclip.train.steps import StepLoss


def build(folder: Path | None = None, total: int = 6, identity: str = "id") -> tuple[Loop, torch.Tensor]:
    """A loop over one linear layer; its step draws nothing."""
    layer = nn.Linear(2, 1, bias=False)
    nn.init.ones_(layer.weight)
    loop = Loop("train", layer, adam(layer, 1.0, 0.0), total, lambda s: 0.1 / (s + 1), folder, identity)
    return loop, layer.weight


def loss_of(loop: Loop, signals: dict[int, int] | None = None) -> StepLoss:
    def take(step: torch.Tensor) -> torch.Tensor:
        number = int(step)
        if signals and number in signals:
            os.kill(os.getpid(), signals[number])
        loss = (loop.model(torch.tensor([[1.0, number + 1.0]])) - 3.0).square().sum()
        loss.backward()
        return loss.detach()

    return take


def test_schedule_log_and_losses(tmp_path: Path) -> None:
    loop, weight = build(tmp_path)
    seen: list[tuple[str, int, int]] = []
    loop.progress = lambda task, done, total, note="": seen.append((task, done, total))
    losses = loop.run(loss_of(loop), 1)
    assert len(losses) == 6 and losses[0] == 1.0
    assert seen == [("train", n, 6) for n in range(1, 7)]
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == pytest.approx(losses, rel=1e-6)
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([0.1 / (s + 1) for s in range(6)])
    assert sorted(os.listdir(tmp_path)) == ["log.csv"]

    other, reference = build()
    optimiser = torch.optim.Adam([reference])
    for step in range(6):
        optimiser.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimiser.zero_grad()
        loss_of(other)(torch.tensor(step))
        optimiser.step()
    torch.testing.assert_close(weight, reference)


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loop, _ = build()
    assert loop.resume() == 0
    loop.run(loss_of(loop), 1)
    loop.save(3)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(value: float) -> None:
    loop, weight = build()
    good = loss_of(loop)
    before: list[torch.Tensor] = []

    def step(number: torch.Tensor) -> torch.Tensor:
        if number == 3:
            before.append(weight.detach().clone())
            good(number)
            return torch.tensor(value)
        return good(number)

    with pytest.raises(InputDataError, match=rf"train: the loss became {value} at step 3; lower the learning rate"):
        loop.run(step, 1)
    assert torch.equal(weight, before[0]) and len(loop.losses) == 3


@pytest.mark.parametrize("at", [0, 2, 5])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tmp_path: Path, at: int, number: int, code: int) -> None:
    whole, expected = build()
    losses = whole.run(loss_of(whole), 1)
    first, _ = build(tmp_path)
    with pytest.raises(InterruptedRunError, match=f"after step {at + 1} of 6; continue with --resume") as raised:
        first.run(loss_of(first, {at: number}), 1)
    assert raised.value.exit_code == code
    second, weight = build(tmp_path)
    start = second.resume()
    assert start == at + 1
    assert second.run(loss_of(second), 1, start) == losses
    assert torch.equal(weight, expected)


def test_an_interrupted_run_without_a_folder_promises_nothing() -> None:
    loop, _ = build()
    with pytest.raises(InterruptedRunError, match=r"after step 2 of 6$"):
        loop.run(loss_of(loop, {1: signal.SIGINT}), 1)


def test_checkpoints_come_with_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiffclip.train.engine.CHECKPOINT_SECONDS", -1.0)
    loop, _ = build(tmp_path)
    loop.run(loss_of(loop), 1)
    assert sorted(path.stem for path in (tmp_path / "checkpoints").glob("*.json")) == ["000000004", "000000005"]
    with pytest.raises(UsageError, match="other settings"):
        build(tmp_path, identity="other")[0].resume()


TWICE = """
import os, signal
from pathlib import Path
import torch
from fastdiffclip.train.engine import Loop, adam
layer = torch.nn.Linear(2, 1)
def step(number):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("the second signal came back")
Loop("train", layer, adam(layer, 0.1, 0.0), 9, lambda s: 0.1, Path({out!r})).run(step, 1)
"""


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    code = TWICE.format(out=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and done.stderr == "" and os.listdir(tmp_path) == []


def test_weight_decay_reaches_linear_weights_only() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)
            self.table, self.positions = nn.Embedding(9, 3), nn.Parameter(torch.ones(4, 3))
            self.frozen = nn.Linear(3, 3).requires_grad_(False)
            self.shared = self.linear

    model = Small()
    groups = {group["weight_decay"]: group["params"] for group in adam(model, 1e-3, 0.5).param_groups}
    assert [id(p) for p in groups[0.5]] == [id(model.linear.weight)]
    plain = [model.positions, model.linear.bias, model.norm.weight, model.norm.bias, model.table.weight]
    assert {id(p) for p in groups[0.0]} == {id(p) for p in plain}


def test_slices_cover_the_real_rows() -> None:
    for batch, micro, rows in ((8, 8, 8), (8, 3, 8), (8, 3, 4), (8, 3, 1), (5, 1, 5)):
        parts = list(slices(batch, micro, rows))
        covered = [n for part in parts for n in range(part.start, part.stop)]
        assert covered == list(range(len(covered))) and rows <= len(covered) <= batch
        assert all(part.start < rows for part in parts)


def test_fingerprints() -> None:
    paper = load_config("paper")
    assert (
        fingerprint("a", {"x": 1, "y": 2}) == fingerprint("a", {"y": 2, "x": 1}) != fingerprint("a", {"x": 1, "y": 3})
    )
    assert settings_of(paper) == settings_of(load_config("paper", overrides=["memory_gib=2"]))
    assert settings_of(paper) != settings_of(load_config("paper", overrides=["umd.lr=2e-4"]))
    layer = nn.Linear(2, 2)
    before = weights_digest(layer)
    with torch.no_grad():
        layer.weight[0, 0] += 1e-6
    assert weights_digest(layer) != before
