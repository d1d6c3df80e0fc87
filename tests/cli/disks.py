"""Small disks of their own: tmpfs in a mount namespace, which ends with the test however the test ends."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from .console import Result

MOUNT = 'mount -t tmpfs -o "$1" tmpfs "$0" && echo mounted && exec sleep 600'
# Root may mount in a namespace of mounts alone; others need one in which they are root.
WAYS = {
    "unshare --mount": ["--mount"],
    "unshare --map-root-user --mount": ["--user", "--preserve-credentials", "--mount"],
}
FILLER = "filler"


@dataclass(frozen=True)
class Disk:
    """A tmpfs at ``place``, which only processes started by :meth:`run` see there.

    Attributes:
        root: the same folder as this process sees it.
    """

    place: Path
    holder: int
    ways: tuple[str, ...]

    @property
    def root(self) -> Path:
        return Path(f"/proc/{self.holder}/root{self.place}")

    def run(self, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> Result:
        """Run a command in ``folder`` where the disk is there."""
        enter = ["nsenter", f"--target={self.holder}", *self.ways, "sh", "-c", 'cd "$0" && exec "$@"', str(folder)]
        done = subprocess.run(
            [*enter, *command], capture_output=True, text=True, timeout=240, check=False,
            env={"OMP_NUM_THREADS": "1", **(os.environ if environment is None else environment)},
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    def read_only(self) -> None:
        """Let nobody write any more, root included."""
        done = self.run(["mount", "-o", "remount,ro", str(self.place)], Path("/"))
        assert done.code == 0, done.err


@contextmanager
def small_disk(place: Path, options: str) -> Iterator[Disk]:
    """Mount a tmpfs with ``options`` (``size=1m``) at a folder, which is made; skips the test where nobody may."""
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        pytest.skip("no disk of its own for a test: util-linux (unshare, nsenter) is not installed")
    place.mkdir(parents=True, exist_ok=True)
    said = ""
    for unshare, ways in WAYS.items():
        holder = subprocess.Popen(
            [*unshare.split(), "sh", "-c", MOUNT, str(place), options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            assert holder.stdout is not None and holder.stderr is not None
            if holder.stdout.readline() == "mounted\n":
                yield Disk(place, holder.pid, tuple(ways))
                return
            said = holder.stderr.read().strip()
        finally:
            holder.kill()
            holder.communicate()
    pytest.skip(f"no disk of its own for a test: mounting is not allowed here ({said})")


# What a command does first when a disk shall run full at some moment of it: argv[1] is the folder on that disk.
FILL = """
import sys
from pathlib import Path

folder = Path(sys.argv.pop(1))

def fill():
    with open(folder / {filler!r}, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            return

def full_at(owner, name, call):
    plain, seen = getattr(owner, name), [0]
    def wrapped(*given, **named):
        seen[0] += 1
        if seen[0] == call:
            fill()
        return plain(*given, **named)
    setattr(owner, name, wrapped)

{moment}
from fastdiffclip.cli import main
main()
"""


def filling(moment: str) -> str:
    """A program that fills the disk of its first argument at a moment, and is the command with the others."""
    return FILL.format(filler=FILLER, moment=moment)
