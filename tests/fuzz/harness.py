"""Runs cases in worker processes and watches them: what crashes, hangs, needs too much or leaves something behind."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
HANG_S = 10.0  # of processor time, the worker's and its children's: wall time says little on a busy machine
WALL_S = 120.0
FINE = ("read", "refused")
_POLL_S = 0.5
_SAID = 3000

Answer = dict[str, Any]


@dataclass
class Report:
    """What happened to the cases: outcomes by kind of input, every finding, and how much memory a worker took."""

    seed: int
    cases: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    peak_mib: int = 0
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    spent: Counter[str] = field(default_factory=Counter)
    findings: list[Answer] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        """Enter one answer."""
        self.cases += 1
        self.slowest_s = max(self.slowest_s, answer["seconds"])
        self.peak_mib = max(self.peak_mib, answer["peak_mib"])
        self.outcomes.setdefault(answer["entry"], Counter())[answer["outcome"]] += 1
        self.spent[answer["entry"]] += answer["seconds"]
        if answer["outcome"] not in FINE:
            self.findings.append({**answer, "said": answer["said"][-_SAID:]})

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds."""
        total: Counter[str] = sum(self.outcomes.values(), Counter())
        return {
            "seed": self.seed,
            "cases": self.cases,
            "seconds": round(self.seconds, 1),
            "slowest_s": round(self.slowest_s, 2),
            "peak_mib": self.peak_mib,
            "outcomes": dict(total),
            "by_input": {
                name: {**counts, "mean_ms": round(1e3 * self.spent[name] / sum(counts.values()), 1)}
                for name, counts in sorted(self.outcomes.items())
            },
            "findings": sorted(self.findings, key=lambda answer: answer["case"]),
        }


class Worker:
    """A worker process; it is started anew after it died or was killed."""

    def __init__(self, seed: int, folder: Path, keep: Path) -> None:
        self.seed, self.folder, self.keep = seed, folder, keep
        self.log = folder.parent / f"{folder.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, case: int) -> Answer:
        """Run one case; what kills the worker is an outcome too."""
        process = self._ready()
        assert process.stdin and process.stdout
        began, used = time.monotonic(), self._processor_time()
        process.stdin.write(f"{case}\n".encode())
        process.stdin.flush()
        while not select.select([process.stdout], [], [], _POLL_S)[0]:
            seconds = time.monotonic() - began
            spent = self._processor_time() - used
            if spent > HANG_S or seconds > WALL_S:
                said = f"{spent:.1f} s of processor time, {seconds:.1f} s in all"
                self.stop()
                return self._lost(case, "hang", said, seconds)
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            status = process.wait()
            self.stop()
            end = signal.Signals(-status).name if status < 0 else str(status)
            said = f"the worker ended with {end}: {self.log.read_text(errors='replace')[-_SAID:]}"
            return self._lost(case, "died", said, time.monotonic() - began)
        answer: Answer = json.loads(line)
        return answer

    def stop(self) -> None:
        """Kill the worker and what it started."""
        process, self._process = self._process, None
        if process is not None:
            for child in (*_children(process.pid), process):
                child.kill()
            process.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _ready(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self.folder.mkdir(parents=True)
            command = [sys.executable, "-m", f"{__package__}.worker", str(self.seed), str(self.folder), str(self.keep)]
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
                )  # fmt: skip
        return self._process

    def _processor_time(self) -> float:
        assert self._process is not None
        total = 0.0
        for process in (psutil.Process(self._process.pid), *_children(self._process.pid)):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system + times.children_user + times.children_system
        return total

    def _lost(self, case: int, outcome: str, said: str, seconds: float) -> Answer:
        """The answer of a worker that gave none; the input is written anew for whoever looks into it."""
        from .worker import corpus, damaged, write

        with tempfile.TemporaryDirectory() as folder:
            entry, files = damaged(corpus(Path(folder)), self.seed, case)
        write(files, self.keep / f"{case}-{entry.name}")
        return {"case": case, "entry": entry.name, "outcome": outcome, "said": said, "seconds": seconds, "peak_mib": 0}


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def fuzz(
    seed: int,
    cases: Sequence[int],
    keep: Path,
    workers: int = 1,
    on_answer: Callable[[Report, Answer], None] = lambda report, answer: None,
) -> Report:
    """Run ``cases`` of ``seed``; inputs of findings are kept in ``keep``, in folders named by case and entry.

    Ctrl-C ends it after the cases at hand, with a report of those that ran.
    """
    report, numbers, lock, began = Report(seed), iter(cases), threading.Lock(), time.monotonic()
    stopping = threading.Event()
    keep.mkdir(parents=True, exist_ok=True)
    problems: list[BaseException] = []

    def work(worker: Worker) -> None:
        try:
            for case in _shared(numbers, lock, stopping):
                answer = worker.run(case)
                with lock:
                    report.add(answer)
                    report.seconds = time.monotonic() - began
                    on_answer(report, answer)
        except BaseException as error:
            problems.append(error)
        finally:
            worker.stop()

    with tempfile.TemporaryDirectory(prefix="fastdiffclip-fuzz-") as folder:
        threads = [
            threading.Thread(target=work, args=(Worker(seed, Path(folder, f"worker{n}"), keep),))
            for n in range(workers)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            stopping.set()
            for thread in threads:
                if thread.is_alive():
                    thread.join()
    if problems:
        raise problems[0]
    return report


def _shared(numbers: Iterator[int], lock: threading.Lock, stopping: threading.Event) -> Iterator[int]:
    while not stopping.is_set():
        with lock:
            case = next(numbers, None)
        if case is None:
            return
        yield case
