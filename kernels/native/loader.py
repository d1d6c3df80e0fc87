"""Finds and loads the native library. Where it is missing or foreign, :func:`status` says why."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch  # noqa: F401  loaded first, so that the library shares torch's OpenMP threads

from fastdiffclip.errors import ResourceError

ABI_VERSION = 6
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
NO_MEMORY, NO_ISA = -1, -2  # codes of abi.h that mean the same for every function


def _folders() -> Iterable[str]:
    # Under an editable install this package has two folders: the sources and the one in site-packages.
    return sys.modules[__package__].__path__


def _file_name() -> str:
    return "libfastdiffclip_native" + (".dylib" if sys.platform == "darwin" else ".so")


@functools.cache
def _find() -> tuple[ctypes.CDLL | None, str, Path | None]:
    paths = [Path(folder, _file_name()) for folder in _folders()]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        return None, f"there is no {_file_name()}: installed without a C++ compiler, or not installed", None
    try:
        library = ctypes.CDLL(str(path))
        found = int(library.fdc_abi_version())
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}", path
    if found != ABI_VERSION:
        return None, f"{path} has ABI {found}, expected {ABI_VERSION}: install fastdiffclip again", path
    return library, "", path


def status() -> tuple[bool, str, Path | None]:
    """Return (available, reason, path); reason is ``""`` when available, path None when there is no file."""
    library, reason, path = _find()
    return library is not None, reason, path


def load() -> ctypes.CDLL:
    """Return the library.

    Raises:
        ResourceError: it is missing or cannot be used, for the reason that :func:`status` gives.
    """
    library, reason, _ = _find()
    if library is None:
        raise ResourceError(f"the native library is not available: {reason}")
    return library


@functools.cache
def function(name: str) -> tuple[Callable[[bytes], int], int]:
    """A function of the library that takes packed arguments and returns a code, and the best ISA's number.

    Raises :class:`ResourceError` as :func:`load` does.
    """
    library = load()
    call: Any = getattr(library, name)
    call.restype, call.argtypes = ctypes.c_int64, [ctypes.c_char_p]
    return call, library.fdc_best_isa()


def best_isa() -> str:
    """Name the instruction set, out of :data:`ISAS`, that this processor runs fastest.

    Raises:
        ResourceError: see :func:`load`.
    """
    return ISAS[load().fdc_best_isa()]


def require_done(code: int, what: str, isa: str | None) -> None:
    """Raise :class:`ResourceError` where a function, called ``what`` to the user, had no memory or no such ``isa``."""
    if code == NO_MEMORY:
        raise ResourceError(f"the native {what} has no memory for its work space; close other programs")
    if code == NO_ISA:
        raise ResourceError(f"this processor does not run {isa!r}; the best it runs is {best_isa()!r}")
