"""Steps as a graph takes them, on a CPU: everything but the recording; and the compiler's view of both stages."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastdiffclip import runtime
from fastdiffclip.config import Config
from fastdiffclip.kernels import dispatch
from fastdiffclip.model.mask_diffusion import MaskDiffusion
from fastdiffclip.runtime import Compute
from fastdiffclip.scene.prepare import fit_front_end
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.contrastive import FlcStep, new_classifier
from fastdiffclip.train.data import umd_data
from fastdiffclip.train.engine import Engine
from fastdiffclip.train.flc import Shots, train_flc
from fastdiffclip.train.loop import EpochOrder, start_engine
from fastdiffclip.train.steps import REPORT, WARM_UP, GraphSteps, HostSteps, NonFiniteLoss, Steps
from fastdiffclip.train.umd import UmdResult, UmdStep, train_umd
from fastdiffclip.train.world import World

CPU = torch.device("cpu")


class Recorder:
    """Stands in for the CUDA graph: counts recordings and replays, and runs the step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.recorded = self.replayed = 0

    def __call__(self, once: Callable[[], None], device: torch.device) -> Callable[[], object]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            # A graph writes into the gradients it was recorded with; here they would add up.
            self.engine.zero()
            once()

        return replay


def with_rate_tensor(engine: Engine) -> Engine:
    """An engine as a graph needs it: the rate is a tensor."""
    for group in engine.optimiser.param_groups:
        group["lr"] = torch.tensor(1e-3)
    return engine


def sgd() -> Engine:
    """Trains one weight."""
    model = torch.nn.Linear(1, 1, bias=False)
    return with_rate_tensor(Engine(model, torch.optim.SGD(model.parameters(), lr=0.0)))


def rate(step: int) -> float:
    return 1e-3 / (1 + step)


def take(steps: Steps, first: int, last: int) -> list[float]:
    losses: list[float] = []
    for step in range(first, last):
        losses += steps.advance(step)
    return losses + steps.settle()


def umd_step(scene: Scene, config: Config, where: Compute) -> UmdStep:
    front_end = fit_front_end(config.prepare, [scene], config.components)
    data = umd_data([scene], front_end, config.umd.samples, config.model.window, 0, 1 << 30, CPU)
    engine = start_engine(MaskDiffusion(front_end.channels, config.model), {}, config, config.umd, where, World())
    return UmdStep(data, config, 0, where, engine)


@pytest.mark.parametrize("first", [0, 5])
def test_a_graph_takes_the_same_steps(small_scene: Scene, small_config: Config, first: int) -> None:
    """Learning rate, order, masks, noise and losses, all found on the device, against the host's own loop."""
    total, where = 3 * REPORT + 5, Compute(CPU, torch.float32)
    host, graph = (umd_step(small_scene, small_config, where) for _ in range(2))
    expected = take(HostSteps(host, host.engine, rate), first, total)
    recorder = Recorder(with_rate_tensor(graph.engine))
    steps = GraphSteps(graph, graph.engine, rate, total, first, recorder)
    assert take(steps, first, total) == pytest.approx(expected, rel=1e-5)
    assert recorder.recorded == 1 and recorder.replayed == total - first - WARM_UP
    # Keys' biases have no gradient but rounding, which Adam blows up to full steps: all weights together count.
    ours, theirs = (torch.cat([p.detach().flatten() for p in step.engine.model.parameters()]) for step in (graph, host))
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_losses_come_late_and_in_order() -> None:
    engine = sgd()

    def loss_of(number: torch.Tensor) -> torch.Tensor:
        (engine.model.weight.sum() * 0).backward()
        return number.float()

    steps = GraphSteps(loss_of, engine, rate, 200, 0, Recorder(engine))
    told: list[float] = []
    lag = 0
    for step in range(100):
        told += steps.advance(step)
        lag = max(lag, step + 1 - len(told))
    assert lag == 3 * REPORT - 1  # two reports behind, so that the device always has work
    assert told + steps.settle() == [float(step) for step in range(100)]
    assert steps.settle() == []  # nothing is told twice
    assert take(steps, 100, 200) == [float(step) for step in range(100, 200)]


def test_a_graph_names_the_step_whose_loss_is_no_number() -> None:
    engine = sgd()

    def loss_of(number: torch.Tensor) -> torch.Tensor:
        (engine.model.weight.sum() * 0).backward()
        return torch.where(number == 21, float("nan"), 1.0)

    steps = GraphSteps(loss_of, engine, rate, 200, 0, Recorder(engine))
    with pytest.raises(NonFiniteLoss) as raised:
        take(steps, 0, 200)
    assert raised.value.step == 21 and np.isnan(raised.value.loss)


@pytest.mark.parametrize(("samples", "batch"), [(40, 16), (12, 12), (5, 1), (7, 4)])
def test_epochs_are_permutations(samples: int, batch: int) -> None:
    order = EpochOrder(3, samples, batch, CPU)
    for epoch in range(3):
        seen = []
        for number in range(order.steps_per_epoch):
            chosen, rows, total = order(torch.tensor(epoch * order.steps_per_epoch + number))
            assert chosen.shape == (batch,) and 1 <= int(rows) == int(total) <= batch
            assert (chosen[int(rows) :] == chosen[0]).all()
            seen += chosen[: int(rows)].tolist()
        assert sorted(seen) == list(range(samples))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Compute:
    """A CPU on which everything is traced as one graph; the code generator itself would take a minute."""
    monkeypatch.setattr(runtime, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    return Compute(CPU, torch.float32, compile=True)


def test_compiled_steps_are_one_graph_and_never_compile_again(
    small_scene: Scene, small_config: Config, small_shots: Shots, small_umd: UmdResult, traced: Compute
) -> None:
    """Two epochs of both stages, their short last batches included; fullgraph makes a break an error."""
    config = small_config.model_copy(update={"umd": small_config.umd.model_copy(update={"micro_batch": 16})})
    umd = umd_step(small_scene, config, traced)
    model = new_classifier(small_umd.front_end, config, small_umd, 0)
    windows = WindowSource([small_scene], small_umd.front_end, 3, 1 << 30).windows(small_shots.centres)
    images = [torch.from_numpy(part) for part in windows]
    engine = start_engine(model, {}, config, config.flc, traced, World())
    flc = FlcStep(images, small_shots.indices(), small_shots.prompts, config, 0, traced, engine)
    for step in (umd, flc):
        assert step.order.samples % step.batch != 0
        assert np.isfinite(float(step(torch.tensor(0))))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for number in range(1, 2 * step.order.steps_per_epoch):
                step.engine.zero()
                assert np.isfinite(float(step(torch.tensor(number))))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_training_gives_the_same_losses(
    small_scene: Scene, small_config: Config, small_shots: Shots, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(runtime, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    if precision == "bf16":
        # Compiled code traces the reference of these. Where a native one rounds some bfloat16 to its other neighbour,
        # the losses are a tenth apart 20 steps later, as those of two attentions are.
        for op in ("gelu", "residual_norm"):
            monkeypatch.setitem(dispatch._OPS, op, {"reference": dispatch._OPS[op]["reference"]})
        monkeypatch.setattr("fastdiffclip.kernels.native.matmul.outruns_torch", lambda dtype: False)
    found = []
    for switch in ("off", "on"):
        umd_config = small_config.umd.model_copy(update={"epochs": 2, "micro_batch": 16})
        changes = {"compile": switch, "precision": precision, "umd": umd_config}
        config = small_config.model_copy(update=changes)
        umd = train_umd([small_scene], config, device="cpu")
        found.append(umd.losses + train_flc([small_scene], small_shots, config, umd=umd, device="cpu").losses)
    assert found[1] == pytest.approx(found[0], rel=1e-4 if precision == "fp32" else 2e-2)
