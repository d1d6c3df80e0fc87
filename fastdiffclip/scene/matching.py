"""Which files make up which scene, when globs name several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers import expand


@dataclass(frozen=True)
class InputFile:
    """One variable of one file; ``shared`` where several scenes take their part of it."""

    path: Path
    variable: str | None
    shared: bool = False


@dataclass(frozen=True)
class SceneFiles:
    """The files of one scene by their role; ``stem`` is that of its first modality's file."""

    stem: str
    files: dict[str, InputFile]


def match_scenes(
    specs: Mapping[str, str], may_be_shared: Callable[[Path], bool] = lambda path: False
) -> tuple[list[SceneFiles], list[str]]:
    """Return one SceneFiles per file of the first spec, and warnings about files that are not used.

    ``specs`` maps a role to ``FILE[:VARIABLE]``, FILE possibly a glob. Files go together by their stem;
    where no stem of two specs agrees and both have as many files, by natural order. A single file that
    ``may_be_shared`` belongs to every scene. Raises InputDataError that lists what did not match.
    """
    found = {role: expand(spec) for role, spec in specs.items()}
    leading = next(iter(found))
    first = found[leading][0]
    stems = [path.stem for path in first]
    repeated = sorted({stem for stem in stems if stems.count(stem) > 1})
    if repeated:
        raise InputDataError(
            f"{leading}: several files are called {', '.join(repeated)}, names must differ between scenes"
        )
    warnings: list[str] = []
    shared = {role for role, (paths, _) in found.items() if len(first) > len(paths) == 1 and may_be_shared(paths[0])}
    columns = {
        role: paths * len(first) if role in shared else _matched(leading, first, role, paths, warnings)
        for role, (paths, _) in found.items()
    }
    scenes = [
        SceneFiles(stem, {role: InputFile(columns[role][i], found[role][1], role in shared) for role in found})
        for i, stem in enumerate(stems)
    ]
    return scenes, warnings


def _matched(leading: str, first: list[Path], role: str, paths: list[Path], warnings: list[str]) -> list[Path]:
    by_stem = {path.stem: path for path in paths}
    shared = [path for path in first if path.stem in by_stem]
    if not shared and len(paths) == len(first):
        return paths
    if len(shared) == len(first) and len(by_stem) == len(paths):
        unused = sorted(set(by_stem) - {path.stem for path in first})
        if unused:
            warnings.append(
                f"{role}: {len(unused)} files belong to no {leading} file and are not used: {', '.join(unused)}"
            )
        return [by_stem[path.stem] for path in first]
    lonely = [path.stem for path in first if path.stem not in by_stem]
    extra = [path.stem for path in paths if path.stem not in {one.stem for one in first}]
    raise InputDataError(
        f"{role} has {len(paths)} files for {len(first)} of {leading}, and names do not match: "
        f"{leading} without {role}: {', '.join(lonely) or 'none'}; {role} without {leading}: "
        f"{', '.join(extra) or 'none'}"
    )
