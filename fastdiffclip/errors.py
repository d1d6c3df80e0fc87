"""Errors a user can act on. Each carries the exit code the command line ends with.

A message is one sentence or two: what is wrong, where, what was expected, what to do.
"""

from __future__ import annotations

_LONGEST = 2000  # characters


class FastDiffCLIPError(Exception):
    """Base of every error that is the user's to mend; anything else is a bug of ours."""

    exit_code = 1

    def __str__(self) -> str:
        """The message on one line of bounded length, without characters that a terminal would act on.

        Messages quote file names and contents, and these may hold anything.
        """
        text = super().__str__()
        if not text.isprintable():
            text = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


class UsageError(FastDiffCLIPError):
    """The command or call asks for something that does not exist or does not go together."""

    exit_code = 2


class InputDataError(FastDiffCLIPError):
    """A file, scene, label map or model cannot be used as it is."""

    exit_code = 3


class ResourceError(FastDiffCLIPError):
    """Memory, disk or device is missing or too small."""

    exit_code = 4


class InterruptedRunError(FastDiffCLIPError):
    """A signal ended the run; exit code 130 (SIGINT) or 143 (SIGTERM)."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name closest to ``name``, or ``""``."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
