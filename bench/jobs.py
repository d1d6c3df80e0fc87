"""From a case of the suites `io`, `train` and `infer` to calls that can be timed; both kinds of prediction."""

from __future__ import annotations

import functools
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from fastdiffclip import heap
from fastdiffclip.bench import plain
from fastdiffclip.bench.cases import Case
from fastdiffclip.bench.floors import Work
from fastdiffclip.bench.op_jobs import Jobs, Variant
from fastdiffclip.bench.setups import (
    SEED,
    FlcSetup,
    Sizes,
    SkipCase,
    UmdSetup,
    count_flops,
    draw_centres,
    flat_scene,
    flc_setup,
    parameter_bytes,
    umd_setup,
)
from fastdiffclip.kernels import FlatScene
from fastdiffclip.runtime import Compute, cpu_has_bf16

if TYPE_CHECKING:
    from fastdiffclip.infer.classifier import Classifier
    from fastdiffclip.scene.prepare import PreparedModality
    from fastdiffclip.scene.store import Scene
    from fastdiffclip.train.contrastive import FlcStep
    from fastdiffclip.train.steps import Feed
    from fastdiffclip.train.umd import UmdStep

MOST_STEPS = 100_000  # that a job may be asked for


@contextmanager
def jobs(case: Case, sizes: Mapping[str, int], device: torch.device, variants: list[Variant]) -> Iterator[Jobs]:
    """Inputs and calls of ``variants``; files that they need are removed at the end."""
    if case.name == "scene_read":
        with stored_scene(sizes["H"], sizes["W"], sizes["C"]) as (scene, pixels):
            found = Jobs(Work(bytes=2 * pixels.nbytes))
            calls = {"engine": lambda: read_blocks(scene), "plain": lambda: read_plain(scene)}
            for variant in variants:
                found.add(variant, functools.partial(calls.__getitem__, variant[0]))
            yield found
    elif case.name == "window_gather":
        yield _window_gather(sizes, variants)
    elif case.name == "umd_step_fed":
        with _fed_steps(_stage_sizes(sizes), device, variants) as found:
            yield found
    elif case.name == "predict":
        with _predict(_stage_sizes(sizes), device, variants) as found:
            yield found
    else:
        yield _step(case, _stage_sizes(sizes), device, variants)


def _stage_sizes(sizes: Mapping[str, int]) -> Sizes:
    small = Sizes.small() if sizes["P"] < 11 else Sizes()
    batch = sizes.get("B", small.umd_batch)
    return replace(
        small, bands=(sizes["C"] - 1, 1), window=sizes["P"], umd_batch=batch, flc_batch=batch,
        classes=sizes.get("K", small.classes), side=sizes.get("H", small.side),
    )  # fmt: skip


def _where(device: torch.device, dtype: str) -> Compute:
    if dtype == "bfloat16" and device.type == "cpu" and not cpu_has_bf16():
        raise SkipCase("the processor has no bfloat16 matrix products")
    return Compute(device, getattr(torch, dtype), compile=device.type == "cuda")


# --- one optimiser step ---------------------------------------------------------------------------------------------


def _step(case: Case, sizes: Sizes, device: torch.device, variants: list[Variant]) -> Jobs:
    make: Callable[..., UmdSetup | FlcSetup] = umd_setup if case.name == "umd_step" else flc_setup
    found = Jobs(_step_work(make, sizes, sizes.umd_batch if case.name == "umd_step" else sizes.flc_batch))
    for impl, dtype in variants:
        maker = _plain_step if impl == "plain" else engine_step
        found.add((impl, dtype), functools.partial(maker, make, sizes, device, dtype))
    return found


def _step_work(make: Callable[..., UmdSetup | FlcSetup], sizes: Sizes, batch: int) -> Work:
    pair = make(
        replace(sizes, umd_batch=2, flc_batch=2, side=sizes.window),
        Compute(torch.device("cpu"), torch.float32),
    )
    flops = count_flops(lambda: pair.plain_loss(0).backward()) / 2
    pixels = sum(bands * (2 if bands > 1 else 4) for bands in sizes.bands) * sizes.window**2
    return Work(flops * batch, parameter_bytes(pair.engine.model) + batch * pixels)


def engine_step(make: Callable[..., Any], sizes: Sizes, device: torch.device, dtype: str) -> Callable[[], Any]:
    """The engine's next optimiser step, at every call; ``make`` is ``umd_setup`` or ``flc_setup``."""
    setup = make(sizes, _where(device, dtype))
    setup.plain = None  # the plain one's model and cubes are not part of what is measured
    return _advancing(setup.step, device)


def _advancing(step: UmdStep | FlcStep, device: torch.device, feed: Feed | None = None) -> Callable[[], Any]:
    from fastdiffclip.train.steps import WARM_UP, take_steps

    before = None if feed is None else feed.load
    steps = take_steps(step, step.engine, lambda number: 1e-4, MOST_STEPS, before=before)
    numbers = itertools.count()
    for _ in range(WARM_UP + 1 if device.type == "cuda" else 0):  # the last one records the graph
        steps.advance(next(numbers))

    def call() -> list[float]:
        with heap.kept():  # as the loop of a run has it
            return steps.advance(next(numbers))

    return call


def _plain_step(make: Callable[..., Any], sizes: Sizes, device: torch.device, dtype: str) -> Callable[[], Any]:
    setup = make(sizes, _where(device, dtype))
    optimiser = torch.optim.Adam(setup.plain.model.parameters(), lr=1e-4, weight_decay=1e-5)
    options: dict[str, Any] = {"rng_draw": False} if isinstance(setup, UmdSetup) else {}

    def call() -> float:
        optimiser.zero_grad(set_to_none=True)
        loss = setup.plain_loss(0, **options)
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    return call


# --- one optimiser step whose windows come from a scene on disk -----------------------------------------------------


def fed_step(scene: Scene, sizes: Sizes, where: Compute, impl: str) -> UmdStep:
    """A step of UMD over ``scene``: ``resident``, or fed from ``disk`` with memory for the windows of one batch."""
    from fastdiffclip.model.mask_diffusion import MaskDiffusion
    from fastdiffclip.scene.prepare import fit_front_end
    from fastdiffclip.train.data import window_bytes
    from fastdiffclip.train.loop import start_engine
    from fastdiffclip.train.prefetch import fitting_data
    from fastdiffclip.train.umd import UmdStep
    from fastdiffclip.train.world import World

    config, front_end, batch = sizes.config(), fit_front_end("standard", [scene]), sizes.umd_batch
    config = config.model_copy(update={"umd": config.umd.model_copy(update={"samples": 4 * batch})})
    budget = batch * window_bytes([scene], front_end, sizes.window) if impl == "disk" else 1 << 62
    data = fitting_data([scene], front_end, config, SEED, where.device, World(), budget)
    model = MaskDiffusion(sizes.channels, config.model, seed=1)
    return UmdStep(data, config, SEED, where, start_engine(model, {}, config, config.umd, where, World()))


@contextmanager
def _fed_steps(sizes: Sizes, device: torch.device, variants: list[Variant]) -> Iterator[Jobs]:
    found = Jobs(_step_work(umd_setup, sizes, sizes.umd_batch))
    with ExitStack() as stack:
        scene = stack.enter_context(scene_on_disk(sizes))
        for impl, dtype in variants:

            def make(impl: str = impl, dtype: str = dtype) -> Callable[[], Any]:
                step = fed_step(scene, sizes, _where(device, dtype), impl)
                return _advancing(step, device, stack.enter_context(step.data.feed(0, MOST_STEPS)))

            found.add((impl, dtype), make)
        yield found


# --- prediction, from a scene on disk to a map on disk --------------------------------------------------------------


@dataclass(frozen=True)
class PredictSetup:
    """A scene on disk and a classifier with random weights, for both kinds of prediction."""

    scene: Scene
    classifier: Classifier
    slow: plain.PlainFlc
    folder: Path

    def engine(self) -> Any:
        """Write the map as the command does."""
        from fastdiffclip.infer.stream import predict

        return predict(self.scene, self.classifier, self.folder / "engine.tif")

    def plain_map(self) -> Any:
        """Read everything, predict in a loop, write the map."""
        from fastdiffclip.infer.raster import write_class_map

        scenes, centres = self._cubes()
        best = replace(self.slow, scenes=scenes).predict(centres).argmax(axis=1)
        class_map = np.zeros((self.scene.height, self.scene.width), np.uint8)
        class_map[centres[:, 1], centres[:, 2]] = np.array([c.value for c in self.classifier.classes])[best]
        write_class_map(
            self.folder / "plain.tif",
            class_map,
            classes=self.classifier.classes,
            crs_wkt=None,
            affine_transform=None,
        )
        return class_map

    def plain_probabilities(self) -> np.ndarray:
        """``(n, K)`` of the valid pixels, row by row."""
        scenes, centres = self._cubes()
        return replace(self.slow, scenes=scenes).predict(centres)

    def engine_probabilities(self) -> np.ndarray:
        """The same of the engine."""
        import rasterio

        from fastdiffclip.infer.stream import predict

        file = self.folder / "probabilities.tif"
        predict(self.scene, self.classifier, self.folder / "engine.tif", probabilities=file)
        with warnings.catch_warnings(action="ignore"), rasterio.open(file) as raster:  # it has no georeference
            grid: np.ndarray = raster.read()
        return grid.transpose(1, 2, 0)[~np.isnan(grid[0])]

    def _cubes(self) -> tuple[list[list[plain.Cube]], np.ndarray]:
        window = self.classifier.config.model.window
        reach, scenes = ((window // 2,) * 2,) * 2, []
        both = np.ones((self.scene.height, self.scene.width), bool)
        for name in self.scene.modalities:
            valid = self.scene.read_valid(name)
            values = self.classifier.front_end.apply(name, self.scene.read(name), valid)
            padded = np.pad(values, (*reach, (0, 0)), mode="edge")
            scenes.append([plain.Cube(padded, np.pad(valid, reach, mode="edge"), window)])
            both &= valid
        rows, cols = np.nonzero(both)
        return scenes, np.stack([np.zeros_like(rows), rows, cols], axis=1)


@contextmanager
def predict_setup(sizes: Sizes, device: torch.device, dtype: str, invalid: float = 0.0) -> Iterator[PredictSetup]:
    """A square scene of ``sizes.side`` pixels in a temporary folder, and an untrained classifier."""
    from fastdiffclip.infer.classifier import Classifier
    from fastdiffclip.model.language_classifier import LanguageClassifier
    from fastdiffclip.scene.prepare import fit_front_end
    from fastdiffclip.scene.store import ClassInfo
    from fastdiffclip.train.contrastive import text_embeddings

    where = _where(device, dtype)
    flc = flc_setup(replace(sizes, flc_batch=2, side=sizes.window), where)
    with scene_on_disk(sizes, invalid) as scene:
        model = cast(LanguageClassifier, flc.engine.model.eval())
        texts = text_embeddings(model, sizes.prompts(), where)
        classes = tuple(ClassInfo(k + 1, f"class {k + 1}", "", (k, 2 * k, 99)) for k in range(sizes.classes))
        front_end = fit_front_end("standard", [scene])
        classifier = Classifier(model, texts, classes, front_end, flc.step.config, where)
        yield PredictSetup(scene, classifier, flc.plain, scene.path.parent)


@contextmanager
def _predict(sizes: Sizes, device: torch.device, variants: list[Variant]) -> Iterator[Jobs]:
    pair = flc_setup(replace(sizes, flc_batch=2, side=sizes.window), Compute(torch.device("cpu"), torch.float32))
    with torch.no_grad():
        embed = count_flops(
            lambda: plain.embed_images(pair.plain.model, pair.plain.scenes, pair.centres, torch.device("cpu"))
        )
    area = sizes.side**2
    stored = sum(bands * (2 if bands > 1 else 4) for bands in sizes.bands)
    found = Jobs(Work(embed / 2 * area, 2.0 * area * stored))
    with ExitStack() as stack:
        for impl, dtype in variants:

            def make(impl: str = impl, dtype: str = dtype) -> Callable[[], Any]:
                setup = stack.enter_context(predict_setup(sizes, device, dtype))
                return setup.plain_map if impl == "plain" else setup.engine

            found.add((impl, dtype), make)
        yield found


# --- scenes and windows ---------------------------------------------------------------------------------------------


@contextmanager
def scene_on_disk(sizes: Sizes, invalid: float = 0.0) -> Iterator[Scene]:
    """A square scene of ``sizes.side`` pixels with all modalities, in a temporary folder."""
    from fastdiffclip.scene.store import open_scene
    from fastdiffclip.scene.writer import SceneWriter

    flats, random, side = sizes.scenes(torch.device("cpu")), np.random.default_rng(5), sizes.side
    with tempfile.TemporaryDirectory(prefix="fastdiffclip-bench-") as folder:
        with SceneWriter(Path(folder) / "scene.zarr", height=side, width=side) as writer:
            for name, flat in zip(sizes.channels, flats, strict=True):
                stored = _as_numpy(flat).reshape(side, side, -1)
                valid = random.random((side, side)) >= invalid
                writer.add_modality(name, stored, bands=stored.shape[2], dtype=str(stored.dtype), valid=valid)
        yield open_scene(Path(folder) / "scene.zarr")


@contextmanager
def stored_scene(height: int, width: int, bands: int) -> Iterator[tuple[Scene, np.ndarray]]:
    """A scene of one uint16 modality in a temporary folder, and its pixels ``(height, width, bands)``."""
    from fastdiffclip.scene.store import open_scene
    from fastdiffclip.scene.writer import SceneWriter

    pixels = np.random.default_rng(bands).integers(0, 10000, (height, width, bands), dtype=np.uint16)
    with tempfile.TemporaryDirectory(prefix="fastdiffclip-bench-") as folder:
        with SceneWriter(Path(folder) / "scene.zarr", height=height, width=width) as writer:
            writer.add_modality("hsi", pixels, bands=bands, dtype="uint16")
        yield open_scene(Path(folder) / "scene.zarr"), pixels


def read_blocks(scene: Scene) -> np.ndarray:
    """The whole scene in chunk-ordered blocks of rows, checksums compared."""
    from fastdiffclip.scene.blocks import iter_row_blocks

    out = np.empty((scene.height, scene.width, scene.modalities["hsi"].bands), np.uint16)
    for block in iter_row_blocks(scene, modalities=["hsi"]):
        out[block.rows] = block.raw["hsi"]
    return out


def read_plain(scene: Scene) -> np.ndarray:
    """The whole array through zarr's own reader."""
    import zarr

    return np.asarray(zarr.open_array(scene.path / "hsi", mode="r")[...])


def prepared(flat: FlatScene) -> tuple[PreparedModality, np.ndarray]:
    """A flat scene on the host as the window gather reads it."""
    from fastdiffclip.scene.prepare import PreparedModality

    pixels = _as_numpy(flat)
    valid = np.full(-(-len(pixels) // 8), 255, np.uint8) if flat.valid is None else flat.valid.numpy()
    return PreparedModality(pixels, flat.scale.numpy(), flat.offset.numpy(), valid), flat.extents.numpy()


def _as_numpy(flat: FlatScene) -> np.ndarray:
    return (
        flat.pixels.view(torch.int16).numpy().view(np.uint16)
        if flat.pixels.dtype == torch.uint16
        else flat.pixels.numpy()
    )


def _window_gather(sizes: Mapping[str, int], variants: list[Variant]) -> Jobs:
    from fastdiffclip.scene.windows import gather_windows

    flat = flat_scene([(sizes["H"], sizes["W"])], sizes["C"], torch.uint16, torch.device("cpu"))
    centres, (modality, extents) = draw_centres([flat], sizes["B"]).numpy(), prepared(flat)
    scenes, values = plain.cubes(flat, sizes["P"]), sizes["B"] * sizes["P"] ** 2 * sizes["C"]
    out = np.empty((sizes["B"], sizes["P"] ** 2, sizes["C"]), np.float32)
    calls: dict[str, Callable[[], Any]] = {
        "engine": lambda: gather_windows(modality, extents, centres, sizes["P"], out=out),
        "plain": lambda: plain.build_windows(scenes, centres),
    }
    found = Jobs(Work(bytes=6 * values))
    for variant in variants:
        found.add(variant, functools.partial(calls.__getitem__, variant[0]))
    return found
