"""A small scene, written as a user of the writer would."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastdiffclip.scene.store import ClassInfo
from fastdiffclip.scene.writer import SceneWriter

CLASSES = [ClassInfo(1, "oak", "a tree", (1, 2, 3)), ClassInfo(7, "road")]


def write_small(path: Path, height: int = 30, width: int = 40, bands: int = 5, **options: object) -> np.ndarray:
    """Write a scene of two modalities and labels; return its hsi."""
    rng = np.random.default_rng(3)
    hsi = rng.integers(1, 1000, (height, width, bands)).astype(np.uint16)
    with SceneWriter(path, height=height, width=width, **options) as writer:  # type: ignore[arg-type]
        writer.add_modality("hsi", hsi, bands=bands, dtype="uint16", wavelengths=range(400, 400 + bands))
        writer.add_modality("lidar", hsi[..., :1].astype(np.float32), bands=1, dtype="float32")
        writer.add_labels("labels", np.where(hsi[..., 0] > 500, 7, 0).astype(np.uint8))
        writer.set_classes(CLASSES)
        writer.add_source_file("/some/where/cube.mat", "ab" * 32, "modality hsi")
    return hsi
