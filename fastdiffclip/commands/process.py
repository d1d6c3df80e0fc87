"""A command as a process: signals become exceptions, exceptions become one sentence and an exit code."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer

from fastdiffclip.commands.terminal import complain
from fastdiffclip.errors import FastDiffCLIPError, InterruptedRunError, ResourceError

PROGRAM, DEBUG = "fastdiffclip", "--debug"
CLEAN, CONTINUE = "nothing was left half-written", "continue with --resume --out "


class Signalled(KeyboardInterrupt):
    """SIGINT or SIGTERM; no ``except Exception`` of a library swallows it."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.exit_code = 128 + number


def main(app: typer.Typer) -> int:
    """Run the command of ``sys.argv``; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup and the like stay in force
            signal.signal(number, _raise)
    if os.environ.get("RANK", "0") != "0":  # of several processes one speaks; errors are everybody's
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        code = run(app, sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `fastdiffclip ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except KeyboardInterrupt as stop:
        code = _interrupted(stop)
    finally:
        # The command is over: no signal may print a stack trace while the interpreter leaves.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    return code


def _raise(number: int, _: Any) -> None:
    raise Signalled(number)


def run(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run one command; an error of the user's, the machine's or ours ends in one sentence on stderr.

    Raises:
        BrokenPipeError: nobody reads stdout any more.
    """
    debug = DEBUG in arguments
    logging.basicConfig(format="%(message)s")
    logging.getLogger(PROGRAM).setLevel(logging.DEBUG if debug else logging.WARNING)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING if debug else logging.ERROR)
    try:
        command = typer.main.get_command(app)
        with command.make_context(PROGRAM, [text for text in arguments if text != DEBUG]) as context:
            command.invoke(context)
    except typer.Exit as done:
        return int(done.exit_code)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as stop:
        return _interrupted(stop)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _failed(error)
    return 0


def _interrupted(stop: KeyboardInterrupt) -> int:
    code = stop.exit_code if isinstance(stop, Signalled) else 128 + signal.SIGINT
    complain(f"{_word(code)}; {CLEAN}")
    return code


def _failed(error: Exception) -> int:
    """Say what went wrong; returns the exit code."""
    code, sentence = _sentence(error)
    if sentence:
        complain(sentence if isinstance(error, InterruptedRunError) else f"error: {sentence}")
    return code


def _sentence(error: Exception) -> tuple[int, str]:
    if isinstance(error, FastDiffCLIPError):
        return error.exit_code, str(error)
    if isinstance(error, typer.BadParameter.__bases__):  # click's usage errors, wherever typer keeps click
        return _usage(error)
    if isinstance(error, MemoryError) or _out_of_memory(error):
        return 4, "there is not enough memory; give a smaller --set umd.batch, --set flc.batch or --set memory_gib"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 4, f"the disk is full{_at(error)}; make room, or choose another --out"
    if isinstance(error, OSError) and error.strerror:
        return 4, f"{error.strerror}{_at(error)}; check the path, its rights and the disk"
    return 1, (
        f"this is a fault of {PROGRAM} itself: {type(error).__name__}: {error}; "
        f"run the command again with {DEBUG} and report what it prints"
    )


def _usage(error: Any) -> tuple[int, str]:
    """What was wrong in the command line, and where its help is; the help itself where a sub-command is missing."""
    message = error.format_message().strip().rstrip(".")
    if not message or type(error).__name__ == "NoArgsIsHelpError":
        if message:
            print(message)
        return int(error.exit_code), ""
    path = error.ctx.command_path if error.ctx else PROGRAM
    end = "" if message.endswith("?") else ";"
    return int(error.exit_code), f"{message[0].lower()}{message[1:]}{end} see '{path} --help'"


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    full = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return full or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _at(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""


@contextmanager
def keeping(stage: str, folder: Path, resumable: bool = True) -> Iterator[None]:
    """Say what an interrupted command left in its folder; of folders made for it, empty ones are removed.

    A stage inside of the command knows its own folder alone: where it says how to go on, the command's takes its place.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    left = f"{CONTINUE}{folder}" if resumable else f"what was finished lies in {folder}"
    try:
        yield
    except (KeyboardInterrupt, InterruptedRunError) as stop:
        _remove_empty(made)
        if str(stop).endswith(f"{CONTINUE}{folder}"):
            raise
        if not folder.is_dir() or not any(folder.iterdir()):
            left = CLEAN
        code = getattr(stop, "exit_code", 128 + signal.SIGINT)
        raise InterruptedRunError(f"{stage} was {_word(code)}; {left}", code) from None
    except ResourceError as error:
        _remove_empty(made)
        said, found, _ = str(error).partition(f", then {CONTINUE}")
        if not found:
            raise
        raise ResourceError(f"{said}{', then' if resumable else ';'} {left}") from None
    except BaseException:
        _remove_empty(made)
        raise


def _word(exit_code: int) -> str:
    return "terminated" if exit_code == 128 + signal.SIGTERM else "interrupted"


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it holds something, or never came to be
            folder.rmdir()
