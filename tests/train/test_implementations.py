"""One run, whatever computes it: 30 steps of both stages with every implementation of the ops forced."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastdiffclip.config import Config, ModelConfig
from fastdiffclip.kernels import dispatch
from fastdiffclip.scene.store import Scene
from fastdiffclip.train.flc import Shots, train_flc
from fastdiffclip.train.umd import train_umd

STEPS = 30
# Of this code with the reference of every op; a change of these is a change of the method.
GOLDEN_UMD = [
    5.0207181, 1.4262664, 2.8162217, 3.6038842, 2.8592944, 2.8433661,
    2.8971534, 2.8392067, 2.2881689, 3.7610054, 3.4648762, 1.3725655,
    3.6695189, 1.6343381, 2.903657, 2.0071194, 1.6824794, 3.2564774,
    1.9440416, 2.4074705, 2.3230968, 1.8004489, 3.5112495, 1.5281515,
    2.3157651, 3.1277428, 2.532706, 1.8090775, 2.0462368, 3.1867967,
]  # fmt: skip
GOLDEN_FLC = [
    2.1227288, 1.3774246, 2.3287864, 1.4618435, 2.0684521, 1.4056933,
    2.0930955, 1.3893059, 2.0766373, 1.3606476, 2.0530846, 1.3394492,
    2.0382762, 1.3142653, 2.0136676, 1.2728796, 1.9200159, 1.3897569,
    1.7875595, 1.0514898, 1.6387565, 0.82702684, 1.5313224, 0.92219543,
    1.5130512, 0.89606637, 1.4917984, 0.88741124, 1.473583, 0.87082428,
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny_config(small_config: Config) -> Config:
    """Interpreted kernels cost milliseconds a program: as few of them as a run of both stages can have."""
    model = ModelConfig(
        window=3, width=8, depth=1, heads=1, decoder_width=8, decoder_depth=1, embedding=8, text_width=8,
        text_depth=1, text_heads=1,
    )  # fmt: skip
    umd = small_config.umd.model_copy(update={"epochs": STEPS // 2, "batch": 4, "samples": 7, "micro_batch": 4})
    flc = small_config.flc.model_copy(update={"epochs": STEPS // 2, "batch": 8})
    return small_config.model_copy(update={"model": model, "umd": umd, "flc": flc})


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """Every op that has the implementation runs it, the others their reference; the ops that ran it are counted."""
    name = str(request.param)
    asked = set()

    def choose(op: str, impl: str | None, device: torch.device, unsupported: object) -> str:
        taken = name if name in dispatch._OPS[op] else "reference"
        asked.add((op, taken))
        return taken

    monkeypatch.setattr(dispatch, "_choose", choose)
    yield name
    ran = {op for op, taken in asked if taken == name}
    wanted = {op for op, table in dispatch._OPS.items() if name in table and op != "contrastive_columns"}
    assert ran == wanted, f"{name} was to run {sorted(wanted)} and ran {sorted(ran)}"


def losses(scene: Scene, shots: Shots, config: Config) -> tuple[list[float], list[float]]:
    umd = train_umd([scene], config, device="cpu")
    return umd.losses, train_flc([scene], shots, config, umd=umd, device="cpu").losses


@pytest.mark.parametrize("forced", dispatch.IMPLEMENTATIONS, indirect=True)
def test_thirty_steps_are_the_same_run(
    forced: str, small_scene: Scene, small_shots: Shots, tiny_config: Config
) -> None:
    umd, flc = losses(small_scene, small_shots, tiny_config)
    assert len(umd) == len(flc) == STEPS
    # Rounding at each step moves the weights of the next: 30 steps of Adam turn 1e-7 into a few 1e-6.
    assert umd == pytest.approx(GOLDEN_UMD, rel=2e-5)
    assert flc == pytest.approx(GOLDEN_FLC, rel=2e-5)
