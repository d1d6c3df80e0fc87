"""Maps as files: what GDAL reads back, what stands in the way, what is left after a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rasterio.crs import CRS
from rasterio.enums import ColorInterp

from fastdiffclip.errors import InputDataError, ResourceError, UsageError
from fastdiffclip.infer import raster
from fastdiffclip.infer.cog import commonest_of_four, nearest_of_four
from fastdiffclip.infer.raster import (
    class_areas,
    class_colours,
    read_class_map,
    write_class_map,
    write_probabilities,
)
from fastdiffclip.infer.rawfile import Layer, RawFile
from fastdiffclip.infer.tiles import Rect
from fastdiffclip.scene.store import ClassInfo

UTM = CRS.from_epsg(32617).to_wkt()
GRID = (0.5, 0.0, 400000.0, 0.0, -0.5, 3285000.0)
CLASSES = [
    ClassInfo(1, "trees & <shrubs>", colour=(10, 120, 30)),
    ClassInfo(2, "Straße"),
    ClassInfo(5, "water", colour=(20, 40, 200)),
]


def random_map(height: int = 300, width: int = 270, dtype: str = "uint16", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([0, 1, 2, 5], dtype), (height, width))


def test_grid_colours_and_nodata(tmp_path: Path) -> None:
    class_map = random_map()
    path = write_class_map(
        tmp_path / "deep" / "map.tif",
        class_map,
        classes=CLASSES,
        crs_wkt=UTM,
        affine_transform=GRID,
        tags={"shots": "5"},
    )
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(file.read(1), class_map)
        assert file.dtypes == ("uint8",) and file.nodata == 0
        assert file.crs == CRS.from_epsg(32617) and tuple(file.transform)[:6] == GRID
        assert file.profile["tiled"] and file.compression.name == "deflate"
        assert file.colorinterp == (ColorInterp.palette,)
        assert file.colormap(1)[1] == (10, 120, 30, 255) and file.colormap(1)[0][3] == 0
        assert file.tags()["shots"] == "5" and file.tags(1)["class_2"] == "Straße"
    assert sorted(p.name for p in path.parent.iterdir()) == ["map.tif", "map.tif.aux.xml"]


def test_gdal_sees_the_category_names(tmp_path: Path) -> None:
    path = write_class_map(tmp_path / "map.tif", random_map(), classes=CLASSES, crs_wkt=UTM, affine_transform=GRID)
    rasterio.shutil.copy(path, tmp_path / "map.vrt", driver="VRT")
    categories = (tmp_path / "map.vrt").read_text(encoding="utf-8").partition("<CategoryNames>")[2]
    names = [line.strip() for line in categories.partition("</CategoryNames>")[0].splitlines() if line.strip()]
    expected = ["no data", "trees &amp; &lt;shrubs&gt;", "Straße", "", "", "water"]
    assert names == [f"<Category>{name}</Category>" for name in expected]


@given(class_map=hnp.arrays(st.sampled_from(["uint8", "uint16"]), hnp.array_shapes(min_dims=2, max_dims=2,
max_side=9),
                            elements=st.sampled_from([0, 1, 2, 5])))  # fmt: skip
def test_plain_rasters_of_any_shape_come_back(tmp_path_factory: pytest.TempPathFactory, class_map: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("map") / "map.tif"
    back = read_class_map(write_class_map(path, class_map, classes=CLASSES))
    np.testing.assert_array_equal(back.values, class_map)
    assert back.values.dtype == np.uint16
    assert back.crs_wkt is None and back.affine_transform is None
    assert back.names == {item.value: item.name for item in CLASSES}


def test_class_values_above_255_keep_their_colours(tmp_path: Path) -> None:
    classes = [ClassInfo(300, "moor", colour=(1, 2, 3))]
    values = np.full((4, 4), 300, np.uint16)
    path = write_class_map(tmp_path / "map.tif", values, classes=classes, affine_transform=GRID)
    with rasterio.open(path) as file:
        assert file.dtypes == ("uint16",) and file.colormap(1)[300] == (1, 2, 3, 255)


def test_an_older_map_is_replaced_with_its_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "map.tif"
    write_class_map(path, random_map(), classes=CLASSES)
    write_class_map(path, np.full((3, 3), 7, np.uint8), classes=[ClassInfo(7, "ice")])
    assert read_class_map(path).names == {7: "ice"}
    sidecar = (tmp_path / "map.tif.aux.xml").read_text(encoding="utf-8")
    assert "ice" in sidecar and "water" not in sidecar
    write_probabilities(path, np.ones((1, 3, 3)), height=3, width=3, classes=[ClassInfo(7, "ice")])
    assert os.listdir(tmp_path) == ["map.tif"]


@pytest.mark.parametrize("step", [1, 37, 256, 700])
def test_probabilities_in_blocks(tmp_path: Path, step: int) -> None:
    values = np.random.default_rng(0).random((3, 700, 260), dtype=np.float32)
    values[:, 5] = np.nan
    blocks = (values[:, top : top + step] for top in range(0, 700, step))
    path = write_probabilities(
        tmp_path / "p.tif", blocks, height=700, width=260, classes=CLASSES, crs_wkt=UTM, affine_transform=GRID
    )
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(file.read(), values)
        assert np.isnan(file.nodata) and file.dtypes == ("float32",) * 3
        assert file.descriptions == ("trees & <shrubs>", "Straße", "water")
        assert file.tags(3)["class_value"] == "5"
    assert os.listdir(tmp_path) == ["p.tif"]


def raw_probabilities(folder: Path, height: int = 700, width: int = 600) -> RawFile:
    """Three bands, the first rows nodata."""
    values = np.random.default_rng(0).random((3, height, width), dtype=np.float32)
    values[:, :5] = np.nan
    raw = RawFile(folder, Layer("probabilities", 3, "float32"), height, width)
    for rect in raw.rects():
        raw.write(rect, values[:, rect.top : rect.bottom, rect.left : rect.right])
    return raw


@pytest.mark.parametrize("driver", ["COG", "GTiff"])
def test_a_raw_file_becomes_a_tiled_geotiff_with_overviews(
    tmp_path: Path, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if driver == "GTiff":  # as if GDAL had no such driver
        with rasterio.Env() as env:
            drivers = {name: text for name, text in env.drivers().items() if name != "COG"}
        monkeypatch.setattr(rasterio.Env, "drivers", lambda self: drivers)
    (tmp_path / "raw").mkdir()
    class_map = random_map(700, 600, "uint8")
    class_map[:520, :520] = 1
    whole = Rect(0, 700, 0, 600)
    with raw_probabilities(tmp_path / "raw") as raw:
        likely = write_probabilities(
            tmp_path / "p.tif", raw, height=700, width=600, classes=CLASSES, crs_wkt=UTM, affine_transform=GRID
        )
        expected = raw.read(whole)
    with RawFile(tmp_path / "raw", Layer("classes", 1, "uint8"), 700, 600) as raw:
        raw.write(whole, class_map[None])
        path = write_class_map(tmp_path / "map.tif", raw, classes=CLASSES, crs_wkt=UTM, affine_transform=GRID)
    for file, values in ((path, class_map[None]), (likely, expected)):
        with rasterio.open(file) as found:
            np.testing.assert_array_equal(found.read(), values)
            assert found.profile["tiled"] and found.overviews(1)[0] == 2
            assert found.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert found.crs == CRS.from_epsg(32617) and tuple(found.transform)[:6] == GRID
    with rasterio.open(path) as found:
        small = found.read(1, out_shape=(350, 300))
        assert set(np.unique(small)) <= {0, 1, 2, 5} and (small[:250, :250] == 1).all()
        assert found.colormap(1)[5] == (20, 40, 200, 255)
    assert sorted(os.listdir(tmp_path)) == ["map.tif", "map.tif.aux.xml", "p.tif", "raw"]
    assert sorted(os.listdir(tmp_path / "raw")) == ["classes.raw", "probabilities.raw"]


def test_overviews_hold_the_commonest_class_and_the_nearest_value() -> None:
    values = np.array([[3, 3, 1, 2, 0], [2, 2, 3, 4, 0], [0, 0, 0, 0, 5], [0, 7, 0, 0, 5], [9, 0, 6, 6, 0]], np.uint8)
    assert commonest_of_four(values[None]).tolist() == [[[2, 1, 0], [7, 0, 5], [9, 6, 0]]]
    wide = values.astype(np.uint16) * 300
    assert (commonest_of_four(wide[None])[0] == 300 * commonest_of_four(values[None])[0].astype(np.uint16)).all()
    assert nearest_of_four(values[None]).tolist() == [[[3, 1, 0], [0, 0, 5], [9, 6, 0]]]


@given(values=hnp.arrays("uint8", hnp.array_shapes(min_dims=3, max_dims=3, max_side=7), elements=st.integers(0, 3)))
def test_the_commonest_of_four_by_definition(values: np.ndarray) -> None:
    found = commonest_of_four(values)
    assert found.shape == (len(values), -(-values.shape[1] // 2), -(-values.shape[2] // 2))
    for band, row, col in np.ndindex(found.shape):
        block = values[band, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
        assert found[band, row, col] == (np.bincount(block[block > 0], minlength=1).argmax() if block.any() else 0)


FULL_AT_THE_END = """
import resource, sys
from pathlib import Path
from fastdiffclip.errors import ResourceError
from fastdiffclip.infer.raster import write_probabilities
from fastdiffclip.infer.rawfile import Layer, RawFile
from fastdiffclip.scene.store import ClassInfo
import rasterio.shutil
folder = Path(sys.argv[1])
with RawFile(folder / "raw", Layer("probabilities", 3, "float32"), 700, 600) as raw:
    for limit in (10_000, 300_000, 2_000_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            write_probabilities(folder / "p.tif", raw, height=700, width=600, classes=[ClassInfo(k, str(k)) for k in
            (1, 2, 3)])
        except ResourceError as error:
            print("refused:", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_disk_that_is_full_while_gdal_writes(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    raw_probabilities(tmp_path / "raw").close()
    run = subprocess.run(
        [sys.executable, "-c", FULL_AT_THE_END, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert run.stdout.count("refused: cannot write") == 3, run.stdout + run.stderr
    assert os.listdir(tmp_path) == ["raw"] and os.listdir(tmp_path / "raw") == ["probabilities.raw"]


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 6, 5), (2, 5, 5), (3, 5, 4)])
def test_probabilities_of_another_shape_leave_nothing(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="probabilities"):
        write_probabilities(tmp_path / "p.tif", np.zeros(shape), height=5, width=5, classes=CLASSES)
    assert os.listdir(tmp_path) == []


def test_an_interrupted_write_keeps_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "p.tif"
    arguments = {"height": 4, "width": 4, "classes": CLASSES[:1], "affine_transform": GRID}
    write_probabilities(path, np.full((1, 4, 4), 0.25), **arguments)

    def blocks():
        yield np.zeros((1, 2, 4))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_probabilities(path, blocks(), **arguments)
    assert os.listdir(tmp_path) == ["p.tif"]
    with rasterio.open(path) as file:
        assert (file.read() == 0.25).all()


FULL_DISK = """
import resource, sys
import numpy as np
from fastdiffclip.errors import ResourceError
from fastdiffclip.infer.raster import write_class_map, write_probabilities
from fastdiffclip.scene.store import ClassInfo
noise = np.random.default_rng(0)
calls = [
    lambda: write_class_map(sys.argv[1] + "/m.tif", noise.integers(1, 3, (200, 200)).astype(np.uint8),
    classes=classes), lambda: write_probabilities(sys.argv[1] + "/p.tif", noise.random((2, 80, 80)),
    height=80, width=80, classes=classes),
]
classes = [ClassInfo(1, "a"), ClassInfo(2, "b")]
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
for call in calls:
    try:
        call()
    except ResourceError as error:
        print("refused:", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.count("refused: cannot write") == 2, run.stdout + run.stderr
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot write"):
        write_class_map(tmp_path / "file" / "map.tif", random_map(4, 4), classes=CLASSES)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputDataError, match=r"\[5\]"):
        write_class_map(tmp_path / "m.tif", random_map(), classes=CLASSES[:2])
    with pytest.raises(UsageError, match="int64"):
        write_class_map(tmp_path / "m.tif", random_map(dtype="int64"), classes=CLASSES)
    with pytest.raises(InputDataError, match="CRS"):
        write_class_map(tmp_path / "m.tif", random_map(), classes=CLASSES, crs_wkt="nonsense")
    assert os.listdir(tmp_path) == []
    with pytest.raises(InputDataError, match="no class map"):
        read_class_map(tmp_path / "m.tif")
    (tmp_path / "m.tif").write_bytes(b"II*\0 this is not one")
    with pytest.raises(InputDataError, match="cannot be read"):
        read_class_map(tmp_path / "m.tif")


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_reading_maps_of_others(tmp_path: Path) -> None:
    path = tmp_path / "other.tif"

    def put(values: np.ndarray, **profile: object) -> None:
        bands = values if values.ndim == 3 else values[None]
        shape = {"count": bands.shape[0], "height": bands.shape[1], "width": bands.shape[2]}
        with rasterio.open(path, "w", driver="GTiff", dtype=values.dtype, **shape, **profile) as file:
            file.write(bands)

    put(np.array([[1, 255], [3, 0]], np.uint8), nodata=255)
    assert read_class_map(path).values.tolist() == [[1, 0], [3, 0]] and read_class_map(path).nodata == 255
    put(np.array([[1, np.nan], [3, -9999]], np.float32), nodata=-9999)
    assert read_class_map(path).values.tolist() == [[1, 0], [3, 0]]
    for values, message in (
        (np.array([[0.5]], np.float32), "whole numbers"),
        (np.array([[-1]], np.int16), "whole numbers"),
        (np.zeros((2, 1, 1), np.uint8), "2 bands"),
    ):
        put(values)
        with pytest.raises(InputDataError, match=message):
            read_class_map(path)


def test_areas() -> None:
    class_map = np.array([[1, 1, 2, 0]], np.uint8)
    rows = class_areas(class_map, CLASSES, crs_wkt=UTM, affine_transform=(100.0, 0, 0, 0, -50.0, 0))
    assert [row["pixels"] for row in rows] == [2, 1, 0]
    assert [row["hectares"] for row in rows] == pytest.approx([1.0, 0.5, 0.0])
    assert [row["share"] for row in rows] == pytest.approx([200 / 3, 100 / 3, 0.0])
    feet = class_areas(
        class_map, CLASSES, crs_wkt=CRS.from_epsg(2263).to_wkt(), affine_transform=(100.0, 0, 0, 0, -50.0, 0)
    )
    assert feet[0]["hectares"] == pytest.approx(0.3048006096**2, rel=1e-6)
    degrees = CRS.from_epsg(4326).to_wkt()
    for place in ({}, {"crs_wkt": degrees, "affine_transform": GRID}, {"affine_transform": GRID}):
        assert class_areas(class_map, CLASSES, **place)[0]["hectares"] is None
    assert class_areas(np.zeros((2, 2), np.uint8), CLASSES)[0]["share"] == 0.0


def test_colours_chosen_are_distinct() -> None:
    classes = [ClassInfo(value, str(value)) for value in range(1, 61)]
    colours = class_colours(classes)
    assert len(set(colours.values())) == 60 and set(colours) == set(range(1, 61))
    assert class_colours(CLASSES)[1] == (10, 120, 30)
    assert len(raster.PALETTE) == 20
