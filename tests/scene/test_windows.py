"""The window gather against plain slicing, its fallback, its cache, and windows read from disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import ResourceError, UsageError
from fastdiffclip.scene import gather_cache, windows
from fastdiffclip.scene.prepare import (
    PreparedModality,
    PreparedScenes,
    fit_front_end,
    pack_valid,
    prepare_scenes,
    unpack_valid,
)
from fastdiffclip.scene.windows import (
    gather_windows,
    iter_row_blocks,
    read_windows,
    token_valid,
)

from .strategies import prepared_scenes, random_scene


def gather_windows_reference(
    modality: PreparedModality, extents: np.ndarray, centres: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Slice edge-padded cubes: windows (B, L, C) float32 and which tokens are valid (B, L)."""
    r = window // 2
    out, tokens = [], []
    for scene, row, col in centres:
        first, height, width = extents[scene]
        flat = slice(first, first + height * width)
        cube = modality.pixels[flat].reshape(height, width, -1)
        good = unpack_valid(modality.valid, len(modality.pixels))[flat].reshape(height, width)
        padded = np.pad(cube, ((r, r), (r, r), (0, 0)), mode="edge")[row : row + window, col : col + window]
        valid = np.pad(good, r, mode="edge")[row : row + window, col : col + window]
        values = np.where(valid[..., None], padded, cube[row, col]).astype(np.float32)
        out.append((values * modality.scale + modality.offset).reshape(window * window, -1))
        tokens.append(valid.reshape(-1))
    return np.stack(out), np.stack(tokens)


def every_centre(extents: np.ndarray) -> np.ndarray:
    return np.array([(s, y, x) for s, (_, h, w) in enumerate(extents) for y in range(h) for x in range(w)], np.int64)


@pytest.mark.parametrize("impl", ["numba", "numpy", None])
@settings(deadline=None, max_examples=60)
@given(prepared=prepared_scenes(), window=st.sampled_from([1, 3, 5, 11, 15]))
def test_equals_slicing_a_padded_cube_for_every_centre(impl: str | None, prepared: PreparedScenes, window: int) -> None:
    modality, extents = prepared.modalities["hsi"], prepared.extents
    centres = every_centre(extents)
    expected, valid = gather_windows_reference(modality, extents, centres, window)
    if impl == "numba" and modality.pixels.dtype == np.float16:
        impl = None
    np.testing.assert_array_equal(gather_windows(modality, extents, centres, window, impl=impl), expected)
    np.testing.assert_array_equal(token_valid(modality, extents, centres, window), valid)


def small(dtype: str = "uint16") -> PreparedScenes:
    pixels = np.arange(24).reshape(12, 2).astype(dtype)
    valid = np.arange(12) % 5 != 1
    one, zero = np.ones(2, np.float32), np.zeros(2, np.float32)
    return PreparedScenes({"hsi": PreparedModality(pixels, one, zero, pack_valid(valid))}, np.array([[0, 3, 4]]))


def test_read_only_and_strided_arrays_are_gathered() -> None:
    modality = small().modalities["hsi"]
    strided = PreparedModality(
        np.repeat(modality.pixels, 2, axis=0)[::2], modality.scale, modality.offset, modality.valid
    )
    for array in (strided.pixels, strided.scale, strided.valid):
        array.flags.writeable = False
    centres = np.array([[0, 0, 0], [0, 2, 3]])
    expected, _ = gather_windows_reference(modality, small().extents, centres, 3)
    np.testing.assert_array_equal(gather_windows(strided, small().extents, centres, 3, impl="numba"), expected)


def test_out_is_filled_and_returned() -> None:
    modality, extents = small().modalities["hsi"], small().extents
    out = np.full((1, 9, 2), np.nan, np.float32)
    assert gather_windows(modality, extents, np.array([[0, 1, 1]]), 3, out) is out
    assert np.isfinite(out).all()
    with pytest.raises(ValueError, match="out must be"):
        gather_windows(modality, extents, np.array([[0, 1, 1]]), 3, out[:, :, :1])
    assert gather_windows(modality, extents, np.zeros((0, 3), np.int64), 3).shape == (0, 9, 2)


@pytest.mark.parametrize("window", [0, 2, 10, -3])
def test_even_window_is_refused(window: int) -> None:
    for call in (gather_windows, token_valid):
        with pytest.raises(UsageError, match="window must be odd"):
            call(small().modalities["hsi"], small().extents, np.array([[0, 0, 0]]), window)


@pytest.mark.parametrize("centre", [(1, 0, 0), (-1, 0, 0), (0, 3, 0), (0, 0, 4), (0, -1, 0)])
def test_centre_outside_its_scene_is_refused(centre: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="outside its scene"):
        gather_windows(small().modalities["hsi"], small().extents, np.array([centre]), 3)


def test_extents_beyond_the_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="extents reach pixel 15"):
        gather_windows(small().modalities["hsi"], np.array([[0, 3, 5]]), np.array([[0, 0, 0]]), 3)


def test_numba_missing_falls_back_to_numpy_with_equal_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    modality, extents, centres = small().modalities["hsi"], small().extents, every_centre(small().extents)
    expected = gather_windows(modality, extents, centres, 5, impl="numba")
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "fastdiffclip.scene.gather_numba", raising=False)
    windows._compiled.cache_clear()
    try:
        np.testing.assert_array_equal(gather_windows(modality, extents, centres, 5), expected)
        name, reason = windows.gather_backend()
        assert name == "numpy" and "numba cannot be imported" in reason
        with pytest.raises(ResourceError, match="leave impl out"):
            gather_windows(modality, extents, centres, 5, impl="numba")
    finally:
        windows._compiled.cache_clear()


def test_unknown_implementation_is_refused() -> None:
    with pytest.raises(UsageError, match="choose numba or numpy"):
        gather_windows(small().modalities["hsi"], small().extents, np.array([[0, 0, 0]]), 3, impl="cuda")


PROBE = """
import json, sys, numpy as np
import fastdiffclip.scene.windows as w
light = 'numba' not in sys.modules and 'scipy' not in sys.modules
from fastdiffclip.scene.prepare import PreparedModality
m = PreparedModality(np.arange(9, dtype=np.uint16)[:, None], np.ones(1, np.float32), np.zeros(1, np.float32),
                     np.array([255, 1], np.uint8))
values = w.gather_windows(m, np.array([[0, 3, 3]]), np.array([[0, 0, 1]]), 3)
print(json.dumps({'light': light, 'backend': w.gather_backend(), 'values': values.ravel().tolist()}))
"""


def probe(**environment: str) -> dict:
    """Gather in a fresh process, and see what it used."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=inherited | environment, capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert result["light"], "importing windows must not import numba"
    assert result["values"] == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    return result


def cached(folder: Path, suffix: str) -> list[Path]:
    return sorted(p for p in folder.rglob(f"*{suffix}"))


def test_cache_is_used_again_and_survives_damage(tmp_path: Path) -> None:
    assert probe(NUMBA_CACHE_DIR=str(tmp_path))["backend"] == ["numba", ""]
    index, code = cached(tmp_path, ".nbi"), cached(tmp_path, ".nbc")
    assert len(index) == len(code) == 1
    written = code[0].stat().st_mtime_ns
    probe(NUMBA_CACHE_DIR=str(tmp_path))
    assert code[0].stat().st_mtime_ns == written, "the second run compiled again"
    index[0].write_bytes(b"")
    flipped = bytearray(code[0].read_bytes())
    flipped[len(flipped) // 2] ^= 255
    code[0].write_bytes(flipped)
    assert probe(NUMBA_CACHE_DIR=str(tmp_path))["backend"] == ["numba", ""]
    assert cached(tmp_path, ".nbi")[0].stat().st_size > 0
    assert cached(tmp_path, ".nbc")[0].read_bytes() != bytes(flipped)


def test_home_that_cannot_be_written_needs_no_cache(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    result = probe(HOME=str(blocked), XDG_CACHE_HOME=str(blocked / "cache"))
    assert result["backend"] == ["numba", ""]
    assert list(tmp_path.iterdir()) == [blocked]


def test_switched_off_numba_is_told(tmp_path: Path) -> None:
    result = probe(NUMBA_DISABLE_JIT="1", NUMBA_CACHE_DIR=str(tmp_path))
    assert result["backend"] == ["numpy", "numba is switched off by NUMBA_DISABLE_JIT"]


def test_numba_that_cannot_compile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    def refuse(*_: object) -> None:
        raise numba.core.errors.LoweringError("no such target\nat line 3")

    monkeypatch.setattr(gather_cache, "_compile_cached", refuse)
    with pytest.raises(gather_cache.NumbaUnavailableError, match="LoweringError: .*no such target"):
        gather_cache.compile_gather(np.dtype("uint16"))


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 23),
    block_rows=st.integers(1, 9),
    halo=st.integers(0, 7),
    chunks=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_row_blocks_cover_the_scene_and_read_each_chunk_once(
    height: int, block_rows: int, halo: int, chunks: int, seed: int
) -> None:
    scene = random_scene(np.random.default_rng(seed), height, 4, {"hsi": 3, "lidar": 1}, chunk=chunks)
    whole = {m: scene._arrays[m] for m in scene.modalities}
    seen = []
    for block in iter_row_blocks(scene, block_rows, halo):
        seen += range(height)[block.rows]
        top, bottom = block.halo_rows.start, block.halo_rows.stop
        assert (top, bottom) == (max(0, block.rows.start - halo), min(height, block.rows.stop + halo))
        for m in whole:
            np.testing.assert_array_equal(block.raw[m], whole[m][top:bottom])
            np.testing.assert_array_equal(block.valid[m], scene._valid[m][top:bottom])
    assert seen == list(range(height))
    assert set(scene.reads.values()) == {1}
    assert len(scene.reads) == 2 * -(-height // chunks)


def test_row_blocks_take_the_chunk_height_by_default() -> None:
    scene = random_scene(np.random.default_rng(0), 10, 2, {"hsi": 1}, chunk=4)
    assert [b.rows.stop for b in iter_row_blocks(scene)] == [4, 8, 10]
    with pytest.raises(ValueError, match="block_rows"):
        next(iter_row_blocks(scene, 0))


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(["standard", "mnf"]),
    dtype=st.sampled_from(["uint16", "float16", "float32"]),
    window=st.sampled_from([1, 3, 7, 19]),
    seed=st.integers(0, 999),
)
def test_windows_from_disk_equal_windows_from_memory_bit_for_bit(kind: str, dtype: str, window: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, h, w, {"hsi": 17, "lidar": 2}, dtype=dtype, invalid=0.2) for h, w in ((13, 6), (5, 9))]
    front_end = fit_front_end(kind, scenes, components=5)
    prepared = prepare_scenes(scenes, front_end)
    centres = rng.permutation(every_centre(prepared.extents))[:40]
    for scene in scenes:
        scene.reads.clear()
    read = read_windows(scenes, front_end, centres, window)
    assert max(max(s.reads.values(), default=0) for s in scenes) == 1
    r = window // 2
    assert read.extents.tolist() == [[b * window**2, window, window] for b in range(len(centres))]
    own = np.array([[b, r, r] for b in range(len(centres))])
    for m in front_end.channels:
        arguments = prepared.modalities[m], prepared.extents, centres, window
        mine = read.modalities[m], read.extents, own, window
        np.testing.assert_array_equal(gather_windows(*mine), gather_windows(*arguments))
        np.testing.assert_array_equal(token_valid(*mine), token_valid(*arguments))


def test_windows_from_disk_skip_chunks_that_nobody_wants() -> None:
    scene = random_scene(np.random.default_rng(0), 40, 4, {"hsi": 2}, chunk=5)
    front_end = fit_front_end("standard", [scene])
    scene.reads.clear()
    read_windows([scene], front_end, np.array([[0, 37, 1], [0, 2, 2]]), 3)
    assert sorted(scene.reads) == [("hsi", 0), ("hsi", 7)]
