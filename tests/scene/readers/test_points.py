"""Point clouds as rasters: what a cell holds, what does not count, and files that lie."""

from __future__ import annotations

import importlib.util
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.scene.georeference import Grid, project, to_map
from fastdiffclip.scene.ingest import IngestReport, IngestRequest, ingest
from fastdiffclip.scene.readers import points as readers_points
from fastdiffclip.scene.readers.points import open_points
from fastdiffclip.scene.store import open_scene

laspy = pytest.importorskip("laspy", reason="laspy is not installed: pip install 'fastdiffclip[lidar]'")

UTM = rasterio.CRS.from_epsg(32617)
TRANSFORM = (2.0, 0.0, 500000.0, 0.0, -2.0, 4100000.0)
GRID = Grid("hsi", Path("hsi.npy"), 4, 5, UTM.to_wkt(), TRANSFORM)
Point = tuple[float, float, float, int, int]  # column, row, z, intensity, number of the return


def write(path: Path, points: list[Point], crs: str | None = "wkt", classes: list[int] | None = None) -> Path:
    """Write points, given in pixels of the grid; ``crs`` is wkt, keys (GeoTIFF keys) or None."""
    header = laspy.LasHeader(point_format=6 if crs == "wkt" else 3, version="1.4" if crs == "wkt" else "1.2")
    header.scales, header.offsets = [0.001] * 3, [TRANSFORM[2], TRANSFORM[5], 0]
    if crs == "wkt":
        header.vlrs.append(laspy.vlrs.known.WktCoordinateSystemVlr(UTM.to_wkt()))
        header.global_encoding.wkt = True
    if crs == "keys":
        keys = struct.pack("<12H", 1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32617)
        header.vlrs.append(laspy.VLR("LASF_Projection", 34735, "", keys))
    data = laspy.LasData(header)
    table = np.array(points, float).reshape(-1, 5)
    data.x, data.y = to_map(TRANSFORM, table[:, 0], table[:, 1])
    data.z, data.intensity = table[:, 2], table[:, 3].astype(np.uint16)
    data.return_number, data.number_of_returns = table[:, 4].astype(np.uint8), np.full(len(table), 4)
    data.classification = np.array(classes if classes is not None else [1] * len(table), np.uint8)
    data.write(str(path))
    return path


def values(path: Path, variable: str | None = None, grid: Grid = GRID) -> np.ndarray:
    source = open_points(path, variable, grid)
    assert source.dtype == np.float32 and source.nodata is not None and math.isnan(source.nodata)
    return source.read_rows(slice(0, grid.height))


@pytest.mark.parametrize("suffix", [".las", ".laz"])
@pytest.mark.parametrize("crs", ["wkt", "keys"])
def test_highest_return_and_mean_of_the_first_ones(tmp_path: Path, suffix: str, crs: str) -> None:
    path = write(tmp_path / f"x{suffix}", [
        (0.5, 0.5, 3, 100, 1), (0.1, 0.9, 7, 900, 2), (0.9, 0.2, 5, 300, 1),  # one cell
        (4.99, 3.99, -2, 50, 1), (2.5, 1.5, 8, 40, 2),  # the last cell; a cell without a first return
        (5.5, 1, 99, 9, 1), (-0.5, 1, 99, 9, 1), (1, 4.5, 99, 9, 1),  # outside
    ], crs)  # fmt: skip
    found = values(path)
    height, intensity = found[..., 0], found[..., 1]
    assert height[0, 0] == 7 and intensity[0, 0] == 200
    assert height[3, 4] == -2 and intensity[3, 4] == 50
    assert height[1, 2] == 8 and np.isnan(intensity[1, 2])
    assert np.isnan(height).sum() == 20 - 3
    np.testing.assert_array_equal(values(path, "height"), found[..., :1])
    np.testing.assert_array_equal(values(path, "intensity"), found[..., 1:])
    assert open_points(path, None, GRID).warnings == ()


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(-1, 6).map(lambda v: round(v, 2)), st.floats(-1, 5).map(lambda v: round(v, 2)),
            st.integers(-50, 50).map(float), st.integers(0, 65535), st.integers(1, 3),
        ),
        min_size=1, max_size=60,
    ),
    st.integers(1, 20),
)  # fmt: skip
def test_chunks_make_no_difference(tmp_path_factory: pytest.TempPathFactory, points: list[Point], at_once: int) -> None:
    points = [(x + 0.003, y + 0.003, z, i, n) for x, y, z, i, n in points]  # off the edges of cells
    path = write(tmp_path_factory.mktemp("las") / "x.las", [*points, (2.5, 2.5, 0.0, 7, 1)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers_points, "_POINTS_AT_ONCE", at_once)
        found = values(path)
    cells: dict[tuple[int, int], list[Point]] = {}
    for point in [*points, (2.5, 2.5, 0.0, 7, 1)]:
        cells.setdefault((math.floor(point[1]), math.floor(point[0])), []).append(point)
    for row in range(4):
        for column in range(5):
            here = cells.get((row, column), [])
            first = [point[3] for point in here if point[4] == 1]
            expected = [max((p[2] for p in here), default=np.nan), np.mean(first) if first else np.nan]
            np.testing.assert_allclose(found[row, column], expected, rtol=1e-6)


def test_noise_and_withheld_points_do_not_count(tmp_path: Path) -> None:
    points: list[Point] = [(0.5, 0.5, 1, 10, 1), (0.5, 0.5, 500, 999, 1), (0.5, 0.5, 600, 999, 1), (0.5, 0.5, 2, 30, 1)]
    path = write(tmp_path / "x.las", points, classes=[2, 7, 18, 5])
    np.testing.assert_array_equal(values(path)[0, 0], [2, 20])
    with laspy.open(path) as reader:
        data = reader.read()
    data.withheld = np.array([0, 0, 0, 1])
    data.write(str(path))
    np.testing.assert_array_equal(values(path)[0, 0], [1, 10])


def test_another_crs_and_a_turned_grid(tmp_path: Path) -> None:
    path = write(tmp_path / "x.las", [(x + 0.5, y + 0.5, 10 * y + x, 5, 1) for x in range(5) for y in range(4)])
    turned = (0.0, 2.0, TRANSFORM[2], -2.0, 0.0, TRANSFORM[5])  # rows go east, columns go south
    grid = Grid("hsi", Path("h"), 5, 4, UTM.to_wkt(), turned)
    np.testing.assert_array_equal(values(path, "height", grid)[..., 0], values(path, "height")[..., 0].T)
    other = rasterio.CRS.from_epsg(32618)
    corner = project(UTM, other, np.array([TRANSFORM[2]]), np.array([TRANSFORM[5]]))
    across = project(UTM, other, np.array([TRANSFORM[2] + 2.0]), np.array([TRANSFORM[5]]))
    a, d = float(across[0][0] - corner[0][0]), float(across[1][0] - corner[1][0])
    far = Grid("hsi", Path("h"), 4, 5, other.to_wkt(), (a, d, float(corner[0][0]), d, -a, float(corner[1][0])))
    np.testing.assert_array_equal(values(path, "height", far), values(path, "height"))


def test_a_file_without_crs_takes_that_of_the_scene(tmp_path: Path) -> None:
    path = write(tmp_path / "x.las", [(0.5, 0.5, 3, 1, 1)], crs=None)
    assert "has no CRS, that of the scene is taken" in open_points(path, None, GRID).warnings[0]
    with_crs = write(tmp_path / "y.las", [(0.5, 0.5, 3, 1, 1)])
    with pytest.raises(InputDataError, match=r"y\.las has a CRS and hsi .* has none"):
        open_points(with_crs, None, Grid("hsi", Path("h"), 4, 5, None, TRANSFORM))
    with pytest.raises(InputDataError, match="it has no transform, georeference it first"):
        open_points(path, None, Grid("hsi", Path("h"), 4, 5))


def test_points_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path / "x.las", [(900, 900, 3, 1, 1)])
    with pytest.raises(InputDataError, match=r"none of the 1 points of .*x\.las \(501800 to 501800, .* lies on hsi"):
        open_points(path, None, GRID)


def test_another_variable(tmp_path: Path) -> None:
    path = write(tmp_path / "x.las", [(0.5, 0.5, 3, 1, 1)])
    with pytest.raises(UsageError, match=r"no variable 'heigt' \(did you mean 'height'\?\): give height or intensity"):
        open_points(path, "heigt", GRID)


@pytest.mark.parametrize("suffix", [".las", ".laz"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.95])
def test_truncated_files(tmp_path: Path, suffix: str, share: float) -> None:
    path = write(tmp_path / f"x{suffix}", [(0.5, 0.5, i, i, 1) for i in range(3000)])
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputDataError, match=rf"x\{suffix}"):
        open_points(path, None, GRID)


@pytest.mark.parametrize(("at", "data", "message"), [
    (0, b"LAZF", "begins with LASF"),
    (94, b"\xff\xff", "header that does not fit its size"),
    (96, b"\xff\xff\xff\xff", "header that does not fit its size"),
    (100, b"\xff\xff\xff\xff", "header that does not fit its size"),
    (104, b"\xff", r"x\.las"),
    (247, b"\xff" * 8, r"x\.las"),
])  # fmt: skip
def test_headers_that_lie(tmp_path: Path, at: int, data: bytes, message: str) -> None:
    path = write(tmp_path / "x.las", [(0.5, 0.5, 3, 1, 1)])
    whole = bytearray(path.read_bytes())
    whole[at : at + len(data)] = data
    path.write_bytes(whole)
    with pytest.raises(InputDataError, match=message):
        open_points(path, None, GRID)


def test_without_the_library_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    las, laz = (write(tmp_path / name, [(0.5, 0.5, 3, 1, 1)]) for name in ("x.las", "x.laz"))
    found = importlib.util.find_spec
    for missing, path in (("laspy", las), ("lazrs", laz)):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, missing=missing: None if name == missing else found(name)
        )
        with pytest.raises(UsageError, match=rf"needs {missing}, which is not installed: pip install 'fast"):
            open_points(path, None, GRID)


def run(tmp_path: Path, cloud: str, **options: Any) -> IngestReport:
    with rasterio.open(
        tmp_path / "hsi.tif", "w", driver="GTiff", height=4, width=5, count=2, dtype="uint16", crs=UTM,
        transform=Affine(*TRANSFORM),
    ) as dataset:  # fmt: skip
        dataset.write(np.random.default_rng(0).integers(1, 99, (2, 4, 5)).astype("uint16"))
    modalities = options.pop("modalities", [("hsi", f"{tmp_path}/hsi.tif"), ("lidar", cloud)])
    return ingest(IngestRequest(modalities, tmp_path / "o.zarr", **options))


def test_a_cloud_becomes_a_modality(tmp_path: Path) -> None:
    path = write(tmp_path / "cloud.laz", [(x + 0.5, y + 0.5, 10 * y + x, 5 + x, 1) for x in range(4) for y in range(4)])
    np.save(tmp_path / "mask.npy", np.arange(20).reshape(4, 5) > 0)
    run(tmp_path, f"{path}:height", valid={"lidar": f"{tmp_path}/mask.npy"})
    scene = open_scene(tmp_path / "o.zarr")
    lidar = scene.modalities["lidar"]
    assert (lidar.bands, lidar.dtype, lidar.nodata) == (1, "float32", pytest.approx(np.nan, nan_ok=True))
    assert np.isnan(scene.read("lidar")[:, 4]).all() and scene.read("lidar")[3, 2, 0] == 32
    np.testing.assert_array_equal(np.argwhere(~scene.read_valid("lidar")), [[0, 0], [0, 4], [1, 4], [2, 4], [3, 4]])
    assert ("modality lidar", "cloud.laz") in {(role, name) for role, name, _ in scene.sources}


def test_a_cloud_alone_has_no_grid(tmp_path: Path) -> None:
    path = write(tmp_path / "cloud.las", [(0.5, 0.5, 3, 1, 1)])
    with pytest.raises(UsageError, match="a point cloud has no grid of its own: give a raster as well"):
        run(tmp_path, "", modalities=[("lidar", str(path))])


def test_a_broken_cloud_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "cloud.las", [(0.5, 0.5, i, 1, 1) for i in range(100)])
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputDataError, match=r"cloud\.las declares 100 points and holds \d+"):
        run(tmp_path, str(path))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cloud.las", "hsi.tif"]
