"""Folders that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdiffclip.errors import ResourceError, UsageError
from fastdiffclip.scene.layout import FORMAT_NAME, MANIFEST


@contextmanager
def pending_folder(target: Path, overwrite: bool, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a fresh folder beside ``target`` that is synced to disk and renamed to it on a clean exit.

    On an exception it is removed. An existing ``target`` is replaced only with ``overwrite`` and where
    ``replaceable`` says yes of it. Raises UsageError when it may not be replaced or written, ResourceError
    when the disk is full.
    """
    require_free(target, overwrite, replaceable)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"{target} cannot be written ({error.strerror}): choose another --out") from error
        yield temporary
        _sync(temporary)
        _swap_in(temporary, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"the disk of {target} is full: make room or choose another --out") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
