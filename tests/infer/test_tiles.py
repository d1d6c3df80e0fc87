"""Tiles and blocks cover a scene exactly, and tiles depend on nothing but its size."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastdiffclip.infer.tiles import Rect, Tiling, cut_blocks

sides = st.integers(1, 70)


@given(height=sides, width=sides, pixels=st.integers(1, 200))
def test_tiles_cover_the_scene_once(height: int, width: int, pixels: int) -> None:
    tiling = Tiling.of(height, width, pixels)
    seen = np.zeros((height, width), int)
    for number in range(tiling.down * tiling.across):
        tile = tiling.tile(number)
        assert 0 < tile.pixels <= max(pixels, 1)
        seen[tile.slices] += 1
    assert (seen == 1).all()


def test_tiles_have_an_even_width_and_are_never_much_smaller_than_asked_for() -> None:
    assert Tiling.of(1, 5000, 2048) == Tiling(1, 5000, 1, 1667)
    assert Tiling.of(349, 1905, 2048) == Tiling(349, 1905, 1, 1905)
    assert Tiling.of(5000, 1, 2048) == Tiling(5000, 1, 2048, 1)
    assert Tiling.of(30, 40, 2048) == Tiling(30, 40, 30, 40)


@given(height=sides, width=sides, pixels=st.integers(1, 200), rows=st.integers(1, 9), cols=st.integers(1, 9))
def test_blocks_are_whole_tiles_in_reading_order(height: int, width: int, pixels: int, rows: int, cols: int) -> None:
    tiling = Tiling.of(height, width, pixels)
    blocks = cut_blocks(tiling, rows, cols)
    assert [block.number for block in blocks] == list(range(len(blocks)))
    assert sorted(tile for block in blocks for tile in block.tiles) == list(range(tiling.down * tiling.across))
    for block in blocks:
        assert sum(tiling.tile(number).pixels for number in block.tiles) == block.rect.pixels
        assert all(tiling.tile(number).within(block.rect) == tiling.tile(number) for number in block.tiles)
    for one, other in zip(blocks, blocks[1:], strict=False):
        below = one.rect.left == other.rect.left and one.rect.bottom == other.rect.top
        assert below or (other.rect.top == 0 and other.rect.left == one.rect.right)


@given(height=sides, width=sides, pixels=st.integers(1, 200), data=st.data())
def test_tiles_of_a_rectangle_are_those_that_touch_it(
    height: int, width: int, pixels: int, data: st.DataObject
) -> None:
    tiling = Tiling.of(height, width, pixels)
    top, left = data.draw(st.integers(0, height)), data.draw(st.integers(0, width))
    rect = Rect(top, data.draw(st.integers(top, height)), left, data.draw(st.integers(left, width)))
    touched = [n for n in range(tiling.down * tiling.across) if tiling.tile(n).within(rect).pixels]
    assert tiling.tiles_of(rect) == touched


def test_rectangles() -> None:
    rect = Rect(2, 5, 1, 4)
    assert (rect.height, rect.width, rect.pixels) == (3, 3, 9)
    assert rect.grown(2) == Rect(0, 7, -1, 6) and rect.relative_to(Rect(1, 9, 1, 9)) == Rect(1, 4, 0, 3)
    apart = rect.within(Rect(7, 9, 0, 9))
    assert apart.pixels == 0 and apart.height == 0
    assert Rect(5, 2, 0, 3).pixels == 0
