"""What a person sees: progress on stderr, tables and sentences on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastdiffclip.runtime import Progress, silent


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Progress bars on stderr, one per task; none when stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    bars = Bars(
        TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim"), console=Console(stderr=True), transient=True,
    )  # fmt: skip
    tasks: dict[str, Any] = {}
    shown: dict[str, float] = {}

    def show(task: str, done: int, total: int, note: str = "") -> None:
        if task not in tasks:
            tasks[task] = bars.add_task(task, total=total, note=note)
        elif done < total and time.monotonic() - shown[task] < 0.1:
            return
        shown[task] = time.monotonic()
        bars.update(tasks[task], completed=done, total=total, note=note)
        if done >= total:
            bars.remove_task(tasks.pop(task))

    with bars:
        yield show


def say(text: str = "") -> None:
    """One line on stdout, at once."""
    print(text, flush=True)


def say_json(value: Mapping[str, Any]) -> None:
    """One JSON object on one line."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False, default=str), flush=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: int = 1) -> None:
    """A table on stdout; columns from ``right`` on are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        grid.add_column(column, justify="right" if number >= right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console = Console()
    console.print(grid if console.is_terminal else grid, markup=False) if console.width >= 80 else Console(
        width=100
    ).print(grid)


def figure(mean: float, deviation: float | None) -> str:
    """``72.1 ± 3.4``, or the mean alone where a single run has no spread."""
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"
