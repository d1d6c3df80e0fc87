"""Synthetic scenes, models and steps of any size, for the gate and for what is timed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastdiffclip.bench import plain
from fastdiffclip.kernels import FlatScene, philox

if TYPE_CHECKING:
    from fastdiffclip.config import Config
    from fastdiffclip.runtime import Compute
    from fastdiffclip.train.contrastive import FlcStep
    from fastdiffclip.train.engine import Engine
    from fastdiffclip.train.umd import UmdStep


SEED = 3  # of the steps


class SkipCase(Exception):
    """A case, or one implementation of it, cannot run here; the message is the reason that the report states."""


def flat_scene(
    sizes: list[tuple[int, int]],
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
    invalid: float = 0.0,
) -> FlatScene:
    """Scenes of (height, width) ``sizes`` with random pixels, a share ``invalid`` of them invalid; always the same."""
    random = np.random.default_rng([channels, len(sizes)])
    counts = [height * width for height, width in sizes]
    total = sum(counts)
    if dtype in (torch.uint16, torch.int16):
        stored = torch.from_numpy(random.integers(0, 10000, (total, channels), dtype=np.uint16))
        stored = stored if dtype == torch.uint16 else stored.view(torch.int16)
        scale, offset = np.full(channels, 1 / 2887.0), np.linspace(-1.9, -1.6, channels)
    else:
        stored = torch.from_numpy(random.standard_normal((total, channels), dtype=np.float32)).to(dtype)
        scale, offset = np.linspace(0.9, 1.1, channels), np.linspace(-0.1, 0.1, channels)
    valid = random.random(total) >= invalid
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    valid[first] = True  # every scene has a centre to choose
    extents = np.column_stack([first, np.array(sizes)]).astype(np.int64)
    return FlatScene(
        stored.to(device),
        torch.from_numpy(scale.astype(np.float32)).to(device),
        torch.from_numpy(offset.astype(np.float32)).to(device),
        torch.from_numpy(np.packbits(valid, bitorder="little")).to(device) if invalid else None,
        torch.from_numpy(extents).to(device),
    )


def draw_centres(scenes: list[FlatScene], rows: int, seed: int = 0) -> Tensor:
    """``(rows, 3)`` int64 centres, valid in all modalities, with repeats where there are few; on the scenes' device."""
    pixels = len(scenes[0].pixels)
    valid = np.ones(pixels, bool)
    for scene in scenes:
        if scene.valid is not None:
            valid &= np.unpackbits(scene.valid.cpu().numpy(), count=pixels, bitorder="little").astype(bool)
    chosen = np.random.default_rng(seed).choice(np.flatnonzero(valid), rows)
    extents = scenes[0].extents.cpu().numpy()
    number = np.searchsorted(extents[:, 0], chosen, side="right") - 1
    row, col = np.divmod(chosen - extents[number, 0], extents[number, 2])
    return torch.from_numpy(np.stack([number, row, col], axis=1)).to(scenes[0].device)


@dataclass(frozen=True)
class Sizes:
    """Shape of a whole stage; the defaults are the paper's (Houston 2013: 144 bands and a surface height)."""

    bands: tuple[int, ...] = (144, 1)
    window: int = 11
    width: int = 128
    depth: int = 4
    decoder_depth: int = 3
    classes: int = 15
    umd_batch: int = 256
    flc_batch: int = 64
    side: int = 256

    @classmethod
    def small(cls, **changes: Any) -> Sizes:
        """A shape that runs in milliseconds."""
        small = cls((9, 1), 5, width=32, depth=2, decoder_depth=1, classes=4, umd_batch=12, flc_batch=10, side=14)
        return replace(small, **changes)

    @property
    def channels(self) -> dict[str, int]:
        """Name of each modality to its bands."""
        return {f"modality{m}": count for m, count in enumerate(self.bands)}

    def config(self, micro_batch: int = 0) -> Config:
        """Settings of both stages in the paper's recipe."""
        from fastdiffclip.config import build_config

        return build_config({
            "recipe": "custom",
            "model": {"window": self.window, "width": self.width, "depth": self.depth, "decoder_width": self.width,
                      "decoder_depth": self.decoder_depth, "embedding": self.width, "text_width": self.width,
                      "heads": 8 if self.width >= 64 else 2, "text_heads": 8 if self.width >= 64 else 2},
            "umd": {"batch": self.umd_batch, "micro_batch": micro_batch},
            "flc": {"batch": self.flc_batch},
        })  # fmt: skip

    def scenes(self, device: torch.device, invalid: float = 0.0) -> list[FlatScene]:
        """One flat scene per modality: uint16 where it has several bands, float32 for one."""
        areas = [(self.side, self.side), (self.window + 2, 3)] if invalid else [(self.side, self.side)]
        return [flat_scene(areas, c, torch.uint16 if c > 1 else torch.float32, device, invalid) for c in self.bands]

    def prompts(self) -> list[str]:
        """One text per class, of the length of the paper's longest prompt style."""
        kinds = ("grass", "asphalt", "a tiled roof", "water", "bare soil", "trees", "concrete", "metal")
        return [
            f"A remote sensing window of class {k}: {kinds[k % len(kinds)]} seen from above, with its neighbours, "
            f"its typical spectrum and its height above the ground."
            for k in range(self.classes)
        ]


@dataclass
class UmdSetup:
    """One UMD step twice: the engine's and the plain one, on equal weights of their own."""

    step: UmdStep
    engine: Engine
    plain: plain.PlainUmd
    batch: int
    seed: int

    def engine_loss(self, number: int) -> float:
        """The engine's loss of optimiser step ``number``; gradients are added to its parameters'."""
        return float(self.step(torch.tensor(number, device=self.step.where.device)))

    def plain_loss(self, number: int, rng_draw: bool = True) -> Tensor:
        """The plain loss of optimiser step ``number``: the engine's windows; its masks, noise and t if ``rng_draw``."""
        step, device = self.step, self.plain.schedule.device
        centres = step.data.centres[step.order.real(number)].cpu().numpy()
        tokens, steps = step.config.model.tokens, step.config.umd.timesteps
        if rng_draw:
            rng = philox.rng_state(self.seed, number)
            times = philox.uniform_integers(rng, philox.TIMESTEP, len(centres), steps).to(device)
            return self.plain.loss(centres, times, plain.shared_draw(rng, tokens, step.visible, device))
        times = torch.randint(steps, (len(centres),), device=device)
        return self.plain.loss(centres, times, plain.torch_draw(tokens, step.visible, device))


def umd_setup(
    sizes: Sizes, where: Compute, plain_device: torch.device | None = None, samples: int | None = None,
    invalid: float = 0.0, micro_batch: int = 0, seed: int = SEED,
) -> UmdSetup:  # fmt: skip
    """Models, data and both kinds of step; ``samples`` windows, None for one batch (then no batch is short)."""
    from fastdiffclip.model.mask_diffusion import MaskDiffusion
    from fastdiffclip.train.data import UmdData
    from fastdiffclip.train.loop import start_engine
    from fastdiffclip.train.umd import UmdStep
    from fastdiffclip.train.world import World

    config, there = sizes.config(micro_batch), plain_device or where.device
    flat = sizes.scenes(where.device, invalid)
    model = MaskDiffusion(sizes.channels, config.model, seed=1)
    copied = copy.deepcopy(model).to(there)
    engine = start_engine(model, {}, config, config.umd, where, World())
    centres = draw_centres(flat, samples or sizes.umd_batch)
    step = UmdStep(UmdData(flat, centres), config, seed, where, engine)
    weights = (config.umd.masked_weight, config.umd.visible_weight)
    host = [plain.cubes(scene, sizes.window) for scene in flat]
    return UmdSetup(step, engine, plain.PlainUmd(copied, host, step.schedule.to(there), weights), step.batch, seed)


@dataclass
class FlcSetup:
    """One FLC step twice, on equal weights of their own."""

    step: FlcStep
    engine: Engine
    plain: plain.PlainFlc
    centres: np.ndarray
    batch: int

    def engine_loss(self, number: int) -> float:
        """See :meth:`UmdSetup.engine_loss`."""
        return float(self.step(torch.tensor(number, device=self.step.where.device)))

    def plain_loss(self, number: int) -> Tensor:
        """The plain loss of optimiser step ``number``, on the engine's batch."""
        step = self.step
        order = step.order.real(number).cpu()
        labels = step.labels.cpu()[order].to(self.plain.tokens.device)
        return self.plain.loss(self.centres[order.numpy()], labels)


def flc_setup(
    sizes: Sizes, where: Compute, plain_device: torch.device | None = None, samples: int | None = None,
    invalid: float = 0.0, seed: int = SEED,
) -> FlcSetup:  # fmt: skip
    """Models, labelled windows and both kinds of step; classes of unequal size."""
    from fastdiffclip.model.language_classifier import LanguageClassifier
    from fastdiffclip.model.text import load_tokenizer
    from fastdiffclip.train.contrastive import FlcStep
    from fastdiffclip.train.loop import start_engine
    from fastdiffclip.train.world import World

    config, there, tokenizer = sizes.config(), plain_device or where.device, load_tokenizer()
    flat = sizes.scenes(torch.device("cpu"), invalid)
    model = LanguageClassifier(sizes.channels, config.model, tokenizer.vocab_size, seed=1)
    copied = copy.deepcopy(model).to(there)
    count = samples or sizes.flc_batch
    centres = draw_centres(flat, count).numpy()
    labels = torch.from_numpy((sizes.classes * np.random.default_rng(1).random(count) ** 2).astype(np.int64))
    host = [plain.cubes(scene, sizes.window) for scene in flat]
    windows = [plain.build_windows(scenes, centres)[0].to(where.device) for scenes in host]
    engine = start_engine(model, {}, config, config.flc, where, World())
    step = FlcStep(windows, labels, sizes.prompts(), config, seed, where, engine)
    tokens, end = (part.to(there) for part in tokenizer.encode_batch(sizes.prompts()))
    return FlcSetup(step, engine, plain.PlainFlc(copied, host, tokens, end), centres, step.batch)


def count_flops(call: Callable[[], Any]) -> float:
    """FLOPs of the matrix products of a call, backward included, as torch's own counter sees them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def parameter_bytes(model: torch.nn.Module) -> float:
    """Bytes that one Adam step moves for the weights: weight and two moments read and written, gradient twice."""
    return 4.0 * 8 * sum(p.numel() for p in model.parameters())


def without_paths(text: str) -> str:
    """``text`` with file names in place of absolute paths: results are shared, the folders of a machine are not."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/:,;']+/)+(?=[^\s/])", "", text)


def named(mapping: Mapping[str, int]) -> str:
    """``B=256,P=11``: how a shape stands in a row."""
    return ",".join(f"{key}={value}" for key, value in mapping.items())
