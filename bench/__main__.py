"""``python -m bench`` from a checkout, ``python -m fastdiffclip.bench`` when installed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run, print; returns the exit code."""
    from fastdiffclip.bench.cases import CURVES, SUITES
    from fastdiffclip.bench.report import render
    from fastdiffclip.bench.runner import run
    from fastdiffclip.errors import FastDiffCLIPError

    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Times this machine; nothing that is wrong is timed."
    )
    parser.add_argument("--suite", default="kernels", help=f"{', '.join(SUITES)}, all of these, or {CURVES}")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all that this process may use")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, help="folder for JSON, Markdown and plots")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two JSON files; nothing is timed")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    given = parser.parse_args(arguments)
    compare = None if given.compare is None else (given.compare[0], given.compare[1])
    try:
        result = run(given.suite, given.threads, given.out, given.device, compare, given.quick, _show)
    except FastDiffCLIPError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(render(result))
    if given.json:
        print(json.dumps(result))
    return 1 if any(not verdict["green"] for verdict in result.get("gate", [])) else 0


def _show(task: str, done: int, total: int, note: str = "") -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{done}/{total} {note}", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
