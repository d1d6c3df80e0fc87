"""Rasters on other grids: against kernels written out, tile by tile, nodata, CRS, and what the scene records."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.scene import resample
from fastdiffclip.scene.georeference import Grid, project, to_map, to_pixels
from fastdiffclip.scene.ingest import IngestReport, IngestRequest, ingest
from fastdiffclip.scene.readers.source import RasterSource, source_of_array
from fastdiffclip.scene.resample import METHODS, aligned
from fastdiffclip.scene.store import open_scene, scene_summary

UTM17, UTM18 = (rasterio.CRS.from_epsg(code).to_wkt() for code in (32617, 32618))
FINE = (1.0, 0.0, 500000.0, 0.0, -1.0, 4100000.0)
# The weights sum to one in float64 and are applied in float32; values stay below 10.
ROUNDING = 5e-6


def grid(what: str, height: int, width: int, transform: tuple[float, ...], crs: str | None = UTM17) -> Grid:
    return Grid(what, Path(f"{what}.tif"), height, width, crs, transform)


def raster(values: np.ndarray, **more: Any) -> RasterSource:
    source = source_of_array(Path("lidar.tif"), "lidar", values)
    for name, value in more.items():
        setattr(source, name, value)
    return source


def whole(source: RasterSource, rows: int = 1000) -> np.ndarray:
    parts = [source.read_rows(slice(r, min(r + rows, source.height))) for r in range(0, source.height, rows)]
    return np.concatenate(parts)


def kernel(method: str, centre: float, size: int, scale: float) -> np.ndarray:
    """Weights of ``size`` pixels around a place, for kernels widened by the scale: triangle, or Keys with a = -1/2."""
    d = np.abs((np.arange(size) + 0.5 - centre) / scale)
    if method == "bilinear":
        return np.clip(1 - d, 0, None)
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return np.where(d < 1, near, np.where(d < 2, far, 0))


@pytest.mark.parametrize("method", ["bilinear", "cubic"])
@pytest.mark.parametrize("pixel", [2.3, 0.4])
def test_interpolation_is_the_kernel_written_out(method: str, pixel: float) -> None:
    values = np.random.default_rng(0).normal(size=(40, 50, 2)).astype(np.float32)
    target = grid("hsi", 9, 12, (pixel, 0, 500009.1, 0, -pixel, 4099991.3))
    found = whole(aligned(raster(values), grid("lidar", 40, 50, FINE), target, method, None))
    scale = max(1.0, pixel)
    for row in range(9):
        for column in range(12):
            down = kernel(method, 8.7 + pixel * (row + 0.5), 40, scale)
            across = kernel(method, 9.1 + pixel * (column + 0.5), 50, scale)
            expected = np.einsum("r,c,rcb->b", down / down.sum(), across / across.sum(), values)
            np.testing.assert_allclose(found[row, column], expected, atol=ROUNDING)


def test_average_is_the_mean_of_the_pixels_below() -> None:
    values = np.random.default_rng(0).normal(size=(12, 15, 1))
    target = grid("hsi", 4, 5, (3.0, 0, 500000.0, 0, -3.0, 4100000.0))
    found = whole(aligned(raster(values), grid("lidar", 12, 15, FINE), target, "average", None))
    np.testing.assert_allclose(found, values.reshape(4, 3, 5, 3, 1).mean((1, 3)), atol=ROUNDING)
    assert found.dtype == np.float32


@settings(max_examples=10, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    pixel=st.sampled_from([0.5, 1.0, 2.7]),
    angle=st.sampled_from([0.0, 30.0, 90.0]),
    crs=st.sampled_from([UTM17, UTM18]),
    limit=st.sampled_from([50 * 2 * 4 * 7, 50 * 2 * 4 * 13]),  # bytes of 7 or 13 rows of the source
)
def test_tiles_and_blocks_make_no_difference(method: str, pixel: float, angle: float, crs: str, limit: int) -> None:
    values = np.random.default_rng(1).normal(size=(40, 50, 2)).astype(np.float32)
    place = np.array([500010.0]), np.array([4099990.0])
    if crs == UTM18:
        place = project(rasterio.CRS.from_wkt(UTM17), rasterio.CRS.from_wkt(UTM18), *place)
    cos, sin = pixel * np.cos(np.radians(angle)), pixel * np.sin(np.radians(angle))
    target = grid("hsi", 13, 11, (cos, sin, float(place[0][0]), sin, -cos, float(place[1][0])), crs)
    own = grid("lidar", 40, 50, FINE)
    at_once = whole(aligned(raster(values), own, target, method, None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resample, "_BYTES_AT_ONCE", limit)
        in_parts = whole(aligned(raster(values), own, target, method, None), 4)
    # Places are computed from map coordinates of 4e6 m in float64 (1e-9 m), through a projection to about 1e-5 pixels.
    tolerance = 1e-6 if crs == UTM17 else 1e-3
    np.testing.assert_allclose(in_parts, at_once, atol=tolerance)


def test_nearest_takes_the_pixel_below_the_centre_and_keeps_the_type() -> None:
    own = grid("lidar", 40, 50, FINE)
    target = grid("hsi", 30, 30, (1.7, 0.2, 499995.0, 0.3, -1.6, 4100003.0))
    rows, columns = np.mgrid[:30, :30]
    x, y = to_pixels(FINE, *to_map(target.affine_transform or (), columns + 0.5, rows + 0.5))
    inside = (x >= 0) & (x < 50) & (y >= 0) & (y < 40)
    for dtype in ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "float32", "float64"):
        values = np.random.default_rng(2).integers(0, 2 if dtype == "bool" else 100, (40, 50, 1)).astype(dtype)
        found = aligned(raster(values), own, target, "nearest", None)
        assert found.dtype == (np.uint8 if dtype == "bool" else dtype) and found.read_mask is not None
        np.testing.assert_array_equal(found.read_mask(slice(0, 30)), inside)
        expected = values[np.floor(y).astype(int).clip(0, 39), np.floor(x).astype(int).clip(0, 49)]
        np.testing.assert_array_equal(whole(found)[inside], expected[inside])


@pytest.mark.parametrize("dtype", ["float32", "int16", "float64"])
@pytest.mark.parametrize("method", ["bilinear", "average", "cubic"])
def test_empty_pixels_have_no_weight(method: str, dtype: str) -> None:
    values = np.full((20, 20, 2), 100, dtype)
    values[4:9, 4:9] = -9999
    values[15, 15, 0] = -9999  # one of two bands: a value like any other
    target = grid("hsi", 10, 10, (2.0, 0, 500000.0, 0, -2.0, 4100000.0))
    found = whole(aligned(raster(values), grid("lidar", 20, 20, FINE), target, method, -9999.0))
    empty = (found == -9999).all(-1)
    assert empty[3, 3] and not empty[0, 0] and not empty[7, 7]
    np.testing.assert_allclose(found[~empty & (np.arange(10) < 6)], 100, rtol=1e-6)
    assert found[7, 7, 0] < 0 and found[7, 7, 1] == pytest.approx(100)


def test_masked_and_nan_pixels_have_no_weight_and_bad_bands_no_say() -> None:
    values = np.full((8, 8, 2), 5.0, np.float32)
    values[0:2, 0:2] = np.nan
    values[4:6, 4:6, 1] = np.nan  # only the bad band
    mask = np.ones((8, 8), bool)
    mask[0:2, 6:8] = False
    values[0:2, 6:8] = 1e6
    target = grid("hsi", 4, 4, (2.0, 0, 500000.0, 0, -2.0, 4100000.0))
    source = raster(values, read_mask=mask.__getitem__, bad_bands=(False, True))
    found = whole(aligned(source, grid("lidar", 8, 8, FINE), target, "average", None))
    assert np.argwhere(np.isnan(found[..., 0])).tolist() == [[0, 0], [0, 3]]
    assert np.isnan(found[2, 2, 1]) and (found[..., 0][~np.isnan(found[..., 0])] == 5).all()


def test_neither_grid_has_a_crs() -> None:
    values = np.arange(64.0).reshape(8, 8, 1)
    target = grid("hsi", 4, 4, (2.0, 0, 500000.0, 0, -2.0, 4100000.0), None)
    found = whole(aligned(raster(values), grid("lidar", 8, 8, FINE, None), target, "average", None))
    np.testing.assert_allclose(found, values.reshape(4, 2, 4, 2, 1).mean((1, 3)), atol=ROUNDING)


@pytest.mark.parametrize(("own", "target", "message"), [
    (Grid("lidar", Path("l"), 8, 8), grid("hsi", 4, 4, FINE), "lidar has no transform, georeference it"),
    (grid("lidar", 8, 8, FINE), Grid("hsi", Path("h"), 4, 4), "hsi has no transform, georeference it"),
    (grid("lidar", 8, 8, FINE, None), grid("hsi", 4, 4, FINE), "lidar has no CRS, georeference it"),
    (grid("lidar", 8, 8, FINE), grid("hsi", 4, 4, FINE, None), "hsi has no CRS, georeference it"),
    (grid("lidar", 8, 8, FINE), grid("hsi", 4, 4, (1.0, 0, 7e5, 0, -1.0, 4.1e6)), "lidar .* and hsi .* do not overlap"),
    (grid("lidar", 8, 8, (1.0, 1.0, 0, 1.0, 1.0, 0)), grid("hsi", 4, 4, FINE), "a transform has no area"),
])  # fmt: skip
def test_grids_without_a_common_place(own: Grid, target: Grid, message: str) -> None:
    with pytest.raises(InputDataError, match=message):
        aligned(raster(np.ones((8, 8, 1))), own, target, "bilinear", None)


def test_memory_does_not_grow_with_the_source() -> None:
    def zeros(height: int) -> RasterSource:
        def read(rows: slice) -> np.ndarray:
            return np.zeros((rows.stop - rows.start, 2000, 8), np.float32)

        return RasterSource(Path("l"), height, 2000, 8, np.dtype(np.float32), read)

    peaks = []
    for height in (1200, 3600):  # 73 and 220 MiB
        own = grid("lidar", height, 2000, (0.5, 0, 500000.0, 0, -0.5, 4100000.0))
        target = grid("hsi", height // 20, 100, (10.0, 0, 500000.0, 0, -10.0, 4100000.0))
        tracemalloc.start()
        whole(aligned(zeros(height), own, target, "average", None), 50)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.1 and peaks[1] < 5 * 64 * 2**20


def tiff(path: Path, values: np.ndarray, transform: tuple[float, ...], crs: str = "EPSG:32617", **more: Any) -> str:
    with rasterio.open(
        path, "w", driver="GTiff", height=values.shape[0], width=values.shape[1], count=values.shape[2],
        dtype=values.dtype, crs=crs, transform=Affine(*transform), **more,
    ) as dataset:  # fmt: skip
        dataset.write(np.moveaxis(values, -1, 0))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A cube of 2 m, heights of 1 m in which a corner is empty and an edge lies outside, labels and a mask of 1 m."""
    rng = np.random.default_rng(0)
    coarse = (2.0, 0.0, 500000.0, 0.0, -2.0, 4100000.0)
    tiff(tmp_path / "hsi.tif", rng.integers(1, 999, (10, 12, 3)).astype("uint16"), coarse)
    heights = rng.normal(10, 1, (20, 22, 1)).astype("float32")
    heights[:4, :4] = -9999
    tiff(tmp_path / "dsm.tif", heights, FINE, nodata=-9999)
    labels = np.zeros((20, 22, 1), "uint8")
    labels[8:12, 8:12] = 3
    tiff(tmp_path / "gt.tif", labels, FINE)
    mask = np.ones((20, 22, 1), "uint8")
    mask[16:, :4] = 0
    tiff(tmp_path / "mask.tif", mask, FINE)
    return tmp_path


def run(files: Path, **options: Any) -> IngestReport:
    modalities = options.pop("modalities", [("hsi", f"{files}/hsi.tif"), ("lidar", f"{files}/dsm.tif")])
    return ingest(IngestRequest(modalities, files / "o.zarr", overwrite=True, **options))


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_a_scene_of_several_grids(files: Path, method: str) -> None:
    report = run(
        files, resample=method, labels=[("labels", f"{files}/gt.tif")], valid={"lidar": f"{files}/mask.tif"},
    )  # fmt: skip
    scene = open_scene(report.scenes[0])
    named = "bilinear" if method == "auto" else method
    assert scene.affine_transform == (2, 0, 500000, 0, -2, 4100000) and scene.read("lidar").shape == (10, 12, 1)
    lidar = scene.modalities["lidar"]
    assert lidar.dtype == "float32" and lidar.nodata == -9999
    valid = scene.read_valid("lidar")
    assert not valid[:2, :2].any() or named in ("bilinear", "cubic")  # these reach over the edge by part of a pixel
    assert not valid[0, 0] and not valid[9, 0] and not valid[:, 11].any() and valid[5:8, 2:11].all()
    inner = scene.read("lidar")[valid]
    assert inner.min() > 5 and inner.max() < 15  # no -9999 bled in
    expected = np.zeros((10, 12))
    expected[4:6, 4:6] = 3
    np.testing.assert_array_equal(scene.read_labels(), expected)
    source = {"file": "dsm.tif", "shape": [20, 22], "affine_transform": list(FINE)}
    recorded = scene.resampled["modality lidar"]
    assert {**recorded, **source, "method": named} == recorded and "32617" in recorded["crs_wkt"]
    assert scene.resampled["labels labels"]["method"] == "nearest" and "modality hsi" not in scene.resampled
    assert scene_summary(scene)["resampled"] == scene.resampled
    assert any(line.endswith(f", {named} from 20 x 22 pixels") for line in report.lines)


def test_a_mask_may_lie_on_any_grid(files: Path) -> None:
    mask = np.ones((10, 12), bool)
    mask[5, 5] = False
    np.save(files / "mask.npy", mask)  # on the grid of the scene, by its size
    tiff(files / "far.tif", np.kron(mask, np.ones((4, 4)))[..., None].astype("uint8"), (0.5, 0, 5e5, 0, -0.5, 4.1e6))
    without = run(files, resample="nearest") and open_scene(files / "o.zarr").read_valid("lidar")
    for spec, recorded in ((f"{files}/mask.npy", None), (f"{files}/far.tif", [40, 48])):
        run(files, resample="nearest", valid={"lidar": spec})
        scene = open_scene(files / "o.zarr")
        np.testing.assert_array_equal(scene.read_valid("lidar"), without & mask)
        assert scene.resampled.get("valid lidar", {}).get("shape") == recorded


def test_without_it_the_error_shows_both_grids(files: Path) -> None:
    message = r"lidar .*dsm\.tif: 20 x 22 .* grid of hsi .*hsi\.tif: 10 x 12 pixels.*; give --resample to align it"
    with pytest.raises(InputDataError, match=message):
        run(files)
    with pytest.raises(InputDataError, match=r"labels 'labels' .*gt\.tif.*--resample"):
        run(files, modalities=[("hsi", f"{files}/hsi.tif")], labels=[("labels", f"{files}/gt.tif")])
    assert not (files / "o.zarr").exists()


def test_another_crs(files: Path) -> None:
    corner = project(
        rasterio.CRS.from_wkt(UTM17), rasterio.CRS.from_wkt(UTM18), np.array([500000.0]), np.array([4100000.0])
    )
    values = np.full((60, 60, 1), 7, "uint8")
    tiff(files / "far.tif", values, (1, 0, float(corner[0][0]) - 20, 0, -1, float(corner[1][0]) + 20), "EPSG:32618")
    run(files, modalities=[("hsi", f"{files}/hsi.tif"), ("lidar", f"{files}/far.tif")], resample="nearest")
    scene = open_scene(files / "o.zarr")
    assert (scene.read("lidar") == 7).all() and scene.read_valid("lidar").all()
    assert scene.modalities["lidar"].dtype == "uint16"


def test_rasters_on_the_grid_are_left_alone(files: Path) -> None:
    run(files, modalities=[("hsi", f"{files}/hsi.tif"), ("again", f"{files}/hsi.tif")], resample="cubic")
    scene = open_scene(files / "o.zarr")
    assert scene.resampled == {} and scene.modalities["again"].dtype == "uint16"
    np.testing.assert_array_equal(scene.read("again"), scene.read("hsi"))


def test_a_file_without_a_place_cannot_be_resampled(files: Path) -> None:
    np.save(files / "plain.npy", np.ones((20, 24)))
    with pytest.raises(InputDataError, match=r"plain\.npy.*cannot be resampled .*: lidar has no transform"):
        run(files, modalities=[("hsi", f"{files}/hsi.tif"), ("lidar", f"{files}/plain.npy")], resample="auto")
    with pytest.raises(InputDataError, match=r"dsm\.tif.*cannot be resampled .*: hsi has no transform"):
        run(files, modalities=[("hsi", f"{files}/plain.npy"), ("lidar", f"{files}/dsm.tif")], resample="auto")
    assert not (files / "o.zarr").exists()


def test_a_method_that_does_not_exist(files: Path) -> None:
    with pytest.raises(UsageError, match=r"'bilinar' is no way to resample \(did you mean 'bilinear'\?\): .*cubic"):
        run(files, resample="bilinar")


def test_blocks_of_the_writer_see_the_same_raster(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiffclip.scene import layout

    read: Callable[[], np.ndarray] = lambda: open_scene(files / "o.zarr").read("lidar")  # noqa: E731
    run(files, resample="bilinear")
    at_once = read()
    monkeypatch.setattr(layout, "_CHUNK_BYTES", 64)
    monkeypatch.setattr(layout, "_BLOCK_BYTES", 64)
    run(files, resample="bilinear")
    assert open_scene(files / "o.zarr").chunk_rows("lidar") < 10
    np.testing.assert_allclose(read(), at_once, rtol=1e-6)
