"""Child process that reads files nobody vouches for: ``child.py MEMORY LIFELINE``.

It decodes with libraries that a made-up file may crash, hang or fill with memory, so it may use MEMORY bytes and
write no file, and dies with its parent. A request is one line of JSON on standard input, ``{"module", "call",
"arguments"}``; the answer one line on standard output, after any number of ``{"alive": true}``:
``{"result": ..., "bytes": n}`` and n bytes of an array, ``{"missing": why}`` where there is no such array,
``{"refused": why}``, ``{"failed": why}`` or ``{"memory": true}``. It interprets nothing: the parent judges what it is
told.

The parent runs this file by its path, and it imports its neighbours by their plain names: it starts without the
package.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
from typing import Any, BinaryIO

MODULES = {
    "hdf5": "child_hdf5", "matlab5": "child_matlab5", "matlab73": "child_matlab73", "netcdf3": "child_netcdf3",
    "zarr": "child_zarr", "vectors": "child_vectors", "points": "child_points",
}  # fmt: skip
_LONGEST_REPLY = 32 * 2**20


def limit_resources(memory: int) -> None:
    """Bound what this process may allocate; it writes no files and leaves no core dump."""
    try:
        import resource
    except ImportError:  # not a POSIX system: only the time limit holds
        return
    # Data, where the kernel counts mappings among it: a mapped file larger than memory does no harm.
    kind = resource.RLIMIT_DATA if sys.platform == "linux" else resource.RLIMIT_AS
    for what, limit in ((kind, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def die_with_parent(lifeline: int) -> None:
    """Have the kernel kill this process when the parent's end of the pipe closes, even amid a call that hangs.

    Without that facility the process ends at the next request, which is the end of standard input.
    """
    try:
        from fcntl import F_GETFL, F_SETFL, F_SETOWN, F_SETSIG, fcntl
    except ImportError:
        return
    fcntl(lifeline, F_SETOWN, os.getpid())
    fcntl(lifeline, F_SETSIG, signal.SIGKILL)
    fcntl(lifeline, F_SETFL, fcntl(lifeline, F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(lifeline, select.POLLHUP)
    if poll.poll(0):  # it was gone before
        sys.exit(1)


def serve(requests: BinaryIO, replies: BinaryIO, memory: int) -> None:
    """Answer one request after the other until standard input ends."""

    def say(message: dict[str, object], payload: Any = b"") -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.write(payload)
        replies.flush()

    say({"alive": True})
    while line := requests.readline():
        request = json.loads(line)
        try:
            import child_common

            child_common.start(memory, lambda: say({"alive": True}))
            module = importlib.import_module(MODULES[request["module"]])
            child_common.alive()
            result = getattr(module, request["call"])(**request["arguments"])
        except MemoryError:
            say({"memory": True})
        except Exception as error:  # whatever a library raises on a damaged file is the answer, and told in full
            reason = " ".join(str(error).split()) or type(error).__name__
            say({getattr(error, "reply", "failed"): reason[:500]})
        else:
            if not isinstance(result, dict):
                say({"result": {}, "bytes": result.nbytes}, result)
            elif len(json.dumps(result)) > _LONGEST_REPLY:
                say({"refused": f"describes itself in more than {_LONGEST_REPLY} bytes, it is damaged or made up"})
            else:
                say({"result": result, "bytes": 0})
            del result  # a block is not kept until the next one is there


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    limit_resources(int(sys.argv[1]))
    die_with_parent(int(sys.argv[2]))
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    serve(sys.stdin.buffer, answers, int(sys.argv[1]))
