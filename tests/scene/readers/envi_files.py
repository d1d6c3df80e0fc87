"""Writes small ENVI files, as tests need them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

CODES = {"u1": 1, "i2": 2, "i4": 3, "f4": 4, "f8": 5, "u2": 12, "u4": 13, "i8": 14, "u8": 15}
AXES = {"bsq": (2, 0, 1), "bil": (0, 2, 1), "bip": (0, 1, 2)}
UTM = "map info = {UTM, 1, 1, 500000, 4100000, 2, 2, 17, North, WGS-84, units=Meters}"


def write_envi(
    data: Path, cube: np.ndarray, *more: str, interleave: str = "bsq", order: int = 0, offset: int = 0, header: str = ""
) -> Path:
    """Write a cube (H, W, bands) as data file and header, ``more`` lines added to the header; return the header."""
    height, width, bands = cube.shape
    dtype = np.dtype(cube.dtype).newbyteorder("<>"[order])
    data.write_bytes(b"\7" * offset + cube.transpose(AXES[interleave]).astype(dtype).tobytes())
    lines = [
        "ENVI", "description = {made for a test,", " samples = 99 here is only text}", f"samples = {width}",
        f"Lines   = {height}", f"bands = {bands}", f"header offset = {offset}", "file type = ENVI Standard",
        f"data type = {CODES[dtype.str[1:]]}", f"interleave = {interleave.upper()}", f"byte order = {order}", *more,
    ]  # fmt: skip
    path = data.with_name(header) if header else data.with_suffix(".hdr")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
