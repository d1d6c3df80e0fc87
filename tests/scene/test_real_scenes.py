"""Ingest of real scenes, where they are present: nothing is lost on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
import scipy.io

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.ingest import IngestRequest, ingest
from fastdiffclip.scene.store import open_scene, verify_scene


def test_salinas_a(tmp_path: Path, real_data: Path) -> None:
    folder = real_data / "salinas_a"
    labels = [("labels", f"{folder}/salinasA_gt.mat")]
    cube = [("hsi", f"{folder}/salinasA_corrected.mat:salinasA_corrected")]
    report = ingest(IngestRequest(cube, tmp_path / "salinas.zarr", labels=labels))
    scene = open_scene(report.scenes[0])
    hsi = scipy.io.loadmat(folder / "salinasA_corrected.mat")["salinasA_corrected"]
    np.testing.assert_array_equal(scene.read("hsi"), hsi)
    assert scene.modalities["hsi"].dtype == "int16" and scene.crs_wkt is None
    np.testing.assert_allclose(scene.modalities["hsi"].mean, hsi.mean((0, 1)))
    np.testing.assert_allclose(scene.modalities["hsi"].std, hsi.std((0, 1)), rtol=1e-9)
    assert np.count_nonzero(scene.read_labels()) == 4861 and len(scene.classes) == 6
    with pytest.raises(InputDataError, match=r"no variable 'HSI'; it holds salinasA_corrected \(83 x 86 x 204"):
        ingest(IngestRequest([("hsi", f"{folder}/salinasA_corrected.mat:HSI")], tmp_path / "other.zarr"))


def test_osbs_plots(tmp_path: Path, real_data: Path) -> None:
    folder = real_data / "osbs"
    report = ingest(
        IngestRequest(
            [
                ("hsi", f"{folder}/hsi/*.tif"),
                ("lidar", f"{folder}/chm/*.tif"),
                ("intensity", f"{folder}/intensity/*.tif"),
            ],
            tmp_path / "osbs",
            labels=[("labels", f"{folder}/labels/*.tif")],
            classes=folder / "classes.csv",
            scale=1e-4,
        )
    )
    assert len(report.scenes) == 39 and report.warnings == []
    scenes = [open_scene(path) for path in report.scenes]
    assert scenes[1].name == "OSBS_2"
    counts = sum(np.bincount(scene.read_labels().ravel(), minlength=13) for scene in scenes)
    assert counts[1] == 4852 and counts[1:].sum() == 6514
    for scene in scenes[::13]:
        with rasterio.open(folder / "hsi" / f"{scene.name}.tif") as dataset:
            np.testing.assert_array_equal(scene.read("hsi"), np.moveaxis(dataset.read(), 0, -1))
            assert scene.affine_transform == tuple(dataset.transform)[:6]
        with rasterio.open(folder / "intensity" / f"{scene.name}.tif") as dataset:
            np.testing.assert_array_equal(scene.read_valid("intensity"), np.isfinite(dataset.read(1)))
        assert scene.modalities["hsi"].scale == 1e-4 and max(scene.modalities["hsi"].mean) < 1.0
    assert all(verify_scene(path).ok for path in report.scenes)


def test_houston_with_validity_masks(tmp_path: Path, real_data: Path) -> None:
    canvas = f"{real_data}/houston2013/houston2013_canvas.npz"
    report = ingest(
        IngestRequest(
            [("hsi", f"{canvas}:hsi"), ("lidar", f"{canvas}:lidar21")],
            tmp_path / "houston.zarr",
            valid={"hsi": f"{canvas}:hsi_known", "lidar": f"{canvas}:lidar_known"},
            labels=[("train", f"{canvas}:tr_label"), ("test", f"{canvas}:ts_label")],
        )
    )
    scene = open_scene(report.scenes[0])
    assert scene.modalities["hsi"].valid_pixels == 2832 and scene.modalities["lidar"].valid_pixels == 29112
    assert scene.label_maps == ("train", "test") and len(scene.classes) == 15
    assert np.count_nonzero(scene.read_labels("test")) == 12197
    with np.load(canvas) as data:
        known, hsi = data["hsi_known"], data["hsi"]
        np.testing.assert_array_equal(scene.read("hsi", slice(90, 200), slice(500, 700)), hsi[90:200, 500:700])
        np.testing.assert_array_equal(scene.read_valid("hsi"), known)
        np.testing.assert_allclose(scene.modalities["hsi"].mean, hsi[known].mean(0, dtype=np.float64), rtol=1e-6)
