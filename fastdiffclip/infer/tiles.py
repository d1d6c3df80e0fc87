"""How a scene is cut for prediction: tiles, whose pixels are computed together, and blocks of tiles, read together.

Tiles depend on the size of the scene and the kind of device alone, so a pixel always meets the same place in the same
batch, whatever is read at once and whichever process does it. Blocks follow from the memory that there is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rect:
    """Rows ``top`` to ``bottom`` and columns ``left`` to ``right`` of a raster, ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        """Rows; 0 where nothing is in it."""
        return max(0, self.bottom - self.top)

    @property
    def width(self) -> int:
        """Columns; 0 where nothing is in it."""
        return max(0, self.right - self.left)

    @property
    def pixels(self) -> int:
        """Height times width."""
        return self.height * self.width

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns as an index."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def within(self, other: Rect) -> Rect:
        """What both have in common, empty where that is nothing."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        return Rect(top, max(top, min(self.bottom, other.bottom)), left, max(left, min(self.right, other.right)))

    def grown(self, radius: int) -> Rect:
        """With ``radius`` pixels more on every side."""
        return Rect(self.top - radius, self.bottom + radius, self.left - radius, self.right + radius)

    def relative_to(self, other: Rect) -> Rect:
        """The same pixels counted from the upper left corner of ``other``."""
        return Rect(self.top - other.top, self.bottom - other.top, self.left - other.left, self.right - other.left)


@dataclass(frozen=True)
class Tiling:
    """A scene in tiles of ``rows`` x ``cols`` pixels; those at the lower and right edge may be smaller."""

    height: int
    width: int
    rows: int
    cols: int

    @classmethod
    def of(cls, height: int, width: int, pixels: int) -> Tiling:
        """Tiles of about ``pixels`` pixels: whole rows, or even parts of a row where the scene is wider than that."""
        cols = math.ceil(width / math.ceil(width / pixels))
        return cls(height, width, min(height, max(1, pixels // cols)), cols)

    @property
    def down(self) -> int:
        """Number of rows of tiles."""
        return -(-self.height // self.rows)

    @property
    def across(self) -> int:
        """Number of columns of tiles."""
        return -(-self.width // self.cols)

    @property
    def whole(self) -> Rect:
        """The scene."""
        return Rect(0, self.height, 0, self.width)

    def tile(self, number: int) -> Rect:
        """Tile ``number``, counted row by row."""
        row, col = divmod(number, self.across)
        place = Rect(row * self.rows, (row + 1) * self.rows, col * self.cols, (col + 1) * self.cols)
        return place.within(self.whole)

    def tiles_of(self, rect: Rect) -> list[int]:
        """The tiles that share a pixel with ``rect``, in order."""
        rows = range(rect.top // self.rows, -(-rect.bottom // self.rows))
        cols = range(rect.left // self.cols, -(-rect.right // self.cols))
        return [row * self.across + col for row in rows for col in cols] if rect.pixels else []


@dataclass(frozen=True)
class Block:
    """Whole tiles that are read together; ``rect`` is what they cover."""

    number: int
    rect: Rect
    tiles: tuple[int, ...]


def cut_blocks(tiling: Tiling, rows: int, cols: int) -> list[Block]:
    """Blocks of ``rows`` x ``cols`` tiles, from the top down, one column of blocks after the other."""
    blocks: list[Block] = []
    for col in range(0, tiling.across, cols):
        for row in range(0, tiling.down, rows):
            first = tiling.tile(row * tiling.across + col)
            below, right = min(row + rows, tiling.down) - 1, min(col + cols, tiling.across) - 1
            last = tiling.tile(below * tiling.across + right)
            rect = Rect(first.top, last.bottom, first.left, last.right)
            blocks.append(Block(len(blocks), rect, tuple(tiling.tiles_of(rect))))
    return blocks
