"""Damage files and read them, by hand: ``python -m tests.fuzz --cases 100000 --seed 1 --out fuzz.json``.

``--case N`` runs one case again and prints what was said. Exit code 1 where there are findings.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .corpus import entries
from .harness import Answer, Report, fuzz

LIBRARIES = ("numpy", "scipy", "h5py", "rasterio", "zarr", "pyogrio", "shapely", "laspy")
PROGRESS_S = 5.0


def main() -> int:
    """Run the cases that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="how many damaged files (10000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first one (0)")
    parser.add_argument("--case", type=int, help="run this one alone and print what was said")
    parser.add_argument("--only", help="names of inputs, comma-separated")
    parser.add_argument("--seed", type=int, default=1, help="seed of the damage (1)")
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")
    parser.add_argument("--out", type=Path, help="JSON file with figures and findings")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="folder for inputs of findings")
    options = parser.parse_args()
    cases = chosen(options.first, options.cases, options.only) if options.case is None else [options.case]
    report = fuzz(options.seed, cases, options.keep, options.workers, progress(len(cases), options.case is not None))
    print(file=sys.stderr)
    summary = report.to_dict() | {"machine": machine()}
    if options.out:
        options.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    for finding in report.findings:
        print(f"case {finding['case']} ({finding['entry']}): {finding['outcome']}\n{finding['said']}\n")
    print(f"{report.cases} cases in {report.seconds:.0f} s: {summary['outcomes']}, {len(report.findings)} findings")
    return 1 if report.findings else 0


def chosen(first: int, count: int, only: str | None) -> Sequence[int]:
    """Return the numbers of the cases: consecutive ones, or of the named inputs alone."""
    if only is None:
        return range(first, first + count)
    names = [entry.name for entry in entries()]
    wanted = [names.index(name) for name in only.split(",")]
    return [first + turn * len(names) + place for turn in range(-(-count // len(wanted))) for place in wanted][:count]


def progress(total: int, talk: bool) -> Any:
    """Show a line about every five seconds."""
    last = 0.0

    def show(report: Report, answer: Answer) -> None:
        nonlocal last
        if talk:
            print(f"{answer['entry']}: {answer['outcome']} in {answer['seconds']:.2f} s\n{answer['said']}")
        if time.monotonic() - last > PROGRESS_S:
            last = time.monotonic()
            print(
                f"\r{report.cases} of {total} cases, {report.cases / max(report.seconds, 1e-3):.0f} a second, "
                f"{len(report.findings)} findings, {report.peak_mib} MiB",
                end="", file=sys.stderr, flush=True,
            )  # fmt: skip

    return show


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    found = {name: version(name) for name in LIBRARIES}
    return {"system": platform.platform(), "python": platform.python_version(), "libraries": found}


if __name__ == "__main__":
    sys.exit(main())
