"""Caches of compiled code in the user's cache folder: kept between runs, checked before anything trusts them.

torch.compile and Triton load whatever lies in their caches: one file cut short by a power failure ends every later run.
So a process lists the files with their sha256 when it ends, and the next one throws away what differs from the list
before the compilers see it. Files on no list yet are kept, since another process may be at work on them, unless the
machine went down after they were written.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

logger = logging.getLogger(__name__)
SEAL = "seal.json"
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def cache_folder(name: str, base: Path | None = None) -> Path | None:
    """The folder ``name`` of ``base``, or of the project's part of the user's cache; None where it cannot be written.

    What is made is the user's alone: compilers run, and unpickle, what they find in their caches.
    """
    if base is None:
        import platformdirs

        try:
            base = Path(platformdirs.user_cache_dir("fastdiffclip", appauthor=False))
        except RuntimeError as error:  # a user without a home and a name
            logger.debug("no cache for compiled code: %s", error)
            return None
    folder = base / name
    try:
        base.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        logger.debug("no cache for compiled code: %s cannot be written (%s)", folder, error)
        return None


def checksums(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder`` by its relative path; the seal is left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        try:
            if path.is_file() and path.name != SEAL:
                found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
        except FileNotFoundError:  # another process renamed it meanwhile
            continue
    return found


def keep_compiled_code() -> None:
    """Give torch.compile and Triton cache folders of ours, unless the user named others; call before they compile.

    Where no folder can be written they use their own, under the system's folder for temporary files.
    """
    for variable, name in CACHES.items():
        folder = None if variable in os.environ else cache_folder(name)
        if folder is not None:
            drop_damaged(folder)
            os.environ[variable] = str(folder)
            atexit.register(seal, folder)


def drop_damaged(folder: Path) -> None:
    """Remove what differs from the seal, with everything beside it; all of it where the seal itself is damaged.

    Files without a seal are removed when they are older than the machine's last start: it may have failed while they
    were on their way to the disk.
    """
    try:
        known = _read_seal(folder)
        if known is None:
            logger.debug("the seal of %s is damaged: everything is compiled anew", folder)
            for path in folder.iterdir():
                _remove(path)
            return
        booted = _booted()
        suspects = [
            folder / name
            for name, digest in checksums(folder).items()
            if known.get(name, digest) != digest or (name not in known and (folder / name).stat().st_mtime < booted)
        ]
        for path in suspects:
            logger.debug("%s may be damaged and is compiled anew", path)
            # An entry is a folder of files that need each other.
            _remove(path if path.parent == folder else path.parent)
    except OSError as error:
        logger.debug("the cache %s cannot be checked: %s", folder, error)


def _read_seal(folder: Path) -> dict[str, str] | None:
    """sha256 by relative path, empty where there is no seal yet; None where it is damaged."""
    try:
        known = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        return None
    return known if isinstance(known, dict) else None


def _booted() -> float:
    """When the machine started, in seconds of the epoch; 0 where the system does not tell."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else 0.0


def seal(folder: Path) -> None:
    """List what lies in ``folder`` now, under a temporary name first."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump({name: digest for name, digest in checksums(folder).items() if "/" in name}, file)
        os.replace(file.name, folder / SEAL)
    except OSError as error:
        logger.debug("the cache %s cannot be sealed: %s", folder, error)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
