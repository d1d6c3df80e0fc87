"""Writing a scene: it appears whole or not at all, and says what it cannot write."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from fastdiffclip.errors import InputDataError, ResourceError, UsageError
from fastdiffclip.scene.store import open_scene
from fastdiffclip.scene.writer import SceneWriter

from .small_scenes import CLASSES, write_small


def test_statistics_leave_out_invalid_pixels_and_know_constants(tmp_path: Path) -> None:
    cube = np.full((3, 4, 3), 0.1, np.float32)
    cube[..., 1] = np.arange(12).reshape(3, 4)
    cube[..., 2] = np.nan  # a bad band may be all NaN
    cube[0, 0] = -9999
    cube[0, 1, 1] = np.nan
    cube[0, 2, 0] = np.inf
    masked = np.ones((3, 4), bool)
    masked[0, 3] = False
    with SceneWriter(tmp_path / "x.zarr", height=3, width=4) as writer:
        modality = writer.add_modality(
            "hsi", cube, bands=3, dtype="float32", valid=masked, nodata=-9999, bad_bands=(False, False, True)
        )
        assert writer.invalid_counts["hsi"] == {"masked": 1, "nodata": 1, "nonfinite": 2}
    np.testing.assert_array_equal(open_scene(tmp_path / "x.zarr").read_valid("hsi")[0], [False] * 4)
    np.testing.assert_array_equal(open_scene(tmp_path / "x.zarr").read("hsi"), cube)
    assert modality.valid_pixels == 8
    assert modality.std[0] == 0.0 and modality.mean[0] == float(np.float32(0.1))
    np.testing.assert_allclose(modality.mean[1], np.arange(4, 12).mean())
    assert modality.mean[2] == modality.std[2] == 0.0


@pytest.mark.parametrize(("dtype", "nodata", "hits"), [("uint16", 7, 1), ("uint16", -9999, 0), ("int16", 1e300, 0)])
def test_nodata_that_a_dtype_cannot_hold_hits_nothing(tmp_path: Path, dtype: str, nodata: float, hits: int) -> None:
    cube = np.zeros((2, 2, 2), dtype)
    cube[0, 0], cube[0, 1, 0] = 7, 7
    with SceneWriter(tmp_path / "x.zarr", height=2, width=2) as writer:
        writer.add_modality("hsi", cube, bands=2, dtype=dtype, nodata=nodata)
        assert writer.invalid_counts["hsi"]["nodata"] == hits


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError("boom"), "signal"])
def test_interrupted_writing_leaves_nothing(tmp_path: Path, failure: object) -> None:
    def rows(part: slice) -> np.ndarray:
        if part.start > 0:
            if failure == "signal":
                signal.raise_signal(signal.SIGINT)
            else:
                raise failure  # type: ignore[misc]
        return np.ones((part.stop - part.start, 1000, 200), np.float32)

    with (
        pytest.raises((KeyboardInterrupt, RuntimeError)),
        SceneWriter(tmp_path / "x.zarr", height=99, width=1000) as w,
    ):
        w.add_modality("hsi", rows, bands=200, dtype="float32")
    assert list(tmp_path.iterdir()) == []


def test_failure_while_finishing_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(InputDataError, match=r"values without a class: \[3\]"),
        SceneWriter(tmp_path / "x.zarr", height=1, width=1) as writer,
    ):
        writer.add_modality("hsi", np.ones((1, 1, 1), np.uint16), bands=1, dtype="uint16")
        writer.add_labels("labels", np.full((1, 1), 3, np.uint8))
        writer.set_classes(CLASSES)
    assert list(tmp_path.iterdir()) == []


def test_existing_targets(tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    write_small(path)
    first = open_scene(path).sha256
    with pytest.raises(UsageError, match="exists already"):
        write_small(path)
    with pytest.raises(RuntimeError), SceneWriter(path, height=1, width=1, overwrite=True):
        raise RuntimeError
    assert open_scene(path).sha256 == first
    write_small(path, height=31, overwrite=True)
    assert open_scene(path).height == 31
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="is not replaced"):
        write_small(tmp_path / "mine", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "x.zarr"]


def test_full_disk_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="GiB free"):
        write_small(tmp_path / "x.zarr")
    monkeypatch.undo()

    def full(part: slice) -> np.ndarray:
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(ResourceError, match="disk of .* is full"),
        SceneWriter(tmp_path / "x.zarr", height=2, width=2) as writer,
    ):
        writer.add_modality("hsi", full, bands=1, dtype="uint16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["labels", "HSI", "a_valid", "spatial_ref", "9x", "a/b", ""])
def test_modality_names(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(UsageError, match="cannot name a modality"),
        SceneWriter(tmp_path / "x.zarr", height=1, width=1) as writer,
    ):
        writer.add_modality(name, np.ones((1, 1, 1), np.uint16), bands=1, dtype="uint16")


def test_wrong_calls(tmp_path: Path) -> None:
    with SceneWriter(tmp_path / "x.zarr", height=2, width=2) as writer:
        cube = np.ones((2, 2, 2), np.uint16)
        with pytest.raises(UsageError, match="stored as float64"):
            writer.add_modality("hsi", cube, bands=2, dtype="float64")
        with pytest.raises(InputDataError, match="2 bands, wavelengths has 3 entries"):
            writer.add_modality("hsi", cube, bands=2, dtype="uint16", wavelengths=(1, 2, 3))
        writer.add_modality("lidar", cube, bands=2, dtype="uint16")
        with pytest.raises(UsageError, match="given twice"):
            writer.add_modality("lidar", cube, bands=2, dtype="uint16")
        with pytest.raises(InputDataError, match=r"is \(1, 2\), expected \(2, 2\)"):
            writer.add_labels("labels", np.ones((1, 2), np.uint8))
        with pytest.raises(InputDataError, match="integers 0 to 65535"):
            writer.add_labels("labels", np.full((2, 2), -1))
        with pytest.raises(UsageError, match="each once"):
            writer.add_labels("gt", np.ones((2, 2), np.uint8))
