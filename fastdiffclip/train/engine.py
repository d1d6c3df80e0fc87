"""What turns gradients into new weights: one process, data-parallel processes, or DeepSpeed.

All see the same shares of the same batch, sum the same gradients and keep the same state, so the number of processes
and the engine do not change a run, and a checkpoint of one continues in another.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastdiffclip import checkpoint
from fastdiffclip.config import Config
from fastdiffclip.errors import ResourceError, UsageError
from fastdiffclip.files import config_text
from fastdiffclip.train.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")
ALONE = World()


class Engine:
    """One process; also what the others build on.

    Args:
        model: what is trained; its ``forward`` is what :attr:`network` calls.
        optimiser: Adam over its parameters.
        clip: largest norm of the whole gradient; 0 leaves it as it is.
        world: the processes of the run.
    """

    def __init__(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, clip: float = 0.0, world: World = ALONE
    ) -> None:
        self.model, self.optimiser, self.clip, self.world = model, optimiser, clip, world
        self.network: nn.Module = model
        self.device = next(model.parameters()).device

    def micro(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; ``last``: of its step."""
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of this process's part of the loss; after the last they are those of the whole batch."""
        loss.backward()

    def zero(self) -> None:
        """Forget the gradients."""
        self.optimiser.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Change the weights; the learning rate is that of the optimiser's groups."""
        if self.clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimiser.step()

    def state(self) -> dict[str, Tensor]:
        """Weights (``model.<name>``) and moments (``optimiser.<number>.<key>``), whole; all processes must ask."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        return tensors | checkpoint.optimiser_tensors(self.optimiser)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the moments of :meth:`state`; weights are put into the model before the engine is made."""
        checkpoint.restore_optimiser(self.optimiser, tensors)


class DdpEngine(Engine):
    """torch's DistributedDataParallel: every process holds everything, gradients are summed while they are made."""

    def __init__(self, model: nn.Module, optimiser: torch.optim.Optimizer, clip: float, world: World) -> None:
        super().__init__(model, optimiser, clip, world)
        ids = [self.device.index] if self.device.type == "cuda" else None
        self.parallel = nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        self.network = self.parallel

    def micro(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.parallel.no_sync()

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss * self.world.size).backward()  # it averages over processes, the shares are to be summed

    def zero(self) -> None:
        self.optimiser.zero_grad(set_to_none=False)  # they are views of its buckets


class DeepSpeedEngine(Engine):
    """DeepSpeed with ZeRO stage 0 to 3: optimiser state, gradients and weights are shared out among the processes."""

    def __init__(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, clip: float, world: World, stage: int
    ) -> None:
        super().__init__(model, optimiser, clip, world)
        deepspeed = _import_deepspeed(self.device)
        settings = json.loads(config_text(f"deepspeed_zero{stage}.json"))
        settings["gradient_clipping"] = clip
        self.stage = stage
        self.parameters = [p for group in optimiser.param_groups for p in group["params"]]
        self.deepspeed, wrapped, _, _ = deepspeed.initialize(model=model, optimizer=optimiser, config=settings)
        self.network, self.optimiser = self.deepspeed, wrapped
        self._inner = getattr(wrapped, "optimizer", wrapped)
        self._start_moments()

    def _start_moments(self) -> None:
        """Moments of zero, now: ZeRO makes them at the first step, and 1 and 2 make known those of one group alone.

        What is reached into is that of the version in constraints.txt; the tests take every stage.
        """
        zero: Any = self.optimiser
        flats = [p for group in self._inner.param_groups for p in group["params"]]
        if self.stage == 3:
            flats = zero.fp32_partitioned_groups_flat
        for flat in flats:
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            self._inner.state[flat] = {"step": torch.zeros((), device=flat.device), **moments}
        if self.stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss * self.world.size)  # it averages over processes, the shares are to be summed
        if not last:
            self.deepspeed.step()  # counts the micro-batch

    def zero(self) -> None:
        """DeepSpeed forgets them itself after each step."""

    def step(self) -> None:
        self.deepspeed.step()

    def state(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return super().state()
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                tensors[f"model.{name}"] = _whole(safe_get_full_fp32_param(parameter))
            elif self.stage == 3:
                with deepspeed.zero.GatheredParameters([parameter]):
                    tensors[f"model.{name}"] = parameter.detach().clone()
        count = next(iter(self._inner.state.values()))["step"]
        for number, parameter in enumerate(self.parameters):
            for key in MOMENTS:
                tensors[f"optimiser.{number}.{key}"] = _whole(safe_get_full_optimizer_state(parameter, key))
            tensors[f"optimiser.{number}.step"] = count.detach().clone()
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        if self.stage == 0:
            return super().restore(tensors)
        from deepspeed.utils import safe_set_full_optimizer_state

        for number, parameter in enumerate(self.parameters):
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, tensors[f"optimiser.{number}.{key}"], key)
        for entry in self._inner.state.values():
            entry["step"].copy_(tensors["optimiser.0.step"])
        return None


def _whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "DeepSpeed holds no such tensor"
    return tensor.detach().clone()


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed quietly, for the device of the run. Raises :class:`ResourceError` when it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
        from deepspeed.ops import __compatible_ops__
    except ImportError as error:
        raise ResourceError(
            f"--engine deepspeed needs the package deepspeed ({error}); pip install 'fastdiffclip[scale]'"
        ) from None
    __compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles a C++ op for half a minute, for one message
    return deepspeed


def choose_engine(
    model: nn.Module, optimiser: torch.optim.Optimizer, clip: float, config: Config, world: World
) -> Engine:
    """The engine that ``engine`` and ``zero`` ask for; ``auto``: one process alone, DDP among several.

    Raises:
        UsageError: ``zero`` without DeepSpeed, or several processes for the engine of one.
        ResourceError: the package is missing.
    """
    name = config.engine if config.engine != "auto" else ("single" if world.size == 1 else "ddp")
    if config.zero and name != "deepspeed":
        raise UsageError(f"--zero {config.zero} is a stage of DeepSpeed; add --engine deepspeed")
    if name == "single" and world.size > 1:
        raise UsageError(f"--engine single is for one process, and there are {world.size}; use ddp or deepspeed")
    if name == "deepspeed":
        _rendezvous_of_one(world)
        return DeepSpeedEngine(model, optimiser, clip, world, config.zero)
    if name == "ddp" and world.size > 1:
        return DdpEngine(model, optimiser, clip, world)
    return Engine(model, optimiser, clip, world)


def _rendezvous_of_one(world: World) -> None:
    """A process alone meets itself: DeepSpeed looks for MPI otherwise."""
    if world.size == 1 and not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        device = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(device, store=store, rank=0, world_size=1)
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            os.environ.setdefault(name, value)
