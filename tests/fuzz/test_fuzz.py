"""The fuzz harness, with a fixed seed: damaged files of every kind end in success or one of our errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from . import worker as worker_module
from .corpus import Entry, entries
from .harness import ROOT, Report, Worker, fuzz
from .mutations import BINARY, TEXT, is_text, mutate
from .worker import damaged, judge

ANSWER = {"entry": "npy", "outcome": "read", "said": "", "seconds": 0.5, "peak_mib": 90}
SEED, CASES = 20_130, 1_000  # well under a minute of one core


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_whole_files_are_read(entry: Entry, tmp_path: Path) -> None:
    entry.write(tmp_path / entry.main)
    entry.read(tmp_path / entry.main)


def test_damaged_files_of_every_kind(tmp_path: Path) -> None:
    report = fuzz(SEED, range(CASES), tmp_path / "kept")
    again = f"python -m tests.fuzz --seed {SEED} --case"
    said = "\n".join(f"{f['entry']}: {f['outcome']}, {again} {f['case']}\n{f['said']}" for f in report.findings)
    assert not report.findings, said
    assert report.cases == CASES and set(report.outcomes) == {entry.name for entry in entries()}
    for name, outcomes in report.outcomes.items():  # the damage is neither harmless nor always fatal at the first byte
        assert outcomes["refused"] > 0 and outcomes["refused"] + outcomes["read"] == sum(outcomes.values()), name
    json.dumps(report.to_dict())


def test_a_case_is_the_same_again(tmp_path: Path) -> None:
    known = [
        (entry, {f"{name}.bin": bytes(range(i, i + 200)) for name in "abc"}) for i, entry in enumerate(entries()[:3])
    ]
    for case in range(60):
        entry, files = damaged(known, 3, case)
        assert (entry.name, files) == (known[case % 3][0].name, damaged(known, 3, case)[1])
        assert files != known[case % 3][1] or mutate(b"", [], np.random.default_rng(0)) == b""
    assert any(damaged(known, 3, case)[1] != damaged(known, 4, case)[1] for case in range(9))


@pytest.mark.parametrize("kind", [*BINARY, *TEXT], ids=lambda kind: kind.__name__)
def test_every_kind_of_damage(kind: object) -> None:
    assert callable(kind)
    for data in (b"x", b"samples = 12\nlines = 3\n", bytes(range(256)) * 9):
        made = {kind(data, np.random.default_rng(seed)) for seed in range(30)}
        assert all(isinstance(part, bytes) for part in made)
        assert len(data) < 20 or len(made - {data}) > 3


def test_text_is_told_from_bytes() -> None:
    assert (
        is_text(("ENVI\nlines = 3" * 9 + " \u00e4\n").encode())
        and not is_text(b"\x93NUMPY\x01\x00v\x00{")
        and is_text(b"")
    )


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (lambda path: None, "read"),
        (lambda path: (_ for _ in ()).throw(ValueError("no")), "crash"),
        (lambda path: np.empty(2**62, np.uint8), "memory"),
        (lambda path: np.sqrt(np.array([-1.0])), "crash"),  # a warning is one
        (lambda path: worker_module.open_raster(path), "refused"),
    ],
)
def test_outcomes(read: object, outcome: str, tmp_path: Path) -> None:
    entry = Entry("made", "a.npy", lambda path: None, read)  # type: ignore[arg-type]
    assert judge(entry, tmp_path, 0)[0] == outcome


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Worker:
    """A worker that runs a program of ours: one that hangs, dies or answers, by the number of the case."""
    program = tmp_path / "staged.py"
    program.write_text(
        "import json, os, signal, sys\n"
        "for line in sys.stdin:\n"
        "    case = int(line)\n"
        "    while case == 1: pass\n"
        "    if case == 2: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    answer = dict(case=case, entry='x', outcome='read', said='', seconds=0.0, peak_mib=1)\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    plain = subprocess.Popen

    def start(command: list[str], **options: object) -> object:
        return plain([sys.executable, str(program)], **options)  # type: ignore[call-overload]

    monkeypatch.setattr("subprocess.Popen", start)
    monkeypatch.setattr(f"{Worker.__module__}.HANG_S", 0.5)
    return Worker(SEED, tmp_path / "work", tmp_path / "keep")


def test_what_hangs_or_dies_is_found(staged: Worker, tmp_path: Path) -> None:
    outcomes = [staged.run(case)["outcome"] for case in (0, 1, 2, 3)]
    staged.stop()
    assert outcomes == ["read", "hang", "died", "read"] and not (tmp_path / "work").exists()
    kept = sorted(path.name for path in (tmp_path / "keep").iterdir())
    assert kept == [f"1-{entries()[1].name}", f"2-{entries()[2].name}"]


def test_an_interrupt_ends_it_with_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Worker, "run", lambda self, case: dict(ANSWER, case=case))

    def interrupt(report: Report, answer: object) -> None:
        if report.cases == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a run in the background ignores
    try:
        report = fuzz(1, range(10**6), tmp_path / "keep", on_answer=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert 3 <= report.cases < 10**6 and not report.findings


def test_by_hand(tmp_path: Path) -> None:
    began = time.monotonic()
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "6", "--seed", "2", "--out", str(tmp_path / "fuzz.json")]
    done = subprocess.run(
        [*command, "--keep", str(tmp_path / "kept")], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "fuzz.json").read_text())
    assert summary["cases"] == 6 and summary["findings"] == [] and summary["seconds"] <= time.monotonic() - began
    assert "6 cases in" in done.stdout and set(summary["machine"]) == {"system", "python", "libraries"}


def test_findings_are_counted() -> None:
    report = Report(1)
    report.add(dict(ANSWER, case=4))
    report.add({"case": 3, "entry": "npy", "outcome": "crash", "said": "x" * 9999, "seconds": 0.1, "peak_mib": 80})
    summary = report.to_dict()
    assert summary["outcomes"] == {"read": 1, "crash": 1} and summary["peak_mib"] == 90 and summary["slowest_s"] == 0.5
    assert [f["case"] for f in summary["findings"]] == [3] and len(summary["findings"][0]["said"]) == 3000
