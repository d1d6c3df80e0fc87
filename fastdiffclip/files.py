"""Files that ship with the project, and files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

from fastdiffclip.errors import ResourceError, UsageError
from fastdiffclip.locks import Lock

LOCK = ".lock"


def config_text(name: str) -> str:
    """The text of a file of ``fastdiffclip.configs``, or of a bare checkout's ``configs``."""
    try:
        folder: Any = resources.files("fastdiffclip.configs")
    except ModuleNotFoundError:
        folder = Path(__file__).parents[1] / "configs"
    text: str = folder.joinpath(*name.split("/")).read_text(encoding="utf-8")
    return text


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``: synced and renamed to it if the block succeeds, removed if not.

    The name is on the disk, too, when this returns: whatever the caller removes next, it removes later.

    Raises:
        ResourceError: the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or error.__cause__ or error
        raise ResourceError(
            f"cannot write {path}: {reason}; check the folder, its rights and the free space"
        ) from error
    finally:
        with suppress(OSError):  # a folder that does not exist or is not one
            for leftover in path.parent.glob(f"{glob.escape(temporary.name)}*"):  # with what GDAL puts beside it
                leftover.unlink()


def _sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # it may be written and not listed
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing
            raise
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file through :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def require_free(out: Path, resume: bool | None) -> None:
    """Raise :class:`UsageError` when the folder of a run holds files already, unless ``resume``.

    None stands for a command that cannot resume.
    """
    if out.exists() and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir())) and not resume:
        otherwise = "" if resume is None else ", or --resume to continue the run in it"
        raise UsageError(f"the output folder {out} is not empty; give another --out{otherwise}")


def open_folder(out: Path, resume: bool | None) -> Path:
    """Create the folder of a run; ``resume`` as :func:`require_free` takes it.

    Raises:
        UsageError: it holds files already and ``resume`` is not true.
        ResourceError: it cannot be created.
    """
    require_free(out, resume)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot create the output folder {out}: {error.strerror}") from None
    return out


@contextmanager
def held_folder(out: Path, resume: bool) -> Iterator[Path]:
    """:func:`open_folder`, which no other process uses meanwhile; the system ends the hold of a process that dies.

    Raises:
        UsageError: another process works in it, or as :func:`open_folder`.
        ResourceError: it cannot be written.
    """
    lock = Lock(open_folder(out, resume) / LOCK)
    try:
        free = lock.acquire(blocking=False)
    except OSError as error:
        raise ResourceError(f"the output folder {out} cannot be written: {error.strerror}") from None
    if not free:
        raise UsageError(f"another process works in {out}; wait for it, or give another --out")
    try:
        for leftover in out.rglob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()
        yield out
    finally:
        lock.remove()
