"""Scenes in memory, and hypothesis strategies for prepared scenes and label maps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fastdiffclip.scene.prepare import PreparedModality, PreparedScenes, pack_valid

DTYPES = ("uint16", "int16", "float16", "float32")


class MemoryScene:
    """What ``prepare`` and ``windows`` use of a Scene, over arrays; it counts the reads of chunks."""

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        valid: dict[str, np.ndarray] | None = None,
        *,
        name: str = "memory",
        chunk: int = 3,
        **attributes: dict[str, Any],
    ) -> None:
        self.name, self.chunk, self._arrays = name, chunk, arrays
        self.height, self.width = next(iter(arrays.values())).shape[:2]
        self._valid = valid or {m: np.ones(a.shape[:2], bool) for m, a in arrays.items()}
        self.modalities = {m: self._modality(m, attributes.get(m, {})) for m in arrays}
        self.reads: dict[tuple[str, int], int] = {}

    def _modality(self, name: str, attributes: dict[str, Any]) -> SimpleNamespace:
        array = self._arrays[name]
        values: dict[str, Any] = {
            "name": name,
            "bands": array.shape[2],
            "dtype": array.dtype.name,
            "wavelengths": None,
            "wavelength_unit": "nm",
            "bad_bands": None,
            "scale": 1.0,
            "offset": 0.0,
        } | attributes
        good = ~np.array(values["bad_bands"] or [False] * array.shape[2])
        pixels = array[self._valid[name]].astype(np.float64) * values["scale"] + values["offset"]
        mean, std = np.zeros(len(good)), np.zeros(len(good))
        if len(pixels):
            mean[good], std[good] = pixels[:, good].mean(axis=0), pixels[:, good].std(axis=0)
        values |= {"mean": tuple(mean), "std": tuple(std), "valid_pixels": len(pixels)}
        return SimpleNamespace(**values)

    def chunk_rows(self, modality: str) -> int:
        return self.chunk

    def valid_chunk_rows(self, modality: str) -> int:
        return self.chunk + 2

    def read(self, modality: str, rows: slice = slice(None), cols: slice = slice(None)) -> np.ndarray:
        for chunk in range(rows.start // self.chunk, -(-rows.stop // self.chunk)):
            self.reads[modality, chunk] = self.reads.get((modality, chunk), 0) + 1
        return self._arrays[modality][rows, cols].copy()

    def read_valid(self, modality: str, rows: slice = slice(None), cols: slice = slice(None)) -> np.ndarray:
        return self._valid[modality][rows, cols].copy()


def random_scene(
    rng: np.random.Generator,
    height: int,
    width: int,
    bands: dict[str, int],
    *,
    dtype: str = "uint16",
    invalid: float = 0.1,
    **more: Any,
) -> MemoryScene:
    """Return a scene of smooth spectra with noise; a share of ``invalid`` pixels holds nonsense."""
    arrays, valid = {}, {}
    at = np.stack(np.mgrid[:height, :width], axis=-1)
    for name, count in bands.items():
        waves = np.sin(at @ rng.normal(scale=0.15, size=(2, 3)) + rng.random(3) * 6)
        ground = (1.2 + waves) @ rng.random((3, count))
        values = 2000 * ground + rng.normal(scale=20, size=ground.shape)
        valid[name] = rng.random((height, width)) >= invalid
        values[~valid[name]] = 30_000 if np.dtype(dtype).kind in "ui" else np.nan
        arrays[name] = values.astype(dtype)
    return MemoryScene(arrays, valid, **more)


@st.composite
def prepared_scenes(draw: st.DrawFn) -> PreparedScenes:
    """One to three scenes of at most 6 x 6 pixels, one modality of any dtype, any validity."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3))
    channels = draw(st.integers(1, 5))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    pixels = sum(h * w for h, w in sizes)
    low, high = (-1000, 1000) if dtype.kind != "u" else (0, 65_535)
    ends = np.cumsum([h * w for h, w in sizes])
    modality = PreparedModality(
        pixels=rng.integers(low, high, (pixels, channels)).astype(dtype),
        scale=rng.normal(size=channels).astype(np.float32),
        offset=rng.normal(size=channels).astype(np.float32),
        valid=pack_valid(rng.random(pixels) < draw(st.sampled_from([0.0, 0.5, 1.0]))),
    )
    extents = np.array([[e - h * w, h, w] for e, (h, w) in zip(ends, sizes, strict=True)], np.int64)
    return PreparedScenes({"hsi": modality}, extents)


@st.composite
def label_maps(draw: st.DrawFn, scenes: int = 4) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Label maps of one to ``scenes`` scenes made of rectangles of up to four classes, and validity masks."""
    labels, valid = [], []
    for _ in range(draw(st.integers(1, scenes))):
        height, width = draw(st.integers(4, 30)), draw(st.integers(4, 30))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        labels.append(np.zeros((height, width), np.uint16))
        for _ in range(draw(st.integers(1, 8))):
            row, col = rng.integers(height), rng.integers(width)
            tall, wide = rng.integers(1, 12, 2)
            labels[-1][row : row + tall, col : col + wide] = rng.integers(1, 5)
        valid.append(rng.random((height, width)) < draw(st.sampled_from([1.0, 0.8])))
    return labels, valid
