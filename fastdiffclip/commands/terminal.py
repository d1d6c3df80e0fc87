"""What a person sees: progress on stderr, tables and sentences on stdout."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fastdiffclip.runtime import Progress, silent

WIDE = 200  # columns of a table that goes to a file or a pipe
INDENT, GAP = 2, 3  # of tables, and blanks between their columns, where there is room
REFRESH_SECONDS = 0.1


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Progress bars on stderr, one per task; none when stderr is not a terminal, and of several processes one's."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    note = TextColumn(
        "{task.fields[note]}", style="dim", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
    )
    bars = Bars(
        TextColumn("{task.description:<10}", markup=False), BarColumn(24), MofNCompleteColumn(),
        TimeRemainingColumn(compact=True), note, console=Console(stderr=True), transient=True,
        redirect_stdout=sys.stdout.isatty(),  # lines for a pipe or a file stay out of the terminal
    )  # fmt: skip
    tasks: dict[str, Any] = {}
    shown: dict[str, float] = {}

    def show(task: str, done: int, total: int, note: str = "") -> None:
        if task not in tasks:
            tasks[task] = bars.add_task(task, total=total, note=note)
        elif done < total and time.monotonic() - shown[task] < REFRESH_SECONDS:
            return
        shown[task] = time.monotonic()
        bars.update(tasks[task], completed=done, total=total, note=note)
        if done >= total:
            bars.remove_task(tasks.pop(task))

    with bars:
        yield show


def say(text: str = "") -> None:
    """One line on stdout, at once; in a terminal it breaks between words and keeps its indent."""
    print(_wrapped(text, " " * (len(text) - len(text.lstrip())), sys.stdout), flush=True)


def facts(pairs: Mapping[str, str]) -> None:
    """Aligned names and values on stdout."""
    wide = max(map(len, pairs))
    for name, value in pairs.items():
        print(_wrapped(f"  {name:<{wide}}  {value}", " " * (wide + 4), sys.stdout), flush=True)


def complain(text: str) -> None:
    """One sentence on stderr."""
    print(_wrapped(text, "", sys.stderr), file=sys.stderr, flush=True)


def _wrapped(text: str, indent: str, stream: TextIO) -> str:
    if not stream.isatty() or "\n" in text:
        return text
    width = shutil.get_terminal_size().columns
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def say_json(value: Mapping[str, Any]) -> None:
    """One JSON object on one line; what JSON has no number for (NaN, infinity) is null."""
    print(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False), flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: int = 1) -> None:
    """A table on stdout; columns from ``right`` on are aligned to the right.

    Where the terminal is too narrow they stand in several tables below each other, the first columns in each.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    width = (shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE) - INDENT
    console = Console(width=width, markup=False, highlight=False, emoji=False, no_color=True)
    wide = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    parts = _columns_that_fit(wide, right, width)
    longest = max(sum(wide[place] for place in part) + GAP * (len(part) - 1) for part in parts)
    most = max(len(part) for part in parts) - 1
    gap = max(1, min(GAP, GAP - -(-(longest - width) // max(1, most))))
    say(title)
    for part in parts:
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, gap // 2, 0, (gap - 1) // 2))
        for place in part:
            grid.add_column(columns[place], justify="right" if place >= right else "left", overflow="fold")
        for row in rows:
            grid.add_row(*(row[place] for place in part))
        with console.capture() as drawn:
            console.print(grid)
        lines = [line.rstrip() for line in drawn.get().splitlines()]
        print("\n".join(" " * INDENT + line if line else "" for line in lines), end="\n\n", flush=True)


def _columns_that_fit(wide: Sequence[int], right: int, width: int) -> list[list[int]]:
    """Columns of each part of a table whose columns are ``wide``; one part where splitting would not help."""
    first, parts = list(range(right)), [list(range(right))]
    for place in range(right, len(wide)):
        if sum(wide[other] + 1 for other in parts[-1]) + wide[place] > width and len(parts[-1]) > right:
            parts.append([*first])
        parts[-1].append(place)
    fits = all(sum(wide[place] + 1 for place in part) - 1 <= width for part in parts)
    return parts if fits else [list(range(len(wide)))]


def size(count: int) -> str:
    """Bytes as a person reads them."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min((max(count, 1).bit_length() - 1) // 10, len(units) - 1)
    return f"{count} bytes" if power == 0 else f"{count / 1024**power:.1f} {units[power]}"


def figure(mean: float, deviation: float | None) -> str:
    """``72.1 ± 3.4``, or the mean alone where a single run has no spread."""
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"
