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

from fastdiffclip.config import Config, UmdConfig, load_config
from fastdiffclip.errors import InputDataError, InterruptedRunError, UsageError
from fastdiffclip.runtime import Compute
from fastdiffclip.train.engine import Engine
from fastdiffclip.train.loop import Loop, adam, fingerprint, settings_of, slices, start_engine, weights_digest
from fastdiffclip.train.steps import StepLoss
from fastdiffclip.train.world import World


class Small(Loop):
    """A loop over one linear layer; its step draws nothing."""

    def __init__(self, folder: Path | None = None, total: int = 6, identity: str = "id") -> None:
        super().__init__("train", total, lambda s: 0.1 / (s + 1), folder, identity)
        self.layer = nn.Linear(2, 1, bias=False)
        nn.init.ones_(self.layer.weight)
        self.engine: Engine | None = None

    def start(self, first: int = 0, found: dict[str, torch.Tensor] | None = None) -> Engine:
        where = Compute(torch.device("cpu"), torch.float32)
        stage = UmdConfig(lr=1.0, weight_decay=0.0)
        self.engine = start_engine(self.layer, found or {}, Config(), stage, where, World())
        return self.engine

    def go(self, signals: dict[int, int] | None = None) -> list[float]:
        first, found = self.resume()
        return self.run(loss_of(self.layer, signals), self.start(first, found), 1, first)


def loss_of(layer: nn.Module, signals: dict[int, int] | None = None) -> StepLoss:
    def take(step: torch.Tensor) -> torch.Tensor:
        number = int(step)
        if signals and number in signals:
            os.kill(os.getpid(), signals[number])
        loss = (layer(torch.tensor([[1.0, number + 1.0]])) - 3.0).square().sum()
        loss.backward()
        return loss.detach()

    return take


def test_schedule_log_and_losses(tmp_path: Path) -> None:
    loop = Small(tmp_path)
    weight = loop.layer.weight
    seen: list[tuple[str, int, int]] = []
    loop.progress = lambda task, done, total, note="": seen.append((task, done, total))
    losses = loop.go()
    assert len(losses) == 6 and losses[0] == 1.0
    assert seen == [("train", n, 6) for n in range(1, 7)]
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == pytest.approx(losses, rel=1e-6)
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([0.1 / (s + 1) for s in range(6)])
    assert sorted(os.listdir(tmp_path)) == ["log.csv"]

    other = Small()
    reference = other.layer.weight
    optimiser = torch.optim.Adam([reference])
    for step in range(6):
        optimiser.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimiser.zero_grad()
        loss_of(other.layer)(torch.tensor(step))
        optimiser.step()
    torch.testing.assert_close(weight, reference)


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loop = Small()
    assert loop.resume() == (0, {})
    loop.go()
    assert loop.engine is not None
    loop.save(3, loop.engine)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(value: float) -> None:
    loop = Small()
    good, weight = loss_of(loop.layer), loop.layer.weight
    before: list[torch.Tensor] = []

    def step(number: torch.Tensor) -> torch.Tensor:
        if number == 3:
            before.append(weight.detach().clone())
            good(number)
            return torch.tensor(value)
        return good(number)

    with pytest.raises(InputDataError, match=rf"train: the loss became {value} at step 3; lower the learning rate"):
        loop.run(step, loop.start(), 1)
    assert torch.equal(weight, before[0]) and len(loop.losses) == 3


@pytest.mark.parametrize("at", [0, 2, 5])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tmp_path: Path, at: int, number: int, code: int) -> None:
    whole = Small()
    losses = whole.go()
    first = Small(tmp_path)
    with pytest.raises(InterruptedRunError, match=f"after step {at + 1} of 6; continue with --resume") as raised:
        first.go({at: number})
    assert raised.value.exit_code == code
    second = Small(tmp_path)
    assert second.resume()[0] == at + 1
    assert second.go() == losses
    assert torch.equal(second.layer.weight, whole.layer.weight)


def test_an_interrupted_run_without_a_folder_promises_nothing() -> None:
    with pytest.raises(InterruptedRunError, match=r"after step 2 of 6$"):
        Small().go({1: signal.SIGINT})


def test_checkpoints_come_with_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiffclip.train.loop.CHECKPOINT_SECONDS", -1.0)
    Small(tmp_path).go()
    assert sorted(path.stem for path in (tmp_path / "checkpoints").glob("*.json")) == ["000000004", "000000005"]
    with pytest.raises(UsageError, match="other settings"):
        Small(tmp_path, identity="other").resume()


@pytest.mark.parametrize("last", [False, True])
def test_a_signal_that_comes_while_processes_agree_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    """It stops the next step; after the last one it goes to whoever handles signals then."""
    agree, heard, calls = World.agree, [], [0]

    def late(self: World, due: bool, number: int | None, device: torch.device) -> tuple[bool, int | None]:
        calls[0] += 1
        if calls[0] == (6 if last else 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return agree(self, due, number, device)

    monkeypatch.setattr(World, "agree", late)
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        if last:
            assert len(Small(tmp_path).go()) == 6 and heard == [signal.SIGTERM]
        else:
            with pytest.raises(InterruptedRunError, match="after step 4 of 6"):
                Small(tmp_path).go()
            assert heard == []
    finally:
        signal.signal(signal.SIGTERM, before)


TWICE = """
import os, signal
from pathlib import Path
import torch
from fastdiffclip.train.loop import Loop, adam
from fastdiffclip.train.engine import Engine
layer = torch.nn.Linear(2, 1)
def step(number):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("the second signal came back")
Loop("train", 9, lambda s: 0.1, Path({out!r})).run(step, Engine(layer, adam(layer, 0.1, 0.0)), 1)
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
