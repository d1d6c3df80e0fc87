"""Files read as a scene give what the ingested scene gives, pixel for pixel, and every row is read once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine

from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.scene import raster_scene
from fastdiffclip.scene.blocks import iter_row_blocks
from fastdiffclip.scene.ingest import IngestRequest, ingest
from fastdiffclip.scene.raster_scene import RasterScene, open_raster_scene
from fastdiffclip.scene.store import Scene, open_scene

HEIGHT, WIDTH = 37, 11


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """cube.tif (int16, nodata in all bands of a few pixels), dsm.tif (float32, NaN), bytes.npy, wide.npy, mask.npy."""
    rng = np.random.default_rng(0)
    cube = rng.integers(-50, 4000, (5, HEIGHT, WIDTH)).astype(np.int16)
    cube[:, 3, 4], cube[0, 5, 5] = -9999, -9999
    heights = rng.normal(20, 3, (1, HEIGHT, WIDTH)).astype(np.float32)
    heights[0, 30, 2:5], heights[0, 7, 7] = np.nan, np.inf
    for name, values, nodata in (("cube.tif", cube, -9999), ("dsm.tif", heights, None)):
        profile = {"driver": "GTiff", "height": HEIGHT, "width": WIDTH, "count": len(values), "dtype": values.dtype}
        place = {"crs": "EPSG:32632", "transform": Affine(2, 0, 5e5, 0, -2, 52e5), "nodata": nodata}
        with rasterio.open(tmp_path / name, "w", **profile, **place) as raster:
            raster.write(values)
    np.save(tmp_path / "bytes.npy", rng.integers(0, 256, (HEIGHT, WIDTH, 2)).astype(np.uint8))
    np.save(tmp_path / "wide.npy", rng.integers(0, 40_000, (HEIGHT, WIDTH, 2)))
    np.save(tmp_path / "mask.npy", rng.random((HEIGHT, WIDTH)) < 0.8)
    (tmp_path / "waves.txt").write_text("\n".join(str(400 + 10 * band) for band in range(5)))
    (tmp_path / "bad.txt").write_text("2")
    return tmp_path


@pytest.fixture(params=["plain", "said"])
def both(
    files: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Scene, RasterScene]]:
    """The ingested scene, and its files as one; read a few rows at a time."""
    monkeypatch.setattr(raster_scene, "_BYTES_AT_ONCE", 5 * WIDTH * 5 * 2)
    names = {"hsi": "cube.tif", "lidar": "dsm.tif", "sar": "bytes.npy", "more": "wide.npy"}
    said: dict[str, Any] = {}
    if request.param == "said":
        said = {
            "valid": {"sar": str(files / "mask.npy")}, "wavelengths": files / "waves.txt", "scale": 1e-4,
            "bad_bands": files / "bad.txt", "nodata": {"sar": 0},
        }  # fmt: skip
    asked = IngestRequest([(name, str(files / file)) for name, file in names.items()], files / "s.zarr", **said)
    ingest(asked)
    with open_raster_scene(asked) as scene:
        yield open_scene(files / "s.zarr"), scene


def test_values_validity_and_grid_are_those_of_the_ingested_scene(both: tuple[Scene, RasterScene]) -> None:
    stored, direct = both
    assert (direct.height, direct.width, direct.name) == (HEIGHT, WIDTH, "cube")
    assert direct.affine_transform == stored.affine_transform and direct.crs_wkt == stored.crs_wkt
    assert list(direct.modalities) == list(stored.modalities)
    for name, modality in stored.modalities.items():
        other = direct.modalities[name]
        measured = {"mean": modality.mean, "std": modality.std, "valid_pixels": modality.valid_pixels}
        assert replace(other, **measured) == modality
        for rows, cols in ((slice(None), slice(None)), (slice(3, 9), slice(2, 7)), (slice(36, 99), slice(0, 1))):
            np.testing.assert_array_equal(direct.read_valid(name, rows, cols), stored.read_valid(name, rows, cols))
            np.testing.assert_array_equal(direct.read(name, rows, cols), stored.read(name, rows, cols))
    assert not stored.read_valid("hsi")[3, 4] and stored.read_valid("hsi")[5, 5]
    assert (~stored.read_valid("lidar")).sum() == 4


@pytest.mark.parametrize(("block", "halo"), [(None, 0), (4, 3), (100, 1)])
def test_blocks_are_those_of_the_ingested_scene_and_every_row_is_read_once(
    both: tuple[Scene, RasterScene], block: int | None, halo: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, direct = both
    read: dict[str, list[int]] = {name: [] for name in direct.modalities}
    for name, raster in direct.rasters.items():
        plain = raster._read

        def counted(rows: slice, name: str = name, plain: Any = plain) -> np.ndarray:
            read[name] += range(rows.start, rows.stop)
            return plain(rows)

        monkeypatch.setattr(raster, "_read", counted)
    ours, theirs = iter_row_blocks(direct, block or 5, halo), iter_row_blocks(stored, block or 5, halo)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.rows, mine.halo_rows) == (other.rows, other.halo_rows)
        for name in direct.modalities:
            np.testing.assert_array_equal(mine.raw[name], other.raw[name])
            np.testing.assert_array_equal(mine.valid[name], other.valid[name])
    assert all(rows == list(range(HEIGHT)) for rows in read.values())


def test_the_identity_follows_the_files_and_what_is_said_of_them(files: Path) -> None:
    def identity(**said: Any) -> str:
        with open_raster_scene(IngestRequest([("hsi", str(files / "cube.tif"))], "", **said)) as scene:
            return scene.sha256

    first = identity()
    assert identity() == first and identity(scale=2.0) != first and identity(nodata=7) != first
    os.utime(files / "cube.tif", ns=(1, 1))
    assert identity() != first


def test_files_that_do_not_make_one_scene(files: Path) -> None:
    def opened(*modalities: tuple[str, str], **said: Any) -> None:
        with open_raster_scene(IngestRequest([(name, str(files / file)) for name, file in modalities], "", **said)):
            raise AssertionError("it opened")

    np.save(files / "small.npy", np.zeros((3, 3), np.uint8))
    with pytest.raises(InputDataError, match="does not lie on the grid of"):
        opened(("hsi", "cube.tif"), ("lidar", "small.npy"))
    with pytest.raises(InputDataError, match="there is no file"):
        opened(("hsi", "none.tif"))
    with pytest.raises(UsageError, match=r"\*\.npy stands for 4 scenes; give the files of one"):
        opened(("hsi", "*.npy"))
    with pytest.raises(UsageError, match="is given twice"):
        opened(("hsi", "cube.tif"), ("hsi", "cube.tif"))
    alone = IngestRequest([("hsi", str(files / "cube.tif"))], "")
    with open_raster_scene(alone) as scene, pytest.raises(UsageError, match="no modality 'hso'"):
        scene.read("hso")
    (files / "cube.tif").write_bytes((files / "cube.tif").read_bytes()[:400])
    with pytest.raises(InputDataError, match="truncated or damaged"), open_raster_scene(alone) as scene:
        scene.read("hsi")
