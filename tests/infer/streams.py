"""Parts of the small scene, and raw predictions of a few tiles at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastdiffclip.infer import unfinished
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.infer.engine import Batches
from fastdiffclip.infer.finish import Outputs
from fastdiffclip.infer.interest import interest_of
from fastdiffclip.infer.stream import Task, open_job
from fastdiffclip.infer.tiles import Rect
from fastdiffclip.runtime import StopRequest, silent
from fastdiffclip.scene.store import Scene, open_scene
from fastdiffclip.scene.writer import SceneWriter

SMALL = Batches(stem=13, tokens=72, tile=29)  # two columns and 24 rows of tiles in the small scene


def write_scene(path: Path, like: Scene, rows: slice = slice(None), cols: slice = slice(None), **changes: Any) -> Scene:
    """A part of a scene; ``changes`` replace what is given to the first modality."""
    hsi, lidar = like.read("hsi", rows, cols), like.read("lidar", rows, cols)
    modality = like.modalities["hsi"]
    given: dict[str, Any] = {
        "source": hsi, "bands": 12, "dtype": "uint16", "wavelengths": modality.wavelengths, "scale": 1e-4,
    } | changes  # fmt: skip
    with SceneWriter(path, height=hsi.shape[0], width=hsi.shape[1]) as writer:
        writer.add_modality("hsi", **given)
        writer.add_modality("lidar", lidar, bands=1, dtype="float32")
    return open_scene(path)


def raw_probabilities(
    classifier: Classifier, scene: Scene, folder: Path, rows: int = 1, cols: int = 1, **part: Any
) -> np.ndarray:
    """``(K, H, W)`` bits as uint32 of what stands in the raw file after blocks of ``rows`` x ``cols`` tiles."""
    outputs = Outputs(folder / "map.tif", folder / "p.tif")
    with open_job(scene, classifier, outputs, interest_of(scene, **part), "cpu") as job:
        lock, _ = unfinished.start(outputs.map, {}, False)
        with job.unfinished() as state:
            Task(job, state, StopRequest(), silent).work(job.blocks(rows, cols))
            assert state.done == set(job.wanted_tiles)
            area = job.interest.area
            found = state.files["probabilities"].read(Rect(0, area.height, 0, area.width))
        unfinished.discard(outputs.map)
        lock.release()
    return found.view(np.uint32)
