"""One numbering of classes for label maps that know them by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.labels import LARGEST_VALUE, LabelMap
from fastdiffclip.scene.store import ClassInfo


def numbered(maps: Sequence[LabelMap], given: Sequence[ClassInfo] | None) -> tuple[list[LabelMap], list[str]]:
    """Give the classes that maps know by name one value each, in all maps; returns the maps and warnings.

    With a class table its values count: names are compared without regard to case, separators and the order of
    words; where those of a file that lists its classes are other words, and as many as the table has rows, they go
    by their place. Without a table the values are those of a raster that names its classes, else places among the
    names of all maps: alphabetical, or as a file lists them. Raises InputDataError where names stay unknown.
    """
    if all(one.numbering == "values" for one in maps):
        return list(maps), []
    if given is not None:
        tables = [_values_in_table(one, given) if one.numbering != "values" else ({}, []) for one in maps]
        notes = list(dict.fromkeys(note for _, found in tables for note in found))
        return [_renumbered(one, table) for one, (table, _) in zip(maps, tables, strict=True)], notes
    values = _common_values(maps)
    return [_renumbered(one, values) for one in maps], []


def _renumbered(one: LabelMap, values: dict[str, int]) -> LabelMap:
    if one.numbering == "values":
        return one
    lookup = np.zeros(LARGEST_VALUE + 1, np.uint16)
    for code, name in one.class_names.items():
        lookup[code] = values[name]
    return replace(
        one,
        values=lookup[one.values],
        class_names={values[name]: name for name in one.class_names.values()},
        class_colours={values[one.class_names[code]]: colour for code, colour in one.class_colours.items()},
        numbering="values",
    )


def _common_values(maps: Sequence[LabelMap]) -> dict[str, int]:
    """Number the names of all maps, beginning with the values that rasters give them."""
    rasters = [one for one in maps if one.numbering == "values"]
    named = [one for one in maps if one.numbering != "values"]
    for one in rasters:
        if not set(np.unique(one.values).tolist()) - {0} <= one.class_names.keys():
            raise InputDataError(
                f"{one.path} has numbers for classes and {named[0].path} names: say which belong together, with "
                "--classes FILE"
            )
    values = {name: value for one in rasters for value, name in one.class_names.items()}
    names = list(dict.fromkeys(name for one in named for name in one.class_names.values()))
    if all(one.numbering == "sorted" for one in named):
        names.sort()
    free = max(values.values(), default=0)
    for name in names:
        if name not in values:
            free += 1
            values[name] = free
    if free > LARGEST_VALUE:
        raise InputDataError(f"{named[0].path} and the other label files name more than {LARGEST_VALUE} classes")
    return values


def _values_in_table(one: LabelMap, given: Sequence[ClassInfo]) -> tuple[dict[str, int], list[str]]:
    """Return the table's value of each name of a map, and what to tell the user."""
    exact = {info.name: info.value for info in given}
    loose: dict[str, set[int]] = {}
    for info in given:
        loose.setdefault(_words(info.name), set()).add(info.value)
    found: dict[str, int] = {}
    for name in one.class_names.values():
        candidates = {exact[name]} if name in exact else loose.get(_words(name), set())
        if len(candidates) == 1:
            found[name] = next(iter(candidates))
    unknown = [name for name in one.class_names.values() if name not in found]
    if not unknown:
        return found, []
    by_place = {name: info.value for name, info in zip(one.class_names.values(), given, strict=False)}
    fits = len(one.class_names) == len(given) and all(by_place[name] == value for name, value in found.items())
    if one.numbering == "listed" and fits:
        pairs = ", ".join(f"{name} = {info.name}" for name, info in zip(by_place, given, strict=True))
        return by_place, [f"the regions are taken in the order of the class table: {pairs}"]
    raise InputDataError(
        f"the class table has no row for {', '.join(repr(name) for name in unknown[:10])}, as {one.path} calls its "
        f"classes; it has {', '.join(info.name for info in given)}: name them alike"
    )


def _words(name: str) -> str:
    return " ".join(sorted(re.findall(r"[^\W_]+", name.casefold())))
