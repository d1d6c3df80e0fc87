"""A process that reads damaged files, one case after the other: ``python -m tests.fuzz.worker SEED FOLDER KEEP``.

A request is a line with the number of a case on standard input; the answer one line of JSON. The parent watches: what
hangs or dies here is found there. Memory is limited, so what asks for too much fails.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fastdiffclip.errors import FastDiffCLIPError, InputDataError, ResourceError
from fastdiffclip.scene.ingest import IngestRequest, ingest
from fastdiffclip.scene.readers import guard, open_raster

from .corpus import Entry, entries
from .mutations import mutate

MEMORY = 2**30  # bytes this process may allocate
CHILD_MEMORY = 2**29  # and the child that decodes
INGEST_EVERY = 4
LARGEST_INGEST = 2**24
DESCRIPTORS = 40  # more than at the start is a leak

Files = dict[str, bytes]


def corpus(folder: Path) -> list[tuple[Entry, Files]]:
    """Write every entry once and keep its files."""
    found = []
    for entry in entries():
        place = folder / entry.name
        place.mkdir(parents=True)
        entry.write(place / entry.main)
        files = {
            path.relative_to(place).as_posix(): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()
        }
        shutil.rmtree(place)
        found.append((entry, files))
    return found


def damaged(known: list[tuple[Entry, Files]], seed: int, case: int) -> tuple[Entry, Files]:
    """Return the entry and the files of a case; the same for the same seed and number."""
    entry, files = known[case % len(known)]
    rng = np.random.default_rng([seed, case])
    donors = list(known[int(rng.integers(len(known)))][1].values())
    names = sorted(files)
    hit = set(rng.choice(names, 1 if rng.random() < 0.8 else min(2, len(names)), replace=False).tolist())
    changed = {name: mutate(data, donors, rng) if name in hit else data for name, data in files.items()}
    if len(names) > 1 and rng.random() < 0.05:
        del changed[names[int(rng.integers(len(names)))]]
    return entry, changed


def write(files: Files, folder: Path) -> None:
    """Write the files of a case."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def run(entry: Entry, folder: Path, case: int) -> None:
    """Read the main file of a case; one in four that can is ingested as well, if it is not too large."""
    path = folder / entry.main
    entry.read(path)
    if not entry.ingested or case // len(entries()) % INGEST_EVERY:
        return
    with open_raster(path) as source:
        size = source.height * source.width * source.bands * source.dtype.itemsize
    if size <= LARGEST_INGEST:
        out = folder.parent / "scene.zarr"
        ingest(IngestRequest([("hsi", str(path))], out))
        shutil.rmtree(out)


def judge(entry: Entry, folder: Path, case: int) -> tuple[str, str]:
    """Run a case; return its outcome and what was said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            run(entry, folder, case)
        except (InputDataError, ResourceError) as error:
            said = str(error)
            if "\n" in said or len(said) > 4000:
                return "no sentence", said[:2000]
            return "refused", said
        except FastDiffCLIPError as error:
            return "wrong error", f"{type(error).__name__}: {error}"
        except MemoryError:
            return "memory", traceback.format_exc()
        except Exception:
            return "crash", traceback.format_exc()
    return "read", ""


def main(seed: int, folder: Path, keep: Path) -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    tempfile.tempdir = str(temporary)
    os.environ["TMPDIR"] = str(temporary)
    known = corpus(folder / "corpus")
    guard.MEMORY_LIMIT, guard.DATA_TIME_S = CHILD_MEMORY, guard.HEADER_TIME_S
    limit_memory()
    baseline: int | None = None
    for line in sys.stdin:
        case = int(line)
        entry, files = damaged(known, seed, case)
        place = folder / "case" / "input"
        place.mkdir(parents=True)
        write(files, place)
        began = time.monotonic()
        outcome, said = judge(entry, place, case)
        seconds = time.monotonic() - began
        left = [
            str(path.relative_to(folder)) for path in (*place.parent.iterdir(), *temporary.iterdir()) if path != place
        ]
        if left:
            outcome, said = "left behind", f"{left} after {outcome}: {said}"
        open_files = len(os.listdir("/proc/self/fd"))
        baseline = open_files if baseline is None else baseline
        if open_files > baseline + DESCRIPTORS:
            outcome, said, baseline = "descriptors", f"{open_files} open, {baseline} at the start", open_files
        if outcome not in ("read", "refused"):
            shutil.copytree(place, keep / f"{case}-{entry.name}", dirs_exist_ok=True)
        clean(folder / "case", temporary)
        print(json.dumps(answer(case, entry, outcome, said, seconds)), file=answers, flush=True)


def answer(case: int, entry: Entry, outcome: str, said: str, seconds: float) -> dict[str, Any]:
    """What the parent is told."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"case": case, "entry": entry.name, "outcome": outcome, "said": said, "seconds": seconds, "peak_mib": peak}


def clean(*folders: Path) -> None:
    """Empty folders, whatever is in them."""
    for folder in folders:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folders[0].rmdir()


def limit_memory() -> None:
    """Bound what this process may allocate from here on."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
