"""Presets on pieces of the real data sets, where they are present."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io

from fastdiffclip.scene.presets import preset_request

from .preset_files import RNG, mat, refused, run


def test_trento_real_pieces(tmp_path: Path, real_data: Path) -> None:
    """The real LiDAR and official maps of Trento, with a made-up cube: the spectra are not public here."""
    folder = tmp_path / "Trento"
    folder.mkdir()
    for name in ("LiDAR.mat", "TRLabel.mat", "TSLabel.mat"):
        (folder / name).write_bytes((real_data / "trento_lidar" / name).read_bytes())
    mat(folder / "Italy_hsi.mat", data=RNG.integers(1, 9000, (166, 600, 63)).astype(np.uint16))
    scene, report = run("trento", folder)
    assert report.warnings == [] and (scene.height, scene.width) == (166, 600)
    assert np.count_nonzero(scene.read_labels("train")) == 819
    assert np.count_nonzero(scene.read_labels("test")) == 29395
    lidar = scipy.io.loadmat(real_data / "trento_lidar" / "LiDAR.mat")["LiDAR"]
    np.testing.assert_array_equal(scene.read("lidar")[..., 0], lidar)


def test_houston_real_maps(tmp_path: Path, real_data: Path) -> None:
    """The official maps and the known part of the LiDAR features in the MATLAB layout, with a made-up thin cube."""
    folder = tmp_path / "Houston"
    with np.load(real_data / "houston2013" / "houston2013_canvas.npz") as canvas:
        mat(folder / "TRLabel.mat", TRLabel=canvas["tr_label"])
        mat(folder / "TSLabel.mat", TSLabel=canvas["ts_label"])
        mat(folder / "LiDAR.mat", LiDAR=canvas["lidar21"][..., :1])
    np.save(folder / "HSI.npy", np.ones((349, 1905, 1), np.uint8) * np.arange(100, dtype=np.uint8))
    request, notes = preset_request("houston2013", folder, tmp_path / "out.zarr")
    assert notes == [] and request.labels == [
        ("train", str(folder / "TRLabel.mat")), ("test", str(folder / "TSLabel.mat")),
    ]  # fmt: skip
    scene, _ = run("houston2013", folder)
    assert np.count_nonzero(scene.read_labels("train")) == 2832 and len(scene.classes) == 15


def test_muufl_real_crop(tmp_path: Path, real_data: Path) -> None:
    """A real crop in the split layout, with a made-up surface and labels."""
    crop = scipy.io.loadmat(real_data / "muufl_crops" / "an_hsi_image_sub_for_demo.mat")
    plane = crop["hsi_img_sub"].shape[:2]
    mat(tmp_path / "data" / "muufl_hsi.mat", **{key: crop[key] for key in ("hsi_img_sub", "wavelengths", "mask_sub")})
    assert "looked for HSI, hsi" in refused("muufl", tmp_path / "data")
    mat(tmp_path / "data" / "muufl_hsi.mat", hsi=crop["hsi_img_sub"], wavelengths=crop["wavelengths"])
    mat(tmp_path / "data" / "muufl_lidar.mat", lidar=np.ones(plane, np.float32))
    mat(tmp_path / "data" / "muufl_gt.mat", muufl_gt=np.where(crop["mask_sub"], 2, -1))
    scene, _ = run("muufl", tmp_path / "data")
    np.testing.assert_array_equal(scene.read("hsi"), crop["hsi_img_sub"])
    assert set(np.unique(scene.read_labels())) <= {0, 2}
