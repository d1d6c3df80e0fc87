"""Finished pieces of a long job, one line of JSON each, so that an interrupted job goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdiffclip import __version__
from fastdiffclip.errors import UsageError
from fastdiffclip.files import replacing


class Journal:
    """Entries by key, each on disk before the next begins; a line that a kill cut short is dropped.

    Args:
        path: the file; None keeps the entries in memory alone.
        identity: what all entries depend on; it stands in the first line of the file, with what wrote them.
        number: of the entries' format, raised when results of the same identity change within a version.

    Raises:
        UsageError: the file was made with another identity, or by another version.
    """

    def __init__(self, path: Path | None, identity: str, number: int) -> None:
        self.path = path
        self.entries: dict[str, Any] = {}
        if path is None:
            return
        writer = {"fastdiffclip": __version__, "format": number}
        lines = _whole_lines(path) or [{**writer, "fingerprint": identity}]
        if {name: lines[0].get(name) for name in writer} != writer:
            raise UsageError(
                f"{path} was written by {_named(lines[0])}, and this is {_named(writer)}, whose figures may differ; "
                "go on with the version that began, or give another --out"
            )
        if lines[0].get("fingerprint") != identity:
            raise UsageError(
                f"{path} was made with other settings, scenes or pretraining; "
                "resume with the same, or give another --out"
            )
        with replacing(path) as temporary:  # anew, so that nothing is appended to a line that a kill cut short
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in lines), encoding="utf-8")
        self.entries = {line.pop("key"): line for line in lines[1:]}

    def add(self, key: str, entry: Mapping[str, Any]) -> None:
        """Keep a JSON-able entry."""
        self.entries[key] = entry
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **entry}) + "\n")


def _named(writer: Mapping[str, Any]) -> str:
    if "format" not in writer:
        return "an earlier state of fastdiffclip"
    return f"fastdiffclip {writer['fastdiffclip']} (format {writer['format']})"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break  # the line that a kill cut short
    return entries
