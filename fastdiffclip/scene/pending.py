"""Folders that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastdiffclip.errors import ResourceError, UsageError
from fastdiffclip.scene.layout import FORMAT_NAME, MANIFEST


@contextmanager
def pending_folder(target: Path, overwrite: bool, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a fresh folder beside ``target`` that is synced to disk and renamed to it on a clean exit.

    On an exception it is removed, with the folders above it that it needed. An existing ``target`` is replaced only
    with ``overwrite`` and where ``replaceable`` says yes of it. Raises UsageError when it may not be replaced or
    written, ResourceError when the disk is full.
    """
    remove_leftovers(target)
    require_free(target, overwrite, replaceable)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    try:
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            lock = _create_locked(temporary)
        except OSError as error:
            raise UsageError(f"{target} cannot be written ({error.strerror}): choose another --out") from error
        try:
            yield temporary
            _sync(temporary)
            _swap_in(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"the disk of {target} is full: make room or choose another --out") from error
        raise
    finally:
        for folder in made:
            with suppress(OSError):  # it holds the target, or something of somebody else's
                folder.rmdir()


def remove_leftovers(target: Path) -> None:
    """Remove what a killed process left of ``target``; what it was about to replace comes back.

    Whoever writes a folder holds a lock on it, which ends with the process. A disk without such locks keeps its
    leftovers.
    """
    known = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(partial|old)")
    found = [entry for entry in target.parent.glob(f".{glob.escape(target.name)}.*") if known.fullmatch(entry.name)]
    for entry in found:
        if entry.suffix == ".partial" and not _is_locked(entry):
            shutil.rmtree(entry, ignore_errors=True)
    for entry in found:
        if entry.suffix == ".old" and not entry.with_suffix(".partial").exists():
            if os.path.lexists(target):
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.rename(target)


def _create_locked(folder: Path) -> int:
    """Make a folder that has its lock from the moment it has its name; return what holds the lock."""
    fresh = folder.with_suffix(".new")
    try:
        fresh.mkdir()
        lock = os.open(fresh, os.O_RDONLY)
        with suppress(OSError):  # a disk without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fresh.rename(folder)
    except BaseException:
        for path in (fresh, folder):
            with suppress(OSError):
                path.rmdir()
        raise
    return lock


def _is_locked(folder: Path) -> bool:
    """Say whether somebody writes the folder, or may."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def require_free(target: Path, overwrite: bool, replaceable: Callable[[Path], bool]) -> None:
    """Raise UsageError when ``target`` exists, is no empty folder and may not be replaced."""
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"{target} exists already: choose another --out, or say --overwrite to replace it")
    if not replaceable(target):
        raise UsageError(f"{target} is not a scene or a folder of scenes and is not replaced: choose another --out")


def is_scene(folder: Path) -> bool:
    """Say whether a folder holds a finished scene, by its manifest alone."""
    try:
        content = json.loads((folder / MANIFEST / "zarr.json").read_bytes())
        return bool(content["attributes"]["format"] == FORMAT_NAME)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_folder_of_scenes(folder: Path) -> bool:
    """Say whether a folder holds finished scenes and nothing else."""
    return folder.is_dir() and all(is_scene(entry) for entry in folder.iterdir())


def _sync(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in (*files, "."):
            handle = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _swap_in(temporary: Path, target: Path) -> None:
    old = temporary.with_suffix(".old")
    if os.path.lexists(target):
        target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
