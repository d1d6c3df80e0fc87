"""Compiles the numba gather and keeps the machine code in a cache folder of our own.

numba trusts whatever lies in its cache: a truncated file ends the run with EOFError, a flipped byte may do
worse. So each specialisation has one folder, filled under a temporary name, sealed with the sha256 of its
files and renamed; a folder whose seal does not match is thrown away before numba sees it. The folder is
``NUMBA_CACHE_DIR`` where that is set, else the user's cache folder; where neither can be written, nothing is
cached and the gather is compiled on each run (0.6 s).
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fastdiffclip.compile_cache import SEAL, cache_folder, checksums

logger = logging.getLogger(__name__)


class NumbaUnavailableError(Exception):
    """numba is missing, switched off or cannot compile here; the message says which."""


def compile_gather(dtype: np.dtype) -> Callable[..., None]:
    """Return the gather compiled for pixels of ``dtype`` (see ``gather_numba.gather``).

    Raises NumbaUnavailableError.
    """
    try:
        import numba

        from fastdiffclip.scene import gather_numba
    except (ImportError, AttributeError, SystemError, OSError) as error:  # as a numba beside the wrong numpy
        raise NumbaUnavailableError(f"numba cannot be imported: {error}") from error
    if getattr(numba.config, "DISABLE_JIT", False):
        raise NumbaUnavailableError("numba is switched off by NUMBA_DISABLE_JIT")
    try:
        return _compile_cached(numba, gather_numba, dtype)
    except (numba.core.errors.NumbaError, RuntimeError, OSError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise NumbaUnavailableError(f"numba cannot compile: {type(error).__name__}: {first_line}") from error


def _compile_cached(numba: ModuleType, gather_numba: ModuleType, dtype: np.dtype) -> Callable[..., None]:
    source = Path(str(gather_numba.__file__))
    stamp = _stamp(source, numba.__version__)
    configured = numba.config.CACHE_DIR
    base = cache_folder("fastdiffclip", Path(configured)) if configured else cache_folder("numba")
    if base is None:
        return _decorate(numba, gather_numba.gather, dtype, None)
    # One folder per checkout and dtype, so that new versions replace old files instead of piling up.
    place = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:12]
    sealed = base / f"gather-{place}-{dtype.name}"
    if _is_intact(sealed, stamp):
        return _decorate(numba, gather_numba.gather, dtype, sealed)
    return _compile_into(sealed, stamp, lambda folder: _decorate(numba, gather_numba.gather, dtype, folder))


def _stamp(source: Path, numba_version: str) -> str:
    info = source.stat()
    return f"{numba_version} {platform.python_version()} {platform.machine()} {info.st_mtime_ns} {info.st_size}"


def _decorate(
    numba: ModuleType, function: Callable[..., None], dtype: np.dtype, folder: Path | None
) -> Callable[..., None]:
    """Compile ``function`` for ``dtype`` now, with ``folder`` as numba's cache."""
    if folder is None:
        compiled = numba.njit(parallel=True, nogil=True)(function)
    else:
        # The setting is global to the process, and other people's numba code lives there too.
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(folder)
        try:
            compiled = numba.njit(parallel=True, nogil=True, cache=True)(function)
        finally:
            numba.config.CACHE_DIR = before
    compiled.compile(_signature(numba, dtype))
    compiled.disable_compile()  # a later specialisation would be written into the sealed folder
    return compiled


def _signature(numba: ModuleType, dtype: np.dtype) -> Any:
    types = numba.types

    def given(kind: Any, dimensions: int) -> Any:
        # Read-only also accepts writable arrays; the other way round numba refuses memory maps.
        return types.Array(kind, dimensions, "C", readonly=True)

    vector, table = given(types.float32, 1), given(types.int64, 2)
    out = types.Array(types.float32, 3, "C")
    pixels, valid = given(numba.from_dtype(dtype), 2), given(types.uint8, 1)
    return types.void(pixels, vector, vector, valid, table, table, types.int64, out)


def _compile_into(sealed: Path, stamp: str, build: Callable[[Path | None], Callable[..., None]]) -> Callable[..., None]:
    try:
        shutil.rmtree(sealed, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=sealed.parent, prefix="new-") as scratch:
            fresh = Path(scratch) / "cache"
            fresh.mkdir()
            compiled = build(fresh)
            (fresh / SEAL).write_text(json.dumps({"stamp": stamp, "files": checksums(fresh)}))
            _rename(fresh, sealed)
        return compiled
    except OSError as error:
        logger.debug("compiled code could not be written to %s: %s", sealed.parent, error)
        return build(None)


def _rename(fresh: Path, sealed: Path) -> None:
    try:
        fresh.rename(sealed)
    except OSError as error:
        logger.debug("%s was sealed by another process first: %s", sealed, error)


def _is_intact(folder: Path, stamp: str) -> bool:
    try:
        seal = json.loads((folder / SEAL).read_text())
        return seal == {"stamp": stamp, "files": checksums(folder)}
    except (OSError, ValueError):
        return False
