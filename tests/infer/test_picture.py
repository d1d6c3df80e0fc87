"""The picture of a map: crisp pixels in the right colours, and a legend for any number of classes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rasterio.crs import CRS

from fastdiffclip.errors import InputDataError
from fastdiffclip.infer import picture
from fastdiffclip.infer.picture import EMPTY, MARGIN, _round_length, colour_map, reduce_map, write_class_png
from fastdiffclip.infer.raster import class_colours
from fastdiffclip.infer.rawfile import Layer, RawFile
from fastdiffclip.infer.tiles import Rect
from fastdiffclip.scene.store import ClassInfo

CLASSES = [ClassInfo(1, "meadow"), ClassInfo(4, "costs $5 & $6"), ClassInfo(9, "absent")]


def read_png(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return np.round(255 * imread(path)[..., :3]).astype(np.uint8)


def test_every_map_pixel_is_a_crisp_square(tmp_path: Path) -> None:
    class_map = np.random.default_rng(0).choice(np.array([0, 1, 4], np.uint8), (40, 70))
    utm = CRS.from_epsg(32617).to_wkt()
    path = write_class_png(
        tmp_path / "map.png",
        class_map,
        classes=CLASSES,
        title="A map",
        crs_wkt=utm,
        affine_transform=(2.0, 0.0, 4e5, 0.0, -2.0, 3e6),
    )
    shown = read_png(path)
    table = np.zeros((10, 3), np.uint8)
    table[0] = EMPTY
    for value, rgb in class_colours(CLASSES).items():
        table[value] = rgb
    expected = table[class_map].repeat(20, axis=0).repeat(20, axis=1)
    top = [np.array_equal(row[MARGIN : MARGIN + 1400], expected[0]) for row in shown].index(True)
    np.testing.assert_array_equal(shown[top : top + 800, MARGIN : MARGIN + 1400], expected)
    assert os.listdir(tmp_path) == ["map.png"]


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    class_map = np.ones((5, 5), np.uint16)
    first, second = (
        write_class_png(tmp_path / name, class_map, classes=CLASSES, title="t").read_bytes() for name in ("a", "b")
    )
    assert first == second


@pytest.mark.parametrize("shape", [(1, 1), (3, 400), (400, 3), (60, 50)])
@pytest.mark.parametrize("count", [1, 40])
def test_any_shape_and_number_of_classes(tmp_path: Path, shape: tuple[int, int], count: int) -> None:
    classes = [ClassInfo(value, f"class {value}") for value in range(1, count + 1)]
    class_map = np.random.default_rng(0).integers(0, count + 1, shape).astype(np.uint8)
    path = write_class_png(tmp_path / "map.png", class_map, classes=classes, title="long title " * 20)
    assert min(read_png(path).shape[:2]) > 100


@given(
    class_map=hnp.arrays("uint8", hnp.array_shapes(min_dims=2, max_dims=2, max_side=30), elements=st.integers(0, 3)),
    max_pixels=st.integers(1, 400),
)
def test_reduction_by_definition(class_map: np.ndarray, max_pixels: int) -> None:
    small = reduce_map(class_map, max_pixels)
    height, width = class_map.shape
    assert small.dtype == class_map.dtype and 1 <= small.size <= max_pixels
    down, across = factors(height, small.shape[0]), factors(width, small.shape[1])
    shared = [factor for factor in down if factor in across]
    assert shared or min(height, width) in (max(down), max(across))  # another factor only where one side is used up
    down, across = ([shared[0]], [shared[0]]) if shared else (down, across)
    assert any(small.tolist() == reduced(class_map, d, a) for d in down for a in across)


def factors(side: int, small: int) -> list[int]:
    """The factors that make ``small`` of ``side``."""
    return [factor for factor in range(1, side + 1) if side // factor == small]


def reduced(class_map: np.ndarray, down: int, across: int) -> list[list[int]]:
    height, width = class_map.shape[0] // down, class_map.shape[1] // across
    blocks = class_map[: height * down, : width * across].reshape(height, down, width, across)
    return [[int(np.bincount(blocks[y, :, x].ravel()).argmax()) for x in range(width)] for y in range(height)]


def test_reduction_keeps_within_the_limits() -> None:
    assert reduce_map(np.ones((1000, 700), np.uint8), 10_000).size <= 10_000
    assert reduce_map(np.ones((10, 7), np.uint8), 70).shape == (10, 7)
    assert reduce_map(np.ones((1, 100_000), np.uint8), 4_000_000).shape == (1, 7692)
    assert reduce_map(np.ones((9000, 3), np.uint8), 4_000_000).shape == (4500, 3)


@pytest.mark.parametrize("shape", [(300, 70), (1, 40_000), (37, 1), (5, 5)])
def test_a_raw_file_gives_the_picture_of_its_array(
    tmp_path: Path, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "ROWS_BYTES", 1000)  # a few rows at a time
    class_map = np.random.default_rng(0).choice(np.array([0, 1, 4], np.uint8), shape)
    with RawFile(tmp_path, Layer("classes", 1, "uint8"), *shape) as raw:
        raw.write(Rect(0, shape[0], 0, shape[1]), class_map[None])
        np.testing.assert_array_equal(reduce_map(raw, 900), reduce_map(class_map, 900))
        files = [
            write_class_png(tmp_path / name, found, classes=CLASSES, title="t", max_pixels=900)
            for name, found in (("a.png", class_map), ("b.png", raw))
        ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_nodata_is_transparent() -> None:
    pixels = colour_map(np.array([[0, 4]], np.uint8), CLASSES)
    assert pixels[0, 0, 3] == 0 and pixels[0, 1].tolist() == [*class_colours(CLASSES)[4], 255]


@pytest.mark.parametrize(("metres", "expected"), [(1, 1), (4.9, 2), (5, 5), (99, 50), (1234, 1000), (0.3, 0.2)])
def test_scale_bar_lengths_are_round(metres: float, expected: float) -> None:
    assert _round_length(metres) == pytest.approx(expected)


def test_a_value_without_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputDataError, match=r"\[3\]"):
        write_class_png(tmp_path / "map.png", np.full((2, 2), 3, np.uint8), classes=CLASSES, title="t")
    assert os.listdir(tmp_path) == []
