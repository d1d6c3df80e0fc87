"""Windows of scenes for whoever asks by centre: from memory when the scenes fit, from disk when they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastdiffclip.scene.prepare import FrontEnd, PreparedScenes, prepare_scenes, prepared_bytes
from fastdiffclip.scene.store import Scene
from fastdiffclip.scene.windows import crop_centres, gather_windows, read_windows


class WindowSource:
    """Clean windows around centres, through a front end.

    Args:
        scenes: opened scenes with the modalities of the front end.
        front_end: fitted spectral front end.
        window: side P of the windows, odd.
        budget: bytes that prepared scenes may take; beyond it each call reads what it needs in chunk order.
    """

    def __init__(self, scenes: Sequence[Scene], front_end: FrontEnd, window: int, budget: int) -> None:
        for scene in scenes:
            front_end.check(scene)
        self.scenes, self.front_end, self.window, self.budget = list(scenes), front_end, window, budget
        self.memo: dict[str, Any] = {}  # what was found out about these windows and is asked for again and again
        self._whole: PreparedScenes | None = None
        if prepared_bytes(scenes, front_end) <= budget:
            self._whole = prepare_scenes(scenes, front_end)

    def windows(self, centres: np.ndarray) -> list[np.ndarray]:
        """``(B, L, C_m)`` float32 per modality for ``(B, 3)`` int64 centres (scene, row, column)."""
        if self._whole is not None:
            return [
                gather_windows(part, self._whole.extents, centres, self.window)
                for part in self._whole.modalities.values()
            ]
        crops = read_windows(self.scenes, self.front_end, centres, self.window)
        own = crop_centres(len(centres), self.window)
        return [gather_windows(part, crops.extents, own, self.window) for part in crops.modalities.values()]
