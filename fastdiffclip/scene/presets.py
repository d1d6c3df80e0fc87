"""Presets of ``ingest``: the well-known scenes, in the files in which people have them.

What each scene's files and variables are called is data, ``configs/presets/<name>.yaml``; classes, their descriptions
and colours are those of the shipped prompt set. Here is how the files are found and what goes together: all modalities
and label maps have one height and width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import yaml

from fastdiffclip.errors import InputDataError, UsageError, nearest
from fastdiffclip.files import config_text
from fastdiffclip.scene.ingest import IngestReport, IngestRequest, Progress, ingest
from fastdiffclip.scene.mrnet import MrnetLayout, ingest_mrnet
from fastdiffclip.scene.readers import open_raster
from fastdiffclip.scene.store import ClassInfo

MRNET = "mrnet"
PRESETS = ("houston2013", "trento", "muufl", MRNET)
REQUIRED = ("hsi", "lidar")
OFFICIAL = ("train", "test")
RASTERS = (".mat", ".tif", ".tiff", ".npy", ".npz")
REGIONS = (".txt", ".roi")  # ENVI's regions of interest as text; beside it people keep ENVI's own binary .roi
_ASKS = "say which variable"  # how a reader's error begins to, where a file holds several rasters
_DEEPEST, _MOST_FILES, _SHOWN = 4, 20_000, 12
_CUT_OUT = ("_trset", "_teset", "hsi_tr.", "hsi_te.", "lidar_tr.", "lidar_te.", "patch")


@dataclass(frozen=True)
class Role:
    """What plays one part of a scene: file names without suffix, each with its variable or None."""

    name: str
    files: tuple[tuple[str, str | None], ...]
    variables: tuple[str, ...] = ()
    least_bands: int = 1
    most_bands: int = 1


@dataclass(frozen=True)
class Preset:
    """One shipped scene: its roles, and what its label maps hold where nothing is labelled, beside 0."""

    name: str
    title: str
    size: tuple[int, int]
    classes: tuple[ClassInfo, ...]
    roles: dict[str, Role]
    unlabelled: float | None


@dataclass(frozen=True)
class _Found:
    """A file, the variable to read or None, and (height, width, bands), which regions of interest do not have."""

    path: Path
    variable: str | None
    shape: tuple[int, int, int] | None

    @property
    def spec(self) -> str:
        return f"{self.path}:{self.variable}" if self.variable else str(self.path)


def ingest_preset(
    name: str,
    folder: Path | str,
    out: Path | str,
    *,
    options: Mapping[str, str] | None = None,
    scene_name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> IngestReport:
    """Find the files of a well-known data set in ``folder`` and ingest them.

    ``houston2013``, ``trento`` and ``muufl`` become one scene; ``mrnet`` a folder of scenes, one per exam, and takes
    the options ``task`` (abnormal, acl or meniscus; needed), ``window``, ``slices`` and ``block``. Raises UsageError
    for an unknown preset or option, InputDataError that lists what was looked for and what is there, and what
    :func:`~fastdiffclip.scene.ingest.ingest` raises.
    """
    options, folder = dict(options or {}), Path(folder)
    if name not in PRESETS:
        raise UsageError(f"there is no preset '{name}'{nearest(name, PRESETS)}: choose one of {', '.join(PRESETS)}")
    if name == MRNET:
        if scene_name is not None:
            raise UsageError("a name fits one scene, and mrnet makes one per exam: leave it out")
        return _ingest_mrnet(folder, Path(out), options, overwrite, progress)
    if options:
        raise UsageError(f"the preset '{name}' takes no option, got {', '.join(options)}; mrnet does")
    request, notes = preset_request(name, folder, out, scene_name=scene_name, overwrite=overwrite)
    report = ingest(request, progress)
    return IngestReport(report.scenes, [*notes, *report.warnings], report.lines)


def preset_request(
    name: str, folder: Path | str, out: Path | str, *, scene_name: str | None = None, overwrite: bool = False
) -> tuple[IngestRequest, list[str]]:
    """Return what ``ingest`` reads for a scene preset, and notes on files that are there and not used."""
    preset, folder = load_preset(name), Path(folder)
    files = files_below(folder)
    chosen, notes = _choose(preset, folder, files)
    labels = [key for key in ("labels", *OFFICIAL) if key in chosen]
    missing = [key for key in REQUIRED if key not in chosen]
    missing += [] if labels in (["labels"], list(OFFICIAL)) else [key for key in OFFICIAL if key not in chosen]
    if missing:
        raise _missing(preset, folder, files, missing)
    notes += _check_planes(preset, {key: chosen[key] for key in (*REQUIRED, *labels)})
    nodata = {key: preset.unlabelled for key in labels if preset.unlabelled is not None}
    request = IngestRequest(
        [(key, chosen[key].spec) for key in REQUIRED],
        out,
        labels=[(key, chosen[key].spec) for key in labels],
        classes=preset.classes,
        nodata=nodata or None,
        name=scene_name,
        overwrite=overwrite,
    )
    return request, notes


def load_preset(name: str) -> Preset:
    """Read a shipped scene preset."""
    data = _read(f"presets/{name}.yaml")
    rows = _read(f"prompts/{data['prompts']}.yaml")["classes"]
    classes = tuple(
        ClassInfo(row["value"], row["name"], " ".join(row["description"].split()), _rgb(row["colour"])) for row in rows
    )
    roles = {key: _role(key, entry) for key, entry in data["roles"].items()}
    height, width = data["size"]
    return Preset(name, data["title"], (height, width), classes, roles, data.get("unlabelled"))


def _role(name: str, entry: Mapping[str, Any]) -> Role:
    files: list[tuple[str, str | None]] = []
    for item in entry["files"]:
        files += item.items() if isinstance(item, dict) else [(item, None)]
    least = entry.get("least_bands", 1)
    most = entry.get("most_bands", 1 if least == 1 else 2**31)
    return Role(name, tuple(files), tuple(entry.get("variables", ())), least, most)


def _read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(config_text(name))
    return document


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue


def files_below(folder: Path) -> list[Path]:
    """Return the files in ``folder`` and its subfolders, at most 4 deep; links to folders are not followed."""
    if not folder.is_dir():
        raise InputDataError(f"there is no folder {folder}: give the folder that holds the files of the data set")
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = [] if depth >= _DEEPEST else sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
        if len(found) > _MOST_FILES:
            raise InputDataError(f"{folder} holds more than {_MOST_FILES} files: give the folder of the data set alone")
    return found


def _choose(preset: Preset, folder: Path, files: Sequence[Path]) -> tuple[dict[str, _Found], list[str]]:
    """Find each role's file; of label maps the official pair where both are there, else the single map.

    Returns what is used, and notes on label maps that are not.
    """
    found = {key: _find(preset, preset.roles[key], folder, files) for key in (*REQUIRED, *OFFICIAL)}
    chosen = {key: one for key, one in found.items() if one is not None}
    whole = preset.roles["labels"]
    if all(key in chosen for key in OFFICIAL):
        return chosen, [f"{path} is not used: there are train and test maps" for path in _candidates(whole, files)]
    labels = _find(preset, whole, folder, files)
    if labels is None:
        return chosen, []
    alone = [chosen.pop(key).path for key in OFFICIAL if key in chosen]
    notes = [f"{path} is not used: the other of train and test is missing" for path in alone]
    return chosen | {"labels": labels}, notes


def _candidates(role: Role, files: Sequence[Path]) -> list[Path]:
    """Return the files whose name and suffix fit a role."""
    suffixes = RASTERS + (REGIONS if role.name in OFFICIAL else ())
    known = {stem.lower() for stem, _ in role.files}
    found = [path for path in files if path.stem.lower() in known and path.suffix.lower() in suffixes]
    return [path for path in found if path.suffix.lower() != ".roi" or path.with_suffix(".txt") not in found]


def _find(preset: Preset, role: Role, folder: Path, files: Sequence[Path]) -> _Found | None:
    """Return what plays ``role``, or None; several files that could are an error."""
    found = _candidates(role, files)
    if len(found) > 1:
        raise InputDataError(
            f"{folder} holds {len(found)} files that could be the {role.name} of {preset.title}: "
            f"{', '.join(str(path.relative_to(folder)) for path in found[:_SHOWN])}; leave one of them, or name the "
            "files yourself with --hsi, --modality and --labels"
        )
    if not found:
        return None
    path = found[0]
    if path.suffix.lower() in REGIONS:
        return _Found(path, None, None)
    variables = {stem.lower(): variable for stem, variable in role.files}
    return _open(preset, role, path, variables[path.stem.lower()])


def _open(preset: Preset, role: Role, path: Path, variable: str | None) -> _Found:
    """Choose the variable of a file: its only raster, else the first that is listed and has a fitting shape."""
    names = (variable,) if variable is not None else (None, *role.variables)
    first: InputDataError | None = None
    for name in names if path.suffix.lower() in (".mat", ".npz") else (None,):
        try:
            with open_raster(path, name) as source:
                shape = (source.height, source.width, source.bands)
        except InputDataError as error:
            first = first or error
            if name is None and _ASKS not in str(error):
                break
            continue
        if role.least_bands <= shape[2] <= role.most_bands:
            return _Found(path, name, shape)
        first = first or InputDataError(
            f"{path}{f':{name}' if name else ''} is {_size(shape)}, expected the {role.name} of {preset.title} with "
            f"{_bands(role)}: is it another file?"
        )
    assert first is not None
    if variable is None and _ASKS in str(first):
        raise InputDataError(
            f"{first}; the preset '{preset.name}' looked for {', '.join(role.variables)} as its {role.name}"
        )
    raise first


def _bands(role: Role) -> str:
    if role.least_bands > 1:
        return f"at least {role.least_bands} bands"
    return "one band" if role.most_bands == 1 else f"at most {role.most_bands} bands"


def _size(shape: tuple[int, int, int]) -> str:
    return " x ".join(map(str, shape if shape[2] > 1 else shape[:2]))


def _missing(preset: Preset, folder: Path, files: Sequence[Path], roles: Sequence[str]) -> InputDataError:
    named = [*roles, "labels"] if set(roles) & set(OFFICIAL) else roles  # one map would do as well
    wanted = "; ".join(f"{key}: {', '.join(stem for stem, _ in preset.roles[key].files)}" for key in named)
    there = ", ".join(str(path.relative_to(folder)) for path in files[:_SHOWN]) or "nothing"
    more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    cut = [path.name for path in files if any(part in path.name.lower() for part in _CUT_OUT)]
    note = f"; {', '.join(cut[:4])} hold pixels or patches cut out of a scene, of which none can be made" if cut else ""
    return InputDataError(
        f"{folder} lacks the {' and '.join(roles)} of {preset.title}: looked for {', '.join(RASTERS)} files called "
        f"({wanted}), there is {there}{more}{note}"
    )


def _check_planes(preset: Preset, chosen: Mapping[str, _Found]) -> list[str]:
    """Require one height and width, and say how a cube or map must be turned; a note where the size is unusual."""
    cube = chosen["hsi"]
    assert cube.shape is not None
    for key, one in chosen.items():
        if one.shape is None or one.shape[:2] == cube.shape[:2]:
            continue
        where = f"{one.spec} ({key}) is {_size(one.shape)} and {cube.spec} (hsi) is {_size(cube.shape)}"
        if 1 in one.shape[:2]:
            raise InputDataError(f"{where}: a list is no raster, the pixels that it belongs to are not known")
        orders = [o for o in permutations(range(3)) if (cube.shape[o[0]], cube.shape[o[1]]) == one.shape[:2]]
        if orders:
            raise InputDataError(
                f"{where}: their axes are in different orders; save the cube as height x width x bands, in Python "
                f"numpy.transpose(cube, {orders[0]})"
            )
        raise InputDataError(f"{where}: the files of a scene have one height and width; are they of one data set?")
    if cube.shape[:2] in (preset.size, preset.size[::-1]):
        return []
    return [
        f"{preset.title} has {_size((*preset.size, 1))} pixels, this scene {_size((*cube.shape[:2], 1))}: is it whole?"
    ]


def _ingest_mrnet(
    folder: Path, out: Path, options: dict[str, str], overwrite: bool, progress: Progress | None
) -> IngestReport:
    tasks = {
        task: [ClassInfo(value, row["name"], " ".join(row["description"].split())) for value, row in enumerate(rows, 1)]
        for task, rows in _read("presets/mrnet.yaml")["tasks"].items()
    }
    task = options.pop("task", None)
    if task is None:
        raise UsageError(f"mrnet has several tasks: say which with --option task={'|'.join(tasks)}")
    numbers = {}
    for key, text in options.items():
        if key not in MrnetLayout.__dataclass_fields__:
            known = ("task", *MrnetLayout.__dataclass_fields__)
            raise UsageError(f"mrnet has no option '{key}'{nearest(key, known)}: it takes {', '.join(known)}")
        if not text.isascii() or not text.isdigit() or len(text) > 9:
            raise UsageError(f"the option {key} takes a whole number, for example {key}=8; got {text[:40]!r}")
        numbers[key] = int(text)
    layout = MrnetLayout(**numbers)
    return IngestReport(*ingest_mrnet(folder, out, task, tasks, layout, overwrite, progress))
