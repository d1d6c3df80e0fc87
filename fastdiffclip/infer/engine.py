"""The classifier at work on regions of a scene: every pixel through its stem once, windows gathered from the result.

The logistic head reads window means of the prepared pixels, too, or alone; they are summed tile by tile.

Batches have one size per kind of device and window, and their tails are padded; a pixel's place in its batch follows
from its place in its tile. So the bits of a result do not depend on what else is read or computed at the time. On a CPU
several threads take a batch each and compute it on one thread, so they do not depend on the number of threads either.

Shape suffixes: B windows, L tokens of a window, C channels, D width, K classes, N pixels of a region, M modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.infer.tiles import Rect, Tiling
from fastdiffclip.model.logistic_classifier import LogisticClassifier
from fastdiffclip.model.window_features import means_of_grid

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batches:
    """Sizes that the bits of a result may depend on.

    Attributes:
        stem: pixels of a stem batch. tokens: of a batch of small windows. tile: pixels of a tile.
        least: windows of a batch.
    """

    stem: int
    tokens: int
    tile: int
    least: int = 1

    def windows(self, tokens: int) -> int:
        """Windows of ``tokens`` pixels in a batch: more of smaller ones, for every batch takes the same calls."""
        return max(self.least, self.tokens // tokens)


# As many tokens as 16 windows of 11 x 11: with 32 a thread gains nothing and two of them wait for memory.
MEANS_BATCHES = 4  # of a tile on a CPU, where only means of windows are read
BATCHES = {"cpu": Batches(1024, 16 * 121, 2048, 16), "cuda": Batches(16384, 2048 * 121, 131_072, 2048)}


@dataclass
class Region:
    """Pixels of the scene ``rect``, prepared.

    Attributes:
        tokens: per modality ``(N, D)`` on the device, in row-major order; none where the encoder is not read.
        pixels: likewise ``(N, C_m)`` prepared values, float32; none where window means are not read.
        valid: per modality ``(h, w)`` bool on the host.
    """

    rect: Rect
    tokens: list[Tensor]
    pixels: list[Tensor]
    valid: list[np.ndarray]

    @property
    def planes(self) -> list[Tensor]:
        """All that is kept of the pixels."""
        return [*self.tokens, *self.pixels]


class Engine:
    """A classifier with its threads; see :func:`open_engine`."""

    def __init__(self, classifier: Classifier, pool: ThreadPoolExecutor | None, threads: int) -> None:
        self.classifier, self.threads, self._pool = classifier, threads, pool
        self.device = classifier.where.device
        self.batches = BATCHES[self.device.type]
        self.names = tuple(classifier.front_end.channels)
        self.radius = classifier.config.model.window // 2
        # What a stem gives under autocast: on a CPU the norm keeps bfloat16, on CUDA it returns float32.
        reduced = classifier.where.precision == torch.bfloat16 and self.device.type == "cpu"
        self.token_dtype = torch.bfloat16 if reduced else torch.float32
        model = classifier.model
        self.sizes = model.layout.sizes if isinstance(model, LogisticClassifier) else ()
        self.reads_tokens = model.encoder is not None
        self.windows = self.batches.windows((2 * self.radius + 1) ** 2) if self.reads_tokens else self.batches.tile
        if not self.reads_tokens and self.device.type == "cpu":  # a tile would be one batch, and one thread's work
            self.batches = replace(self.batches, tile=MEANS_BATCHES * self.batches.tile)
        self._reach = torch.arange(-self.radius, self.radius + 1, device=self.device)
        self._texts = classifier.text_embeddings.to(self.device)

    def region(self, rect: Rect) -> Region:
        """Room for the pixels of ``rect``, none of them prepared."""
        width, channels = self.classifier.config.model.width, self.classifier.front_end.channels
        encoded, averaged = (self.names if read else () for read in (self.reads_tokens, self.sizes))
        tokens = [torch.empty((rect.pixels, width), dtype=self.token_dtype, device=self.device) for _ in encoded]
        pixels = [torch.empty((rect.pixels, channels[name]), device=self.device) for name in averaged]
        return Region(rect, tokens, pixels, [np.zeros((rect.height, rect.width), bool) for _ in self.names])

    @property
    def pixel_bytes(self) -> int:
        """Bytes that a region keeps of a pixel."""
        tokens = len(self.names) * self.classifier.config.model.width * self.token_dtype.itemsize
        values = 4 * sum(self.classifier.front_end.channels.values())
        return tokens * self.reads_tokens + values * bool(self.sizes)

    def project(
        self, region: Region, rect: Rect, raw: dict[str, np.ndarray], valid: dict[str, np.ndarray], tiling: Tiling
    ) -> None:
        """Prepare the pixels of ``rect``, read as ``raw[m]`` (h, w, bands) and ``valid[m]`` (h, w), into ``region``."""
        parts = [(m, tile) for tile in tiling.tiles_of(rect) for m in range(len(self.names))]

        def run(part: tuple[int, int]) -> None:
            m, number = part
            tile = tiling.tile(number)
            own = tile.within(rect)
            here, there = own.relative_to(rect).slices, own.relative_to(region.rect)
            name = self.names[m]
            front_end = self.classifier.front_end
            values, known = front_end.pack(name, raw[name][here], valid[name][here], np.dtype(np.float32))
            region.valid[m][there.slices] = known
            places = _places(own, tile)
            rows = torch.from_numpy(_places(own, region.rect)).to(self.device)
            values = values.reshape(len(places), -1)
            if self.sizes:
                region.pixels[m][rows] = torch.from_numpy(values).to(self.device)
            if self.reads_tokens:
                self._project_tile(m, values, places, region.tokens[m], rows)

        for _ in self._each(run, parts):
            pass

    @torch.inference_mode()
    def _project_tile(self, m: int, values: np.ndarray, places: np.ndarray, out: Tensor, rows: Tensor) -> None:
        """Project the pixels at ``places`` (n,) of a tile and put them to ``rows`` (n,) of ``out``."""
        size = self.batches.stem
        assert self.classifier.model.encoder is not None
        stem = self.classifier.model.encoder.stems[self.names[m]]
        for number in np.unique(places // size).tolist():
            first, last = np.searchsorted(places, (number * size, (number + 1) * size))
            batch = torch.zeros((size, values.shape[1]))
            at = torch.from_numpy(places[first:last] - number * size)
            batch[at] = torch.from_numpy(values[first:last])
            with self.classifier.where.autocast():
                tokens = stem(batch.to(self.device))
            out[rows[first:last]] = tokens[at.to(self.device)]

    def classify(
        self, region: Region, tile: Rect, wanted: np.ndarray, on_batch: Callable[[int], None] = lambda windows: None
    ) -> np.ndarray:
        """Class probabilities ``(K, h, w)`` float32 of a tile, NaN where a pixel is not wanted or not valid.

        The tile's valid pixels make up the batches, whether wanted or not; a batch without a wanted one is left out.
        """
        place = tile.relative_to(region.rect)
        known = np.logical_and.reduce([part[place.slices] for part in region.valid])
        flat, size = np.flatnonzero(known), self.windows
        batches = [flat[first : first + size] for first in range(0, len(flat), size)]
        batches = [batch for batch in batches if wanted.reshape(-1)[batch].any()]
        masks = [None if part.all() else torch.from_numpy(part.reshape(-1)).to(self.device) for part in region.valid]
        result = np.full((len(self.classifier.classes), tile.pixels), np.nan, np.float32)
        means = self._window_means(region, place, masks) if self.sizes and batches else None
        scores = self._each(lambda batch: self._classify_batch(region, place, masks, means, batch), batches)
        for batch, probabilities in zip(batches, scores, strict=True):
            result[:, batch] = probabilities.cpu().numpy()[: len(batch)].T
            on_batch(len(batch))
        result[:, ~wanted.reshape(-1)] = np.nan
        return result.reshape(-1, tile.height, tile.width)

    @torch.inference_mode()
    def _window_means(self, region: Region, place: Rect, masks: list[Tensor | None]) -> Tensor:
        """``(n, S * sum of C)`` window means of the n pixels of the tile at ``place``, size by size."""
        radius = max(self.sizes) // 2
        row = torch.arange(place.top - radius, place.bottom + radius, device=self.device)
        col = torch.arange(place.left - radius, place.right + radius, device=self.device)
        # A region ends where the scene does or a radius beyond its tiles, so this is the clamp to the scene.
        row, col = row.clamp_(0, region.rect.height - 1), col.clamp_(0, region.rect.width - 1)
        pixel = (row[:, None] * region.rect.width + col).flatten()
        parts: list[list[Tensor]] = [[] for _ in self.sizes]
        for values, mask in zip(region.pixels, masks, strict=True):
            grid = values.index_select(0, pixel).view(len(row), len(col), -1)
            known = None if mask is None else mask[pixel].view(len(row), len(col))
            for part, mean in zip(parts, means_of_grid(grid, known, self.sizes, radius), strict=True):
                part.append(mean.flatten(0, 1))
        return torch.cat([mean for part in parts for mean in part], dim=1)

    @torch.inference_mode()
    def _classify_batch(
        self, region: Region, place: Rect, masks: list[Tensor | None], means: Tensor | None, batch: np.ndarray
    ) -> Tensor:
        """``(B, K)`` probabilities of the pixels ``batch`` (at most B) of the tile at ``place`` of a region."""
        chosen = torch.from_numpy(np.pad(batch, (0, self.windows - len(batch)), mode="edge")).to(self.device)
        windows = self._gather(region, place, masks, chosen) if self.reads_tokens else None
        classifier = self.classifier
        with classifier.where.autocast():
            features = classifier.model.features_of(None if means is None else means.index_select(0, chosen), windows)
        return classifier.score(features, self._texts)

    def _gather(self, region: Region, place: Rect, masks: list[Tensor | None], chosen: Tensor) -> list[Tensor]:
        """Windows of tokens ``(B, L, D)`` per modality around the pixels ``chosen`` (B,) of the tile at ``place``."""
        height, width = region.rect.height, region.rect.width
        row = (chosen // place.width + place.top)[:, None] + self._reach
        col = (chosen % place.width + place.left)[:, None] + self._reach
        pixel_BPP = row.clamp_(0, height - 1)[:, :, None] * width + col.clamp_(0, width - 1)[:, None, :]
        pixel_BL = pixel_BPP.flatten(1)
        centre_B1 = pixel_BL[:, pixel_BL.shape[1] // 2, None]
        windows = []
        for tokens_ND, mask in zip(region.tokens, masks, strict=True):
            read_BL = pixel_BL if mask is None else torch.where(mask[pixel_BL], pixel_BL, centre_B1)
            windows.append(tokens_ND.index_select(0, read_BL.flatten()).unflatten(0, read_BL.shape))
        return windows

    def _each(self, call: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Call for every item, in order; on the threads where there are several, ahead of who takes the results."""
        waiting: list[Future[Result]] = []
        try:
            for item in items:
                waiting.append(self._submit(call, item))
                if len(waiting) > 2 * self.threads:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()

    def _submit(self, call: Callable[[Item], Result], item: Item) -> Future[Result]:
        if self._pool is not None:
            return self._pool.submit(call, item)
        done: Future[Result] = Future()
        done.set_result(call(item))
        return done


@contextmanager
def open_engine(classifier: Classifier) -> Iterator[Engine]:
    """The engine, on as many threads as torch is set to use."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield Engine(classifier, None, 1)
        return
    # torch's number of threads is each thread's own, and what a new thread begins with is the number set last.
    pool = ThreadPoolExecutor(threads, "predict", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield Engine(classifier, pool, threads)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _places(rect: Rect, frame: Rect) -> np.ndarray:
    """``(rect.pixels,)`` int64: where the pixels of ``rect`` stand in row-major order of ``frame``."""
    rows = np.arange(rect.top - frame.top, rect.bottom - frame.top) * frame.width
    cols = np.arange(rect.left - frame.left, rect.right - frame.left)
    return (rows[:, None] + cols).reshape(-1)
