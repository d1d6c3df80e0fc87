"""The child process that decodes files nobody vouches for: MATLAB, HDF5, NetCDF and zarr.

One child serves the whole session. It answers one request at a time, within limits of time and memory; when it
crashes, hangs or needs too much, the caller gets an InputDataError and the next request a new child. Blocks of rows
come through the pipe, so nothing is left behind on disk, whatever happens. A fork makes a child of its own.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastdiffclip.errors import InputDataError, ResourceError

HEADER_TIME_S = 10.0  # without a sign of life, for what a file says of itself
DATA_TIME_S = 120.0  # likewise, for values
START_TIME_S = 60.0
MEMORY_LIMIT: int | None = None  # bytes; None: half of the machine's, at most 8 GiB
_LONGEST_REPLY = 64 * 2**20
_QUIET = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "HDF5_PLUGIN_PRELOAD": "::",  # HDF5's word for: load no filter plugins
    "HDF5_USE_FILE_LOCKING": "FALSE",  # a file on a disk that cannot be locked is read all the same
}


class MissingArray(InputDataError):
    """The file has no array of that name; callers that know what it has say more."""


class _Watch(threading.Thread):
    """Kills a process that gives no sign of life for ``seconds``."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        super().__init__(daemon=True)
        self.expired = False
        self._process, self._seconds, self._over = process, seconds, threading.Event()
        self.alive()
        self.start()

    def alive(self) -> None:
        self._deadline = time.monotonic() + self._seconds

    def run(self) -> None:
        while not self._over.wait(max(0.0, self._deadline - time.monotonic())):
            if time.monotonic() >= self._deadline:
                self.expired = True
                self._process.kill()
                return

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


class _Child:
    """A running child and the pipes to it."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        program = Path(__file__).with_name("child.py")
        lifeline, self._lifeline = _pipe()
        command = [sys.executable, "-P", "-B", str(program), str(memory), str(lifeline)]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={**os.environ, **_QUIET},
                pass_fds=(lifeline,) if os.name == "posix" else (),
            )
        except OSError as error:
            os.close(self._lifeline)
            raise ResourceError(f"cannot start the reader process {command[0]} ({error.strerror})") from error
        finally:
            os.close(lifeline)
        assert self.process.stdin and self.process.stdout
        self.replies = io.BufferedReader(self.process.stdout)  # type: ignore[type-var]

    def stop(self) -> None:
        """Kill it and collect what is left of it."""
        self.process.kill()
        self.process.wait()
        self.forget()

    def forget(self) -> None:
        """Close our ends of the pipes."""
        os.close(self._lifeline)
        self.replies.close()
        if self.process.stdin:
            self.process.stdin.close()


def _pipe() -> tuple[int, int]:
    """Return a pipe whose ends are not 0, 1 or 2, as they would be where a standard stream is closed."""
    ends = os.pipe()
    if os.name != "posix" or min(ends) > 2:
        return ends
    from fcntl import F_DUPFD_CLOEXEC, fcntl

    high = [fcntl(end, F_DUPFD_CLOEXEC, 3) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]


class _Guard:
    """The child of this process, started when it is first needed."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.child: _Child | None = None
        self._registered = False

    def ready(self) -> _Child:
        """Return a child that runs under the present memory limit."""
        memory = memory_limit()
        if self.child is not None and (self.child.process.poll() is not None or self.child.memory != memory):
            self.stop()
        if self.child is None:
            if not self._registered:
                self._registered = True
                atexit.register(self.stop)
                if hasattr(os, "register_at_fork"):
                    os.register_at_fork(after_in_child=self.after_fork)
            self.child = _Child(memory)
            with _Watch(self.child.process, START_TIME_S):
                started = self.child.replies.readline(_LONGEST_REPLY)
            if not started:
                self.stop()
                raise ResourceError(
                    f"the reader process does not start with {memory / 2**20:.0f} MiB of memory: free some memory"
                )
        return self.child

    def stop(self) -> None:
        """End the child; the next request starts another."""
        with self.lock:
            child, self.child = self.child, None
            if child is not None:
                child.stop()

    def after_fork(self) -> None:
        """Leave the child to the process that started it."""
        self.lock = threading.RLock()
        child, self.child = self.child, None
        if child is not None:
            child.process.returncode = 0  # not ours to wait for
            child.forget()


_guard = _Guard()


def memory_limit() -> int:
    """Return the bytes that the child may allocate."""
    if MEMORY_LIMIT is not None:
        return MEMORY_LIMIT
    import psutil

    return int(min(8 * 2**30, psutil.virtual_memory().total // 2))


def process_id() -> int | None:
    """Return the process id of the child, None where there is none."""
    return None if _guard.child is None else _guard.child.process.pid


def stop() -> None:
    """End the child process, if one runs."""
    _guard.stop()


def request(
    what: str, kind: str, message: dict[str, Any], seconds: float, out: np.ndarray | None = None
) -> dict[str, Any]:
    """Have the child carry out a message; an array that comes back is written into ``out``.

    ``what`` names the file, perhaps with the array, and ``kind`` its format, for errors. Raises MissingArray,
    and InputDataError when the file is damaged, refused, or too much for the limits.
    """
    with _guard.lock:
        child = _guard.ready()
        try:
            with _Watch(child.process, seconds) as watch:
                reply = _converse(child, message, watch, out)
        except BaseException:  # Ctrl-C too: the rest of an answer must not be taken for the next one
            _guard.stop()
            raise
        if reply is None:
            status = _end(child.process)
            _guard.stop()
            raise InputDataError(_ended(what, kind, status, seconds if watch.expired else None))
        if "memory" in reply:
            _guard.stop()
            raise InputDataError(
                f"{what} cannot be read as {kind} within {child.memory / 2**20:.0f} MiB of memory: it is damaged or "
                "made up, or too large to be read whole; convert it to GeoTIFF"
            )
    if "missing" in reply:
        raise MissingArray(f"{what} {reply['missing']}: check the name, or copy the file again")
    if "refused" in reply:
        raise InputDataError(f"{what} {reply['refused']}")
    if "failed" in reply:
        raise InputDataError(
            f"{what} cannot be read as {kind}, it may be truncated or damaged ({reply['failed']}): copy it again, or "
            "convert it to GeoTIFF"
        )
    result: dict[str, Any] = reply["result"]
    return result


def _converse(child: _Child, message: dict[str, Any], watch: _Watch, out: np.ndarray | None) -> dict[str, Any] | None:
    """Send a message and return the answer; None when the child ended before it was complete."""
    assert child.process.stdin
    try:
        child.process.stdin.write(json.dumps(message).encode() + b"\n")
    except BrokenPipeError:
        return None
    while line := child.replies.readline(_LONGEST_REPLY):
        if not line.endswith(b"\n"):
            return None
        reply: dict[str, Any] = json.loads(line)
        if "alive" not in reply:
            return reply if _receive(child, reply.get("bytes", 0), watch, out) else None
        watch.alive()
    return None


def _receive(child: _Child, size: int, watch: _Watch, out: np.ndarray | None) -> bool:
    """Read ``size`` bytes into ``out``; False when they are not what was expected or do not come."""
    if size != (out.nbytes if out is not None else 0):
        return size == 0
    if out is None:
        return True
    buffer = out.reshape(-1).view(np.uint8).data
    filled = 0
    while filled < size:
        count = child.replies.readinto(buffer[filled : filled + 2**24])
        if not count:
            return False
        filled += count
        watch.alive()
    return True


def _end(process: subprocess.Popen[bytes]) -> int:
    """Return the status of a process that closed its pipe, or that has to be ended since it answers nonsense."""
    try:
        return process.wait(1.0)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _ended(what: str, kind: str, status: int, seconds: float | None) -> str:
    if seconds is not None:
        return (
            f"{what} could not be read as {kind} within {seconds:g} s: it is damaged or made up, or its disk does not "
            "answer; copy it again, or convert it to GeoTIFF"
        )
    end = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return (
        f"{what} cannot be read as {kind}: the process that decodes it ended with {end}, the file is truncated, "
        "damaged or made up; copy it again, or convert it to GeoTIFF"
    )
