"""Which pixels are predicted: boxes in map units and pixels, masks, and the grid of the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastdiffclip.errors import InputDataError, UsageError
from fastdiffclip.infer.interest import Interest, box_of, cropped_transform, interest_of, masked, only_pixel
from fastdiffclip.infer.tiles import Rect
from fastdiffclip.scene.store import Scene, open_scene
from fastdiffclip.scene.writer import SceneWriter

UPRIGHT = (2.0, 0.0, 500000.0, 0.0, -2.0, 5200000.0)  # of the small scene, 24 x 30 pixels


def test_a_box_takes_the_pixels_whose_centres_lie_in_it(small_scene: Scene) -> None:
    assert box_of("500000,5199952,500060,5200000", small_scene) == Rect(0, 24, 0, 30)
    assert box_of("500004,5199990,500010,5199998", small_scene) == Rect(1, 5, 2, 5)
    assert box_of("500004.9,5199990,500009.1,5199996.9", small_scene) == Rect(2, 5, 2, 5)
    assert box_of(" 500005.1 , 5199990 , 500009 , 5199998", small_scene) == Rect(1, 5, 3, 5)
    assert box_of("0,0,500001.5,9e9", small_scene) == Rect(0, 24, 0, 1)


@given(left=st.integers(0, 28), top=st.integers(0, 22), data=st.data())
def test_the_corners_of_pixels_give_these_pixels(left: int, top: int, data: st.DataObject) -> None:
    right, bottom = data.draw(st.integers(left + 1, 30)), data.draw(st.integers(top + 1, 24))
    a, _, c, _, e, f = UPRIGHT
    text = f"{a * left + c},{e * bottom + f},{a * right + c},{e * top + f}"
    wanted = Rect(top, bottom, left, right)
    scene: Any = type("Grid", (), {"height": 24, "width": 30, "affine_transform": UPRIGHT})
    assert box_of(text, scene) == wanted == box_of(f"pixels:{left},{top},{right},{bottom}", scene)
    a, b, c, d, e, f = cropped_transform(UPRIGHT, wanted) or ()
    assert (c, f) == (500000 + 2 * left, 5200000 - 2 * top) and (a, b, d, e) == (2, 0, 0, -2)


def test_a_rotated_grid_gives_the_rectangle_around_the_box() -> None:
    turned = (0.0, -2.0, 100.0, 2.0, 0.0, 200.0)  # x falls with the row, y grows with the column
    scene: Any = type("Grid", (), {"height": 10, "width": 10, "affine_transform": turned})
    assert box_of("90,202,96,210", scene) == Rect(2, 5, 1, 5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1,2,3", "XMIN,YMIN,XMAX,YMAX"),
        ("a,b,c,d", "XMIN,YMIN,XMAX,YMAX"),
        ("nan,0,1,1", "empty"),
        ("5,0,5,1", "empty"),
        ("0,9,1,3", "empty"),
        ("0,0,1,1", "no pixel of the scene, which covers 500000,5199952,500060,5200000"),
        ("pixels:40,0,50,9", "no pixel of the scene, which covers pixels:0,0,30,24"),
        ("500000.1,5199998.1,500000.9,5199998.9", "no pixel"),
    ],
)
def test_what_is_no_box(small_scene: Scene, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        box_of(text, small_scene)


def test_without_a_transform_only_pixels_name_a_box(tmp_path: Path) -> None:
    with SceneWriter(tmp_path / "s.zarr", height=3, width=4) as writer:
        writer.add_modality("hsi", np.ones((3, 4, 2), np.float32), bands=2, dtype="float32")
    scene = open_scene(tmp_path / "s.zarr")
    with pytest.raises(UsageError, match="pixels:0,0,4,3"):
        box_of("0,0,1,1", scene)
    assert interest_of(scene, "pixels:1,0,9,2").area == Rect(0, 2, 1, 4)


@given(
    mask=hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=21)), top=st.integers(0, 9),
    left=st.integers(0, 9), data=st.data(),
)  # fmt: skip
def test_masks_by_definition(mask: np.ndarray, top: int, left: int, data: st.DataObject) -> None:
    height, width = mask.shape
    area = Rect(min(top, height - 1), height, min(left, width - 1), width)
    inside = np.zeros_like(mask)
    inside[area.slices] = mask[area.slices]
    if not inside.any():
        with pytest.raises(InputDataError, match="marks no pixel"):
            masked(Interest(area), lambda rows: mask[rows], "m.tif")
        return
    found = masked(Interest(area), lambda rows: mask[rows], "m.tif")
    assert found.pixels == inside.sum()
    rect = Rect(*sorted(data.draw(st.tuples(*2 * [st.integers(0, height)]))),
                *sorted(data.draw(st.tuples(*2 * [st.integers(0, width)]))))  # fmt: skip
    np.testing.assert_array_equal(found.wanted(rect), inside[rect.slices])
    whole = Interest(area)
    assert whole.pixels == area.pixels and whole.digest() != found.digest()


def test_a_mask_on_top_of_one_pixel() -> None:
    alone = only_pixel(Interest(Rect(1, 4, 1, 10)), 2, 9)
    assert alone.pixels == 1 and alone.wanted(Rect(2, 3, 9, 10)).all()
    with pytest.raises(InputDataError, match="no pixel"):
        masked(alone, lambda rows: np.arange(10) < np.full((rows.stop - rows.start, 1), 9), "m")


def test_masks_from_files(small_scene: Scene, tmp_path: Path) -> None:
    values = np.zeros((24, 30), np.float32)
    values[3:6, 4:9], values[4, 5], values[5, 6] = 7, np.nan, -1
    grid = {"crs": small_scene.crs_wkt, "transform": Affine(*UPRIGHT)}

    def put(name: str, **more: Any) -> Path:
        profile = {"driver": "GTiff", "height": 24, "width": 30, "count": 1, "dtype": "float32"} | grid | more
        with rasterio.open(tmp_path / name, "w", **profile) as raster:
            raster.write(np.broadcast_to(values[: profile["height"]], (profile["count"], profile["height"], 30)))
        return tmp_path / name

    assert interest_of(small_scene, mask=put("a.tif")).pixels == 14
    assert interest_of(small_scene, mask=put("b.tif", nodata=-1)).pixels == 13
    assert interest_of(small_scene, "pixels:0,0,6,99", put("c.tif")).pixels == 5
    for path, said in (
        (put("d.tif", count=2), "has 2 bands"),
        (put("e.tif", height=20), "does not lie on the grid of"),
        (put("f.tif", transform=Affine(2, 0, 500001, 0, -2, 5200000)), "does not lie on the grid of"),
        (tmp_path / "none.tif", "there is no file"),
    ):
        with pytest.raises(InputDataError, match=said):
            interest_of(small_scene, mask=path)


def test_polygons_and_regions_are_masks_too(small_scene: Scene, tmp_path: Path) -> None:
    square = [[500004, 5199998], [500010, 5199998], [500010, 5199990], [500004, 5199990], [500004, 5199998]]
    feature = {"type": "Feature", "properties": {"keep": 1}, "geometry": {"type": "Polygon", "coordinates": [square]}}
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32632"}}
    collection = {"type": "FeatureCollection", "crs": crs, "features": [feature]}
    (tmp_path / "plots.geojson").write_text(json.dumps(collection))
    found = interest_of(small_scene, mask=f"{tmp_path / 'plots.geojson'}:keep")
    assert found.pixels == 12 and found.wanted(Rect(1, 5, 2, 5)).all()
    inside = interest_of(small_scene, "pixels:3,0,9,9", f"{tmp_path / 'plots.geojson'}:keep")
    assert inside.pixels == 8 and inside.area == Rect(0, 9, 3, 9)
