"""Generated knee exams in the layout of MRNet, for whoever has not the real ones: they are no substitute for them.

An exam is three volumes of grey levels: smooth tissue with noise, and a dark band through the joint. In an exam with
the finding the band is broken by a bright gap, whose place, size and contrast vary, and which some planes miss.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastdiffclip.scene.mrnet import PLANES, MrnetLayout, ingest_mrnet
from fastdiffclip.scene.store import ClassInfo

TASK = "generated"
CLASSES = (
    ClassInfo(1, "Whole band (generated)", "a dark band that runs unbroken through the middle of the joint"),
    ClassInfo(2, "Broken band (generated)", "a dark band with a bright gap where it is torn"),
)
SIDE, SLICES = 96, 12
EXAMS = {"train": 40, "valid": 40}
SEED = 20


def generated_exams(root: Path, window: int) -> list[Path]:
    """Scenes of generated exams for windows of ``window`` pixels under ``root``, made when they are not there yet."""
    out = root / "exams" / f"generated-{window}"
    found = sorted(out.glob("*.zarr"))
    if len(found) == sum(EXAMS.values()):
        return found
    import tempfile

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        _write_volumes(Path(folder))
        layout = MrnetLayout(window=window, slices=4, block=max(1, 44 // window))
        return ingest_mrnet(Path(folder), out, TASK, {TASK: CLASSES}, layout, overwrite=True)[0]


def _write_volumes(folder: Path) -> None:
    rng = np.random.Generator(np.random.PCG64(SEED))
    number = 0
    for part, count in EXAMS.items():
        lines = []
        for label in np.resize([0, 1], count):
            for plane in PLANES:
                (folder / part / plane).mkdir(parents=True, exist_ok=True)
                np.save(folder / part / plane / f"{number:04}.npy", _volume(bool(label), rng))
            lines.append(f"{number:04},{label}\n")
            number += 1
        (folder / f"{part}-{TASK}.csv").write_text("".join(lines), encoding="utf-8")


def _volume(torn: bool, rng: np.random.Generator) -> np.ndarray:
    """One plane of an exam, (slices, side, side) uint8."""
    from scipy.ndimage import gaussian_filter

    tissue = gaussian_filter(rng.standard_normal((SLICES, SIDE, SIDE)), (2, 8, 8))
    volume = 110 + 12 * tissue / tissue.std() + 8 * rng.standard_normal(tissue.shape)
    row, col = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    slope, shift = rng.normal(0.5, 0.1), rng.normal(0, 0.02)
    along, across = col, row - slope * col - shift
    band = np.exp(-((across / 0.05) ** 2)) * (np.abs(along) < 0.3)
    if torn and rng.random() < 0.85:
        gap = np.exp(-(((along - rng.normal(0, 0.04)) / rng.uniform(0.08, 0.14)) ** 2))
        volume += rng.uniform(30, 70) * gap * np.exp(-((across / 0.07) ** 2))
        band = band * (1 - gap)
    depth = np.exp(-(((np.arange(SLICES) - SLICES / 2) / 3.0) ** 2))[:, None, None]
    return np.clip(volume - 60 * depth * band, 0, 255).astype(np.uint8)
