"""Globs: files of several scenes that belong together."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.ingest import IngestRequest, ingest
from fastdiffclip.scene.store import open_scene

from .ingest_files import plots


def test_globs_make_scenes_matched_by_stem(tmp_path: Path) -> None:
    hsi = plots(tmp_path, "hsi", ["p1", "p2", "p10"])
    lidar = plots(tmp_path, "chm", ["p10", "p2", "p1", "p0"], bands=1)
    report = ingest(
        IngestRequest(
            [("hsi", hsi), ("lidar", lidar)],
            tmp_path / "out",
            labels=[("labels", plots(tmp_path, "gt", ["p1", "p10", "p2"], 1))],
        )
    )
    assert [p.name for p in report.scenes] == ["p1.zarr", "p2.zarr", "p10.zarr"]
    scenes = [open_scene(path) for path in report.scenes]
    assert [s.name for s in scenes] == ["p1", "p2", "p10"]
    assert [int(s.read("hsi")[0, 0, 0]) for s in scenes] == [1, 2, 3]
    assert [int(s.read("lidar")[0, 0, 0]) for s in scenes] == [3, 2, 1]
    assert scenes[0].classes == scenes[2].classes and len(scenes[0].classes) == 6  # one table over all scenes
    assert "lidar: 1 files belong to no modality hsi file and are not used: p0" in report.warnings[0]


def test_globs_without_a_common_stem_go_by_order(tmp_path: Path) -> None:
    specs = [
        ("hsi", plots(tmp_path, "a", ["hsi_9", "hsi_10"])),
        ("lidar", plots(tmp_path, "b", ["chm_9", "chm_10"], 1)),
    ]
    report = ingest(IngestRequest(specs, tmp_path / "out"))
    assert [int(open_scene(p).read("lidar")[0, 0, 0]) for p in report.scenes] == [1, 2]


def test_globs_that_do_not_match(tmp_path: Path) -> None:
    hsi = plots(tmp_path, "hsi", ["p1", "p2", "p3"])
    for names, message in (
        (
            ["p1", "p2"],
            "2 files for 3 .* modality hsi without modality lidar: p3; .* without modality hsi: none",
        ),
        (["p1", "p2", "q3"], "without modality lidar: p3; modality lidar without modality hsi: q3"),
        (["a", "b"], "p1, p2, p3"),
    ):
        folder = "-".join(names)
        with pytest.raises(InputDataError, match=message):
            ingest(IngestRequest([("hsi", hsi), ("lidar", plots(tmp_path, folder, names, 1))], tmp_path / "out"))
    plots(tmp_path, "hsi/deeper", ["p1"])
    with pytest.raises(InputDataError, match="several files are called p1"):
        ingest(IngestRequest([("hsi", f"{tmp_path}/hsi/**/*.tif")], tmp_path / "out"))
    assert not (tmp_path / "out").exists()
