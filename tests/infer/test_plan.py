"""What a prediction takes: it is said before, kept to, and does not grow with the scene."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastdiffclip.errors import ResourceError
from fastdiffclip.infer import engine
from fastdiffclip.infer.classifier import Classifier
from fastdiffclip.infer.engine import open_engine
from fastdiffclip.infer.interest import Interest
from fastdiffclip.infer.plan import Plan, make_plan, seconds_per_pixel
from fastdiffclip.infer.tiles import Rect
from fastdiffclip.scene.store import Modality, Scene, open_scene
from fastdiffclip.scene.writer import SceneWriter

GIBI = 1 << 30


@pytest.fixture(autouse=True)
def constant_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process before the prediction, which grows a little all the time."""
    monkeypatch.setattr("fastdiffclip.infer.plan._resident_bytes", lambda: 300 << 20)


def plan(classifier: Classifier, height: int, width: int, bands: int = 12, **limits: Any) -> Plan:
    """The plan for a scene of any size, which is not there."""
    modalities = {name: Modality(name, b, "uint16") for name, b in (("hsi", bands), ("lidar", 1))}
    rows = min(height, max(1, (2 << 20) // (2 * bands * min(width, 300))))
    scene: Any = SimpleNamespace(
        name="large", height=height, width=width, modalities=modalities,
        chunk_rows=lambda name: rows, valid_chunk_rows=lambda name: min(height, 1448),
    )  # fmt: skip
    with open_engine(classifier) as made:
        area = Interest(Rect(0, height, 0, width))
        return make_plan(scene, made, area, layer_bytes=1, **limits)


def test_memory_does_not_grow_with_the_length_of_a_scene(classifier: Classifier) -> None:
    sums = [sum(plan(classifier, height, 4000).memory.values()) for height in (4000, 40_000, 1_000_000)]
    assert sums[1] == pytest.approx(sums[0], rel=0.02) and sums[2] == pytest.approx(sums[1], rel=0.02)


@pytest.mark.parametrize(("height", "width"), [(1, 200_000), (300, 300), (5000, 60_000), (200_000, 1)])
def test_a_limit_is_kept_and_changes_nothing_but_the_blocks(classifier: Classifier, height: int, width: int) -> None:
    free = plan(classifier, height, width)
    with pytest.raises(ResourceError) as refused:
        plan(classifier, height, width, memory=1 << 20)
    least = smallest(refused.value)
    for memory in (least, max(least, sum(free.memory.values())), 64 * GIBI):
        found = plan(classifier, height, width, memory=memory)
        assert sum(found.memory.values()) <= memory
        assert replace(found, rows=free.rows, cols=free.cols, memory=free.memory) == free
        assert sum(block.rect.pixels for block in found.blocks) == height * width


def test_a_wide_scene_is_cut_across_as_well(classifier: Classifier) -> None:
    found = plan(classifier, 5000, 60_000, bands=300)
    assert 1 <= found.cols < found.tiling.across and found.blocks[0].rect.width < 60_000
    assert sum(found.memory.values()) < 2 * GIBI


def test_too_little_memory_is_refused_with_what_would_do(classifier: Classifier) -> None:
    with pytest.raises(
        ResourceError, match=r"--memory 10MiB is too small .* smallest that works is --memory \d+MiB"
    ) as found:
        plan(classifier, 300, 400, memory=10 << 20)
    least = smallest(found.value)
    assert sum(plan(classifier, 300, 400, memory=least).memory.values()) <= least
    with pytest.raises(ResourceError, match="too small"):
        plan(classifier, 300, 400, memory=least - (1 << 20))


def smallest(error: ResourceError) -> int:
    """The bytes that the message of a refusal names."""
    return int(str(error).split("--memory ")[2].split("MiB")[0]) << 20


def test_the_memory_of_a_gpu_is_planned_apart(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.Engine, "__init__", _on_a_gpu(engine.Engine.__init__))
    found = plan(classifier, 3000, 2000)
    assert set(found.device_memory) == {"weights", "projected pixels", "batches"} and "batches" not in found.memory
    with pytest.raises(ResourceError, match="--device-memory 1MiB is too small"):
        plan(classifier, 3000, 2000, device_memory=1 << 20)
    assert plan(classifier, 3000, 2000, memory=GIBI, device_memory=GIBI).rows >= 1


def _on_a_gpu(plain: Any) -> Any:
    """An engine that believes it is on a GPU; nothing is computed with it."""

    def init(made: engine.Engine, *arguments: Any) -> None:
        plain(made, *arguments)
        made.device = torch.device("cuda")
        made.batches = engine.BATCHES["cuda"]
        made.windows = made.batches.windows(made.classifier.config.model.tokens)

    return init


def test_the_time_is_measured_on_windows_of_zeros(classifier: Classifier) -> None:
    with open_engine(classifier) as made:
        seconds = seconds_per_pixel(made)
    assert 1e-7 < seconds < 1
    summary = plan(classifier, 300, 400, seconds=seconds).summary()
    assert summary["expected_seconds"] == round(120_000 * seconds, 2) and summary["pixels"] == 120_000
    assert summary["memory"]["sum"] == sum(size for name, size in summary["memory"].items() if name != "sum")
    json.dumps(summary)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Scene]:
    """Scenes of 1 and 16 megapixels."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of memory is read from /proc")
    folder, found = tmp_path_factory.mktemp("large"), {}
    for side in (1024, 4096):
        noise = np.random.default_rng(side).integers(0, 4000, (97, side, 2), dtype=np.uint16)

        def rows(part: slice, noise: np.ndarray = noise) -> np.ndarray:
            return noise[np.arange(part.start, part.stop) % len(noise)]

        with SceneWriter(folder / f"{side}.zarr", height=side, width=side) as writer:
            writer.add_modality("hsi", rows, bands=2, dtype="uint16")
        found[side] = open_scene(folder / f"{side}.zarr")
    return found


def predict_large(scene: Scene, out: Path, *more: str) -> dict[str, Any]:
    """Predict one row of sixteen; all is read, projected and written."""
    mask = np.zeros((scene.height, scene.width), np.uint8)
    mask[:: 65536 // scene.width] = 1
    mask.tofile(out / "mask.img")  # ENVI is read with plain file reads, which leave nothing in a cache
    header = f"ENVI\nlines = {scene.height}\nsamples = {scene.width}\nbands = 1\ndata type = 1\ninterleave = bsq\n"
    (out / "mask.hdr").write_text(header)
    script = Path(__file__).with_name("large.py")
    done = subprocess.run(
        [sys.executable, str(script), str(scene.path), str(out / "map.tif"), "3", *more, str(out / "mask.img")],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["pixels"] == scene.height * scene.width and found["classified"] == mask.sum()
    return found


def test_the_peak_of_memory_hardly_grows_with_the_scene_and_keeps_to_its_limit(
    scenes: dict[int, Scene], tmp_path: Path
) -> None:
    small, large = (predict_large(scene, tmp_path, "0") for scene in scenes.values())
    assert large["peak"] < 1.1 * small["peak"], (small, large)
    limit = (small["planned"] >> 20) - 12
    limited = predict_large(scenes[1024], tmp_path, str(limit))
    assert limited["blocks"] > small["blocks"]
    assert limited["peak"] <= limited["planned"] <= limit << 20
