"""Results as Markdown, as plots, and two of them side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdiffclip.errors import ResourceError

KEY = ("suite", "case", "impl", "mode", "device", "dtype", "shape")


def render(result: dict[str, Any]) -> str:
    """The result of :func:`fastdiffclip.bench.run` as Markdown."""
    if "comparison" in result:
        return _render_comparison(result)
    machine = result["machine"]
    parts = [
        f"{machine['device']}, {machine['processor']}, {machine['threads']} threads, "
        f"torch {machine['versions']['torch']}, commit {machine['commit'] or 'unknown'}, {result['date']}"
    ]
    if result["quick"]:
        parts.append("Tiny shapes and hardly any repeats (quick): these are no figures.")
    if "curves" in result:
        from fastdiffclip.bench.curve_plots import curve_table

        parts.append(f"### growth\n\n{curve_table(result)}")
    for suite in dict.fromkeys(row["suite"] for row in result["rows"]):
        parts.append(f"### {suite}\n\n" + markdown_table(
            ("case", "shape", "mode", "impl", "dtype", "median ms", "p20 to p80", "peak MiB", "x eager", "of floor"),
            [
                (r["case"], r["shape"], r["mode"], r["impl"], r["dtype"], number(r["median_ms"]),
                 f"{number(r['p20_ms'])} to {number(r['p80_ms'])}", number(r["peak_mb"]),
                 number(r["ratio_vs_eager"]),
                 "" if r["share_of_floor"] is None else f"{100 * r['share_of_floor']:.0f} %")
                for r in result["rows"] if r["suite"] == suite
            ],
        ))  # fmt: skip
    red = [v for v in result["gate"] if not v["green"]]
    parts.append(f"Correctness gate: {len(result['gate']) - len(red)} of {len(result['gate'])} green.")
    parts += [f"RED: {v['case']} {v['impl']} {v['dtype']}: {_why_red(v)}" for v in red]
    reasons = {(s["case"], s["impl"], s["dtype"], s["reason"]) for s in result["skipped"]}
    if reasons:
        parts.append("Not timed:\n" + "\n".join(f"- {c} {i} {d}: {why}" for c, i, d, why in sorted(reasons)))
    floors = ", ".join(f"{name} {rate / 1e9:.4g} G/s" for name, rate in result["floors"].items())
    parts.append(f"Measured rates: {floors or 'none'}.")
    return "\n\n".join(parts) + "\n"


def _why_red(verdict: dict[str, Any]) -> str:
    error = "no finite number" if verdict["error"] is None else f"{verdict['error']:.3g}"
    return verdict["note"] or f"error {error}, allowed {verdict['bound']:.3g}"


def compare_results(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Rows that both results have, with both medians and a / b (above 1: B is faster)."""
    known = {tuple(row[k] for k in KEY): row for row in a["rows"]}
    rows = []
    for row in b["rows"]:
        other = known.get(tuple(row[k] for k in KEY))
        if other is not None:
            rows.append({
                **{k: row[k] for k in KEY},
                "median_ms_a": other["median_ms"], "median_ms_b": row["median_ms"],
                "ratio": float(f"{other['median_ms'] / row['median_ms']:.4g}"),
                # Within each other's p20 to p80 the medians do not tell the two apart.
                "distinct": row["p20_ms"] > other["p80_ms"] or row["p80_ms"] < other["p20_ms"],
            })  # fmt: skip
    same = all(a["machine"].get(k) == b["machine"].get(k) for k in ("device", "processor", "threads"))
    return {
        "machine": b["machine"],
        "rows": rows,
        "comparison": {"a": a["machine"], "b": b["machine"], "same_machine": same},
    }


def _render_comparison(result: dict[str, Any]) -> str:
    sides = result["comparison"]
    lines = [f"{side.upper()}: {sides[side]['device']}, {sides[side]['processor']}, {sides[side]['threads']} threads, "
             f"commit {sides[side].get('commit') or 'unknown'}" for side in ("a", "b")]  # fmt: skip
    if not sides["same_machine"]:
        lines.append("The two ran on different machines, devices or numbers of threads.")
    table = markdown_table(
        ("case", "shape", "mode", "impl", "dtype", "A ms", "B ms", "A / B", ""),
        [
            (r["case"], r["shape"], r["mode"], r["impl"], r["dtype"], number(r["median_ms_a"]),
             number(r["median_ms_b"]), number(r["ratio"]), "" if r["distinct"] else "within noise")
            for r in result["rows"]
        ],
    )  # fmt: skip
    return "\n\n".join([*lines, table if result["rows"] else "The two have no row in common."]) + "\n"


def write_report(result: dict[str, Any], out: Path) -> list[Path]:
    """Write ``<device>-<suite>-<date>.json``, the same as ``.md``, and a plot per suite where matplotlib is there.

    ``out`` is a folder, or the JSON file itself when it ends in ``.json``. Raises :class:`ResourceError`.
    """
    target = out if out.suffix == ".json" else out / f"{file_stem(result)}.json"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        target.with_suffix(".md").write_text(render(result), encoding="utf-8")
        return [target, target.with_suffix(".md"), *_plots(result, target)]
    except OSError as error:
        raise ResourceError(f"the bench result {target} cannot be written: {error.strerror}") from None


def file_stem(result: dict[str, Any]) -> str:
    """``nvidia-h200-all-20260131-120000``."""
    device = re.sub(r"[^a-z0-9]+", "-", result["machine"]["device"].lower()).strip("-")
    return f"{device}-{result['suite']}-{re.sub(r'[-:Z]', '', result['date']).replace('T', '-')}"


def _plots(result: dict[str, Any], target: Path) -> list[Path]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return []
    if "curves" in result:
        from fastdiffclip.bench.curve_plots import plot_curves

        return plot_curves(result, target)
    files = []
    for suite in dict.fromkeys(row["suite"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["suite"] == suite and row["ratio_vs_eager"] is not None]
        if not rows:
            continue
        labels = [f"{r['case']} {r['shape']}\n{r['mode']} {r['dtype']} {r['impl']}" for r in rows]
        figure = Figure(figsize=(9, 1.2 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh(range(len(rows)), [r["ratio_vs_eager"] for r in rows], color="#3b6ea5")
        axes.bar_label(
            bars,
            [f"{r['ratio_vs_eager']:.3g}x, {number(r['median_ms'])} ms" for r in rows],
            padding=3,
            fontsize=7,
        )
        axes.set_yticks(range(len(rows)), labels, fontsize=7)
        axes.axvline(1.0, color="#888888", linewidth=0.8)
        axes.margins(x=0.25)
        axes.invert_yaxis()
        axes.set_xlabel("times as fast as eager torch")
        axes.set_title(f"{suite}: {result['machine']['device']}, {result['machine']['threads']} threads", fontsize=9)
        path = target.with_name(f"{target.stem}-{suite}.png")
        figure.savefig(path, dpi=120)
        files.append(path)
    return files


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are also aligned as text."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    ruler = ["-" * max(3, width) for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in (head, ruler, *rows)
    )


def number(value: float | None) -> str:
    """Four digits, as a cell of a table."""
    return "" if value is None else f"{value:.4g}" if value < 1e4 else f"{value:.0f}"
