"""MATLAB files up to version 7 (not 7.3, which is HDF5).

scipy's reader is not hardened against malicious files, so it runs in a child process with a time limit; the
array comes back as a .npy file in a temporary folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers.source import NUMERIC_TYPES, RasterSource, choose_variable, source_of_array

TIME_LIMIT_S = 120.0
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def open_matlab(path: Path, variable: str | None) -> RasterSource:
    """Open one variable of a .mat file, (H, W) or (H, W, bands), or its only raster without ``variable``."""
    _refuse_hdf5(path)
    folder = tempfile.TemporaryDirectory(prefix="fastdiffclip-mat-")
    try:
        output = Path(folder.name) / "array.npy"
        found = {name: (tuple(shape), kind) for name, shape, kind in _run_child(path, variable, output)}
        name = choose_variable(path, variable, found)
        what = f"variable '{name}' of {path}"
        if found[name][1] not in NUMERIC_TYPES or not output.is_file():
            raise InputDataError(f"{what} is a MATLAB {found[name][1]}, expected a numeric array")
        return source_of_array(path, what, np.load(output, mmap_mode="r", allow_pickle=False), folder.cleanup)
    except BaseException:
        folder.cleanup()
        raise


def _refuse_hdf5(path: Path) -> None:
    with path.open("rb") as stream:
        head = stream.read(520)
    if head.startswith((b"MATLAB 7.3", _HDF5_SIGNATURE)) or head[512:520] == _HDF5_SIGNATURE:
        raise InputDataError(
            f"{path} is a MATLAB 7.3 (HDF5) file, which is not read yet: save it in MATLAB with save(..., '-v7')"
        )


def _run_child(path: Path, variable: str | None, output: Path) -> list[tuple[str, list[int], str]]:
    program = Path(__file__).with_name("matlab_child.py")
    command = [sys.executable, str(program), str(path), str(output), *([variable] if variable else [])]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise InputDataError(
            f"{path} could not be read within {TIME_LIMIT_S:.0f} s: it is damaged, or too large for a "
            ".mat file; "
            "use GeoTIFF or .npy"
        ) from error
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or [f"the reader ended with status {child.returncode}"])[-1]
        raise InputDataError(f"{path} cannot be read as a MATLAB file, it may be truncated or damaged ({reason})")
    listing: list[tuple[str, list[int], str]] = json.loads(child.stdout)
    return listing
