"""Whole-scene prediction in bounded memory: read, projected, classified and written block by block, resumable.

Blocks of the scene are read in order (``pipeline``), every pixel goes through its stem once, and windows are gathered
from the result (``engine``). Finished tiles stand in raw files beside the output (``unfinished``), from which one pass
makes the GeoTIFF (``finish``). Several processes share the blocks (``crew``).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastdiffclip import __version__, heap
from fastdiffclip.errors import FastDiffCLIPError, InputDataError, ResourceError, UsageError
from fastdiffclip.infer import unfinished
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.infer.cog import Grid
from fastdiffclip.infer.crew import FAILED, Claims, Crew
from fastdiffclip.infer.engine import Engine, Region, open_engine
from fastdiffclip.infer.finish import Outputs, count_classes, layers_of, write_outputs
from fastdiffclip.infer.interest import Interest, cropped_transform, interest_of
from fastdiffclip.infer.pipeline import Rolling, Room, Writer, in_background, read_pieces
from fastdiffclip.infer.plan import Plan, make_plan, seconds_per_pixel
from fastdiffclip.infer.raster import read_class_map
from fastdiffclip.infer.tiles import Block, Tiling, cut_blocks
from fastdiffclip.infer.unfinished import Unfinished
from fastdiffclip.runtime import Progress, StopRequest, deferred_signals, silent
from fastdiffclip.scene.store import Scene
from fastdiffclip.scene.windows import require_whole_windows

_PATIENCE = 0.1  # seconds between looks at what the other processes have done


@dataclass(frozen=True)
class Prediction:
    """What a prediction made; nothing in a process that only helped another one.

    Attributes:
        areas: one row per class: value, name, pixels, share, hectares.
        files: what was written, the map first.
        pixels: of the map. nodata_pixels: of these, without a class.
    """

    areas: list[dict[str, Any]]
    files: list[Path]
    seconds: float
    pixels: int
    nodata_pixels: int

    @cached_property
    def class_map(self) -> np.ndarray:
        """``(H, W)`` uint16 class values, 0 = nodata, read from the map when it is first asked for."""
        return read_class_map(self.files[0]).values


def predict(
    scene: Scene,
    model: Classifier | Path | str,
    out: Path | str,
    *,
    probabilities: Path | str | None = None,
    confidence: Path | str | None = None,
    png: Path | str | None = None,
    reject: float | None = None,
    bbox: str | None = None,
    mask: Path | str | None = None,
    device: str = "auto",
    memory: int | None = None,
    device_memory: int | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Prediction:
    """Classify the pixels of a scene and write the map.

    What is done stands in a folder beside ``out`` until the map is there; an error or interrupt leaves it for
    ``resume``, which gives the same bytes. Under torchrun the processes share the work and the first one writes.

    Args:
        scene: an opened scene with the modalities of the model.
        model: a classifier, or the folder of a finished ``train-flc`` run.
        out: GeoTIFF of class values on the scene's grid, 0 = nodata, with colour table and class names.
        probabilities: float32 GeoTIFF with one band per class, NaN = nodata.
        confidence: float32 GeoTIFF of the largest class probability of each pixel, NaN = nodata.
        png: picture of the map with a legend.
        reject: pixels whose largest probability is below it become ``none of these``, a class of its own in the map.
        bbox, mask: what to predict, see :mod:`fastdiffclip.infer.interest`; with ``bbox`` the outputs cover the box.
        memory, device_memory: bytes that this process and its GPU may take; they do not change the result.

    Raises:
        InputDataError: the scene's bands differ from those that the model was trained on, or no pixel is valid.
        UsageError: another process is at work on ``out``, or what there is to resume is another prediction.
        ResourceError: an output cannot be written, or memory is too small; nothing is left half-written.
    """
    paths = [None if path is None else Path(path) for path in (probabilities, confidence, png)]
    if reject is not None and not 0.0 < reject <= 1.0:
        raise UsageError(f"a pixel is rejected below a probability above 0 and at most 1; got {reject:g}")
    outputs = Outputs(Path(out), paths[0], paths[1], paths[2], reject)
    with open_job(scene, model, outputs, interest_of(scene, bbox, mask), device) as job:
        return job.run(job.plan(memory, device_memory), resume, progress)


@contextmanager
def open_job(
    scene: Scene, model: Classifier | Path | str, outputs: Outputs, interest: Interest, device: str = "auto"
) -> Iterator[Job]:
    """A prediction that can be planned and run; see :func:`predict`."""
    crew = Crew.of_environment()
    classifier = model if isinstance(model, Classifier) else Classifier.load(Path(model), crew.device(device))
    classifier.front_end.check(scene)
    require_whole_windows([scene], classifier.config.model.window)
    with open_engine(classifier) as engine:
        yield Job(scene, engine, outputs, interest, crew)


class Job:
    """One prediction; see :func:`open_job`."""

    def __init__(self, scene: Scene, engine: Engine, outputs: Outputs, interest: Interest, crew: Crew) -> None:
        self.scene, self.engine, self.outputs, self.interest, self.crew = scene, engine, outputs, interest, crew
        self.classes = engine.classifier.classes
        self.layers = outputs.layers(self.classes)
        self.tiling = Tiling.of(scene.height, scene.width, engine.batches.tile)
        self.wanted_tiles = self.tiling.tiles_of(interest.area)
        self.grid = Grid(scene.crs_wkt, cropped_transform(scene.affine_transform, interest.area))

    def plan(self, memory: int | None = None, device_memory: int | None = None, measure: bool = False) -> Plan:
        """How it would run; ``measure`` adds the time. Raises ResourceError where the memory is too small."""
        return make_plan(
            self.scene, self.engine, self.interest, layer_bytes=sum(layer.pixel_bytes for layer in self.layers),
            memory=memory, device_memory=device_memory,
            seconds=seconds_per_pixel(self.engine) if measure else None,
        )  # fmt: skip

    def run(self, plan: Plan, resume: bool = False, progress: Progress = silent) -> Prediction:
        """Do it; see :func:`predict`."""
        began = time.monotonic()
        limit = sum(plan.device_memory.values())
        if limit:
            import torch

            total = torch.cuda.get_device_properties(self.engine.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), self.engine.device)
        if self.crew.rank > 0:
            self._help()
            return Prediction([], [], time.monotonic() - began, 0, 0)
        try:
            areas, nodata = self._lead(plan, resume, progress)
        except OSError as error:
            reason = error.strerror or error
            raise ResourceError(f"cannot write {self.outputs.map}: {reason}; check the folder and the disk") from error
        finally:
            self.crew.part(self._topic)
        return Prediction(areas, self.outputs.files, time.monotonic() - began, self.interest.area.pixels, nodata)

    # --- one process, or the first of several -------------------------------------------------------------------------

    def _lead(self, plan: Plan, resume: bool, progress: Progress) -> tuple[list[dict[str, Any]], int]:
        out, run = self.outputs.map, self._identity()
        try:
            lock, resumed = unfinished.start(out, run, resume)
        except (FastDiffCLIPError, OSError) as error:
            self.crew.agree(self._topic, {FAILED: str(error)})
            raise
        keep = resumed
        try:
            with self.unfinished() as state:
                if resumed:
                    state.verify({number: self.tiling.tile(number) for number in self.wanted_tiles})
                else:
                    self._require_space()
                try:
                    found = self._all(state, plan, run, progress)
                finally:
                    keep = keep or bool(state.done)
            keep = False
            return found
        except _NothingValid as error:
            keep = False
            raise InputDataError(str(error)) from None
        finally:
            if not keep:
                unfinished.discard(out)
            lock.release()

    def _all(
        self, state: Unfinished, plan: Plan, run: dict[str, Any], progress: Progress
    ) -> tuple[list[dict[str, Any]], int]:
        claims = Claims(state.folder, self.crew)
        claims.clear()
        self.crew.agree(self._topic, {"run": run, "rows": plan.rows, "cols": plan.cols})
        blocks = self.blocks(plan.rows, plan.cols)
        with deferred_signals() as stop:
            task = Task(self, state, stop, progress)
            task.work(block for block in blocks if task.is_left(block) and claims.take(block.number))
            while left := task.left_of(blocks):
                abandoned = [block for block in left if claims.is_abandoned(block.number)]
                task.work(abandoned)
                task.check_stop()
                if not abandoned:
                    time.sleep(_PATIENCE)
            counts = count_classes(state.files)
            if counts[1:].sum() == 0:
                raise _NothingValid(
                    f"no pixel of {self.scene.path} that is to be predicted is valid in every modality of the model; "
                    f"nothing can be classified"
                )

            def told(name: str, done: int, total: int, note: str = "") -> None:
                progress(name, done, total, note)
                if done < total:
                    task.check_stop()

            areas = write_outputs(
                self.outputs, state.files, counts, classes=self.classes, grid=self.grid, title=self.scene.name,
                progress=told,
            )  # fmt: skip
        return areas, int(counts[0])

    def _require_space(self) -> None:
        needed = sum(layer.pixel_bytes for layer in self.layers) * self.interest.area.pixels
        free = shutil.disk_usage(unfinished.folder_of(self.outputs.map)).free
        if needed > free:
            raise ResourceError(
                f"{self.outputs.map} needs {needed / 2**30:.2f} GiB beside it while it is made, its disk has "
                f"{free / 2**30:.2f} GiB free; make room, or choose another --out"
            )

    # --- the other processes ------------------------------------------------------------------------------------------

    def _help(self) -> None:
        """Compute blocks that nobody else has taken, until none is left."""
        message = self.crew.agree(self._topic)
        if message["run"] != self._identity():
            raise UsageError(
                f"process {self.crew.rank} was started with another scene, model or part than the first one; "
                f"start all of them with the same options"
            )
        try:
            with self.unfinished() as state, deferred_signals() as stop:
                state.refresh()
                claims, task = Claims(state.folder, self.crew), Task(self, state, stop, silent)
                blocks = self.blocks(message["rows"], message["cols"])
                task.work(block for block in blocks if task.is_left(block) and claims.take(block.number))
        except FileNotFoundError:  # the others have finished it already
            return
        except OSError as error:
            raise ResourceError(
                f"process {self.crew.rank} cannot write to {unfinished.folder_of(self.outputs.map)}: "
                f"{error.strerror or error}"
            ) from error

    # --- both ---------------------------------------------------------------------------------------------------------

    @property
    def _topic(self) -> str:
        return f"fastdiffclip predict {self.outputs.map.resolve()}"

    def _identity(self) -> dict[str, Any]:
        """What a result follows from, by the words that an error names it with."""
        engine = self.engine
        batches = engine.batches
        return {
            "scene": self.scene.sha256,
            "model": engine.classifier.digest(),
            "precision": str(engine.classifier.where.precision),
            "kind of device": [engine.device.type, batches.stem, engine.windows, batches.tile],
            "part of the scene": self.interest.digest(),
            "choice of outputs": [[layer.name, layer.bands, layer.dtype] for layer in self.layers],
            "threshold of --reject": self.outputs.reject,
            "version of fastdiffclip": __version__,
        }

    def unfinished(self) -> Unfinished:
        """The folder of the prediction, which :func:`unfinished.start` made, open for this process."""
        return Unfinished(self.outputs.map, self.layers, self.interest.area, self.crew.rank)

    def blocks(self, rows: int, cols: int) -> list[Block]:
        """Blocks of ``rows`` x ``cols`` tiles that have a part in the output."""
        area = self.interest.area
        return [block for block in cut_blocks(self.tiling, rows, cols) if block.rect.within(area).pixels]


class _NothingValid(Exception):
    """There is no pixel to classify."""


class Task:
    """What a process does with blocks."""

    def __init__(self, job: Job, state: Unfinished, stop: StopRequest, progress: Progress) -> None:
        self.job, self.state, self.stop, self.progress = job, state, stop, progress
        self.tiles = set(job.wanted_tiles)
        self.total = job.interest.pixels
        self.counted: set[int] = set()
        self.done = 0
        self._count(state.done)

    def is_left(self, block: Block) -> bool:
        """Whether a tile of the block is not finished."""
        return bool(self._left(block))

    def left_of(self, blocks: list[Block]) -> list[Block]:
        """The blocks that no process has finished."""
        self.state.refresh()
        self._count(self.state.done)
        return [block for block in blocks if self.is_left(block)]

    def check_stop(self) -> None:
        """Raise InterruptedRunError where a signal came."""
        done, all_of_them = len(self.state.done & self.tiles), len(self.tiles)
        self.stop.raise_if_set(
            f"predict was interrupted after {done} of {all_of_them} tiles; continue with --resume "
            f"--out {self.job.outputs.map}"
        )

    def work(self, blocks: Iterable[Block]) -> None:
        """Compute what is left of the blocks, and see it written."""
        job, room = self.job, Room()
        rolling = Rolling(job.engine, job.tiling)
        pieces = read_pieces(job.scene, job.engine.names, iter(blocks), self._is_needed, job.engine.radius, room)
        with heap.bounded(), Writer(self.state) as writer, in_background(pieces) as made, closing(room):
            for piece in made:
                region = None
                if piece.region.pixels:
                    region = rolling.move_to(piece)
                    room.give()
                for number in self._left(piece.block):
                    if self.stop.signal is None:
                        writer.put(number, job.tiling.tile(number), self._tile(number, region))
                        self._count({number})
                if self.stop.signal is not None:
                    break
        self.check_stop()

    def _tile(self, number: int, region: Region | None) -> dict[str, np.ndarray]:
        """What the raw files hold of a tile."""
        job, tile, first = self.job, self.job.tiling.tile(number), self.done
        wanted = job.interest.wanted(tile)
        if region is None or not wanted.any():
            shape = len(job.classes), tile.height, tile.width
            return layers_of(np.full(shape, np.nan, np.float32), job.layers, job.classes, job.outputs.reject)
        most = int(wanted.sum())
        done = 0

        def on_batch(windows: int) -> None:
            nonlocal done
            done = min(done + windows, most)
            self.progress("predict", min(first + done, self.total - 1), self.total, "")

        probabilities = job.engine.classify(region, tile, wanted, on_batch)
        return layers_of(probabilities, job.layers, job.classes, job.outputs.reject)

    def _left(self, block: Block) -> list[int]:
        return [number for number in block.tiles if number in self.tiles and number not in self.state.done]

    def _is_needed(self, block: Block) -> bool:
        tiles = (self.job.tiling.tile(number) for number in self._left(block))
        return any(self.job.interest.wanted(tile).any() for tile in tiles)

    def _count(self, tiles: set[int]) -> None:
        """Show progress, now that ``tiles`` are finished here or elsewhere."""
        fresh = (tiles & self.tiles) - self.counted
        self.counted |= fresh
        self.done += sum(int(self.job.interest.wanted(self.job.tiling.tile(number)).sum()) for number in fresh)
        if fresh:
            self.progress("predict", self.done, self.total, "")
