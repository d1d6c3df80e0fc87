"""One table as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdiffclip.files import replacing


def markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A Markdown table under its title, notes below."""
    lines = [f"**{title}**", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *[f"{note}  " for note in notes]]) + "\n"


def write_tables(
    folder: Path,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    summary: Mapping[str, Any],
    stem: str | None = None,
) -> list[Path]:
    """Write ``table.md``, ``table.csv`` and ``results.json``, or all three under ``stem``; returns their paths."""
    table, results = stem or "table", stem or "results"
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    contents = {
        f"{table}.md": markdown(title, columns, rows, summary.get("notes", ())),
        f"{table}.csv": text.getvalue(),
        f"{results}.json": json.dumps(summary, indent=2, ensure_ascii=False) + "\n",
    }
    for name, content in contents.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return [folder / name for name in contents]
