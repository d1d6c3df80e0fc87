"""Windows by centre: from memory and from disk, with the same bits."""

from __future__ import annotations

import numpy as np
import pytest

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.prepare import fit_front_end, prepare_scenes, prepared_bytes
from fastdiffclip.scene.source import WindowSource
from fastdiffclip.scene.windows import gather_windows

from .strategies import MemoryScene, random_scene

BANDS = {"hsi": 20, "lidar": 1}


def scenes() -> list[MemoryScene]:
    rng = np.random.default_rng(0)
    return [random_scene(rng, h, w, BANDS) for h, w in ((9, 14), (1, 3))]


def centres() -> np.ndarray:
    rng = np.random.default_rng(1)
    first = np.stack([np.zeros(40, np.int64), rng.integers(0, 9, 40), rng.integers(0, 14, 40)], axis=1)
    return np.concatenate([first, [[1, 0, 0], [1, 0, 2], [0, 8, 13], [0, 0, 0]]])


@pytest.mark.parametrize("kind", ["standard", "mnf"])
@pytest.mark.parametrize("window", [1, 5])
def test_memory_and_disk_give_the_same(kind: str, window: int) -> None:
    both = scenes()
    front_end = fit_front_end(kind, both, 7)
    needed = prepared_bytes(both, front_end)
    prepared = prepare_scenes(both, front_end)
    expected = [gather_windows(part, prepared.extents, centres(), window) for part in prepared.modalities.values()]
    for budget in (needed, needed - 1, 0):
        source = WindowSource(both, front_end, window, budget)
        found = source.windows(centres())
        assert [part.shape for part in found] == [(44, window**2, c) for c in front_end.channels.values()]
        for a, b in zip(found, expected, strict=True):
            assert np.array_equal(a, b) and a.dtype == np.float32


def test_beyond_the_budget_nothing_is_held() -> None:
    both = scenes()
    front_end = fit_front_end("standard", both)
    for scene in both:
        scene.reads.clear()
    WindowSource(both, front_end, 3, 0)
    assert not any(scene.reads for scene in both)
    WindowSource(both, front_end, 3, 1 << 30)
    assert all(scene.reads for scene in both)


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_no_centre_gives_no_window(budget: int) -> None:
    both = scenes()
    source = WindowSource(both, fit_front_end("standard", both), 3, budget)
    assert [part.shape for part in source.windows(np.empty((0, 3), np.int64))] == [(0, 9, 20), (0, 9, 1)]


def test_a_scene_with_other_bands_is_refused() -> None:
    front_end = fit_front_end("standard", scenes())
    other = random_scene(np.random.default_rng(0), 4, 4, {"hsi": 19, "lidar": 1})
    for budget in (0, 1 << 30):
        with pytest.raises(InputDataError, match="has 19 bands.*fitted on 20"):
            WindowSource([other], front_end, 3, budget)
