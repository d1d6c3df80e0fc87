"""What users say of bands: which are bad, and at which wavelengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.store import open_scene

from .ingest_files import cube, run


@pytest.mark.parametrize(("text", "flags"), [
    ("0\n1\n0\n", [0, 1, 0]), ("0,1,1", [0, 1, 1]), ("2", [0, 1, 0]), ("1, 3", [1, 0, 1]),
    ("2-3 # water", [0, 1, 1]),    ("", [0, 0, 0]), ("1", [1, 0, 0]),
])  # fmt: skip
def test_bad_bands(tmp_path: Path, text: str, flags: list[int]) -> None:
    (tmp_path / "bad.txt").write_text(text)
    run(tmp_path, cube(bands=3), bad_bands=tmp_path / "bad.txt")
    assert open_scene(tmp_path / "out.zarr").modalities["hsi"].bad_bands == tuple(map(bool, flags))


@pytest.mark.parametrize(("text", "message"), [
    ("9" * 5000, "is no band of 1 to 3"),
    ("4", "'4' is no band of 1 to 3"), ("0 1", "'0' is no band"), ("x", "'x' is no band"),
    ("3-2", "'3-2' is no band"),    ("1 1 1", "all 3 bands as bad"),
])  # fmt: skip
def test_wrong_bad_bands(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.txt").write_text(text)
    with pytest.raises(InputDataError, match=message):
        run(tmp_path, cube(bands=3), bad_bands=tmp_path / "bad.txt")


@pytest.mark.parametrize(("text", "expected"), [
    ("450\n550.5\n", (450.0, 550.5)),
    ("0.45\n2.5\n", (450.0, 2500.0)),
    ("# nm\nwavelength\n99\n101\n", (99.0, 101.0)),
    ("name;wavelength_nm\nb1;450\nb2;550\n", (450.0, 550.0)),
])  # fmt: skip
def test_wavelengths(tmp_path: Path, text: str, expected: tuple[float, float]) -> None:
    (tmp_path / "w.txt").write_text(text)
    run(tmp_path, cube(bands=2), wavelengths=tmp_path / "w.txt")
    assert open_scene(tmp_path / "out.zarr").modalities["hsi"].wavelengths == expected


def test_wavelengths_from_a_matlab_vector(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "w.mat", {"w": np.array([[450.0], [550.0]]), "x": np.ones((2, 2))})
    run(tmp_path, cube(bands=2), wavelengths=f"{tmp_path}/w.mat:w")
    assert open_scene(tmp_path / "out.zarr").modalities["hsi"].wavelengths == (450.0, 550.0)


@pytest.mark.parametrize(("text", "message"), [
    ("450\n", "has 1 wavelengths, the raster has 2 bands"),
    ("450\nx\n", "line 2: found 'x'"),
    ("1,450\n2,550\n", "line 1: found '1 450'.* header"), ("450\n-1\n", "not a positive number"),
])  # fmt: skip
def test_wrong_wavelengths(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "w.txt").write_text(text)
    with pytest.raises(InputDataError, match=message):
        run(tmp_path, cube(bands=2), wavelengths=tmp_path / "w.txt")
