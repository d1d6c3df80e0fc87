"""MRNet, knee MRI: a folder of exams becomes one small scene per exam, which is one window.

An exam is three volumes (slices, 256, 256) of grey levels 0 to 255, one per plane: axial, coronal, sagittal, the
modalities of the scene. Every volume is brought to N slices of (P * B) x (P * B) pixels by averaging over area, its
whole extent kept, and each block of B x B pixels becomes one token (space to depth): the scene is P x P pixels with
N * B * B channels, channel (slice * B + row in the block) * B + column in the block. With P = ``model.window`` the
window around the centre pixel is the exam. The centre pixel alone has a label, and alone may be the centre of a window
(``centre_only``).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastdiffclip.errors import InputDataError, UsageError, nearest
from fastdiffclip.scene.labels import with_colours
from fastdiffclip.scene.layout import file_sha256
from fastdiffclip.scene.pending import is_folder_of_scenes, pending_folder, remove_leftovers, require_free
from fastdiffclip.scene.readers.numpy_files import open_npy
from fastdiffclip.scene.readers.source import RasterSource
from fastdiffclip.scene.store import ClassInfo
from fastdiffclip.scene.writer import SceneWriter

PLANES = ("axial", "coronal", "sagittal")
MAPS = {"train": ("train",), "test": ("valid", "val")}  # label map: names of the folder with its exams
NEGATIVE, POSITIVE = 1, 2
LEVELS = 255.0
STORED_SCALE = 1.0 / 256.0  # an average of grey levels is stored as uint16
_SLICES_AT_ONCE = 8
_LARGEST_SIDE = 1024
_MOST_SLICES = 4096
_LARGEST_TABLE = 16 * 2**20
_CLOSE = 3  # exams named in a message


@dataclass(frozen=True)
class MrnetLayout:
    """How an exam becomes a scene: ``window`` P x P tokens, ``slices`` N, ``block`` B x B pixels a token."""

    window: int = 11
    slices: int = 16
    block: int = 8

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("window", self.window, 1, 31), ("slices", self.slices, 1, 256), ("block", self.block, 1, 64),
        ):  # fmt: skip
            if not least <= value <= most:
                raise UsageError(f"the MRNet option {name} is {least} to {most}, not {value}")
        if self.window % 2 == 0:
            raise UsageError(f"the MRNet option window must be odd, as model.window is, not {self.window}")

    @property
    def side(self) -> int:
        """Side of the resampled slices in pixels."""
        return self.window * self.block

    @property
    def channels(self) -> int:
        """Channels of a token."""
        return self.slices * self.block * self.block


@dataclass(frozen=True)
class _Exam:
    name: str
    label_map: str
    label: int
    volumes: dict[str, Path]


def ingest_mrnet(
    folder: Path,
    out: Path,
    task: str,
    classes: Mapping[str, Sequence[ClassInfo]],
    layout: MrnetLayout | None = None,
    overwrite: bool = False,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[list[Path], list[str], list[str]]:
    """Write one scene per exam, ``train-0000.zarr`` and so on, to the folder ``out``; all of them or none.

    ``folder`` holds ``train/<plane>/<exam>.npy`` and, if there, ``valid/...`` with ``train-<task>.csv`` and
    ``valid-<task>.csv`` (lines ``exam,0`` or ``exam,1``), or a folder inside it does. ``classes`` are the class tables
    by task: value 1 without, 2 with the finding. Exams of ``train`` are labelled in the map ``train``, those of
    ``valid`` in ``test``; where both are there every scene has both maps, so that they are an official split.
    One exam is in memory at a time.

    Returns the scenes, warnings and lines of summary. Raises UsageError for an unknown task, InputDataError for exams
    that lack a plane or a label, and for volumes that are truncated, of another form or no numbers at all.
    """
    layout = layout or MrnetLayout()
    if task not in classes:
        raise UsageError(
            f"there is no MRNet task '{task}'{nearest(task, tuple(classes))}: choose one of {', '.join(classes)}"
        )
    remove_leftovers(out)
    require_free(out, overwrite, is_folder_of_scenes)
    exams, warnings = _find_exams(folder, task)
    maps = sorted({exam.label_map for exam in exams}, reverse=True)
    table = with_colours(classes[task])
    with pending_folder(out, overwrite, is_folder_of_scenes) as pending:
        for number, exam in enumerate(exams):
            if progress:
                progress(number / len(exams), exam.name)
            _write_exam(pending / f"{exam.name}.zarr", exam, maps, table, layout)
    lines = [
        f"{name}: {len(labels)} exams, {labels.count(POSITIVE)} of them '{table[1].name}'"
        for name in maps
        if (labels := [exam.label for exam in exams if exam.label_map == name])
    ]
    lines.append(
        f"every exam: {layout.window} x {layout.window} pixels of {len(PLANES)} x {layout.channels} channels "
        f"({layout.slices} slices of {layout.side} x {layout.side} pixels)"
    )
    return [out / f"{exam.name}.zarr" for exam in exams], warnings, lines


def _find_exams(folder: Path, task: str) -> tuple[list[_Exam], list[str]]:
    """Return the labelled exams in order, train first."""
    root = _find_root(folder)
    exams: list[_Exam] = []
    warnings: list[str] = []
    for label_map, names in MAPS.items():
        parts = [part for part in _folders(root) if part.name.lower() in names]
        if not parts:
            warnings.append(f"{root} has no folder '{names[0]}': there is no label map '{label_map}'")
            continue
        if len(parts) > 1:
            raise InputDataError(f"{root} holds both {parts[0].name} and {parts[1].name}: keep one of them")
        volumes = _find_volumes(parts[0])
        table = _find_table(root, names, task)
        labels = _read_table(table)
        lacking = sorted(set(volumes) - set(labels))
        if lacking:
            raise InputDataError(
                f"{table} has no label for {len(lacking)} exams of {parts[0]} ({_some(lacking)}): add them, or remove "
                "their volumes"
            )
        if unused := sorted(set(labels) - set(volumes)):
            warnings.append(f"{table}: {len(unused)} labels belong to no exam of {parts[0]} ({_some(unused)})")
        exams += [_Exam(f"{names[0]}-{key}", label_map, labels[key], volumes[key]) for key in sorted(volumes)]
    return exams, warnings


def _find_root(folder: Path) -> Path:
    """Return the folder with ``train/axial`` in it: ``folder``, or the only one inside it."""
    if not folder.is_dir():
        raise InputDataError(f"there is no folder {folder}: give the folder of the MRNet exams")
    candidates = [folder, *_folders(folder), *(inner for outer in _folders(folder) for inner in _folders(outer))]
    found = [place for place in candidates if any(_is_part(part) for part in _folders(place))]
    if len(found) != 1:
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
        raise InputDataError(
            f"{folder} holds {'several folders' if found else 'no folder'} of MRNet exams: expected "
            f"train/{PLANES[0]}/0000.npy and so on, there is "
            + (", ".join(map(str, found)) + "; give one of them" if found else there)
        )
    return found[0]


def _is_part(folder: Path) -> bool:
    named = folder.name.lower() in {name for names in MAPS.values() for name in names}
    return named and set(PLANES) <= {plane.name.lower() for plane in _folders(folder)}


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))


def _find_volumes(part: Path) -> dict[str, dict[str, Path]]:
    """Return the volumes by plane of every exam; each exam must have all planes."""
    planes = {plane.name.lower(): plane for plane in _folders(part)}
    by_plane = {
        plane: {path.stem: path for path in planes[plane].iterdir() if path.suffix == ".npy"} for plane in PLANES
    }
    every = sorted(set().union(*by_plane.values()))
    if not every:
        raise InputDataError(f"{part} holds no exam: expected files such as {PLANES[0]}/0000.npy")
    for plane, files in by_plane.items():
        if lacking := [name for name in every if name not in files]:
            raise InputDataError(
                f"{planes[plane]} lacks {len(lacking)} exams that other planes have ({_some(lacking)}): an exam needs "
                f"{', '.join(PLANES)}"
            )
    return {name: {plane: by_plane[plane][name] for plane in PLANES} for name in every}


def _find_table(root: Path, parts: Sequence[str], task: str) -> Path:
    wanted = [f"{part}-{task}.csv" for part in parts]
    places = [root, *_folders(root)]
    found = [path for place in places for path in sorted(place.iterdir()) if path.name.lower() in wanted]
    if len(found) != 1:
        there = sorted(path.name for place in places for path in place.glob("*.csv"))
        raise InputDataError(
            f"{root} has {'several files' if found else 'no file'} {wanted[0]}: "
            + (f"keep one of {', '.join(map(str, found))}" if found else f"it has {', '.join(there) or 'no CSV file'}")
        )
    return found[0]


def _read_table(path: Path) -> dict[str, int]:
    """Read ``exam,label`` lines: label 0 or 1 becomes the class value 1 or 2."""
    try:
        if path.stat().st_size > _LARGEST_TABLE:
            raise InputDataError(f"{path} has {path.stat().st_size} bytes, too many for a table of labels")
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputDataError(f"the label table {path} cannot be read as CSV text ({error})") from error
    labels: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if len(cells) != 2 or cells[1] not in ("0", "1"):
            raise InputDataError(f"{path}, line {number}: expected 'exam,0' or 'exam,1', found '{','.join(row)[:60]}'")
        if cells[0] in labels:
            raise InputDataError(f"{path}, line {number}: exam {cells[0]} stands in the table twice")
        labels[cells[0]] = POSITIVE if cells[1] == "1" else NEGATIVE
    if not labels:
        raise InputDataError(f"{path} holds no label: expected lines such as '0000,1'")
    return labels


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_CLOSE]) + (", ..." if len(names) > _CLOSE else "")


def _write_exam(
    path: Path, exam: _Exam, maps: Sequence[str], classes: Sequence[ClassInfo], layout: MrnetLayout
) -> None:
    side = layout.window
    with SceneWriter(path, height=side, width=side, name=exam.name, centre_only=True) as writer:
        for plane, file in exam.volumes.items():
            tokens = read_volume(file, layout)
            writer.add_modality(plane, tokens, bands=layout.channels, dtype="uint16", scale=STORED_SCALE)
            writer.add_source_file(file, file_sha256(file), f"modality {plane}")
        for name in maps:
            labels = np.zeros((side, side), np.uint16)
            if name == exam.label_map:
                labels[side // 2, side // 2] = exam.label
            writer.add_labels(name, labels)
        writer.set_classes(classes)


def read_volume(path: Path, layout: MrnetLayout) -> np.ndarray:
    """Read a volume (slices, height, width) of grey levels 0 to 255 as tokens (P, P, N * B * B) uint16.

    Stored = 256 * the mean grey level over the area. Raises InputDataError for another form, for values that are no
    grey levels, for truncated files and for Python objects, which are never unpickled.
    """
    with open_npy(path, None) as source:
        _check_form(path, source)
        rows, columns = (area_weights(size, layout.side) for size in (source.width, source.bands))
        depth = area_weights(source.height, layout.slices)
        volume = np.zeros((layout.slices, layout.side, layout.side), np.float32)
        for start in range(0, source.height, _SLICES_AT_ONCE):
            part = slice(start, min(start + _SLICES_AT_ONCE, source.height))
            levels = np.asarray(source.read_rows(part), np.float32)
            if not (levels.min() >= 0 and levels.max() <= LEVELS):  # NaN compares false
                raise InputDataError(
                    f"{path} holds values from {levels.min():g} to {levels.max():g} in slices {part.start + 1} to "
                    f"{part.stop}: expected grey levels of 0 to 255 as MRNet has; rescale it first"
                )
            volume += np.tensordot(depth[:, part], rows @ levels @ columns.T, axes=1)
    return space_to_depth(np.rint(volume / STORED_SCALE).astype(np.uint16), layout.block)


def _check_form(path: Path, source: RasterSource) -> None:
    shape = (source.height, source.width, source.bands)
    if source.bands == 1 or source.height > _MOST_SLICES or max(shape[1:]) > _LARGEST_SIDE:
        raise InputDataError(f"{path} has shape {shape}: expected a volume (slices, 256, 256) of grey levels")


def area_weights(inputs: int, outputs: int) -> np.ndarray:
    """Return (outputs, inputs) float32: the share of each input cell in the mean over each output cell.

    Both divide the same length evenly, so a constant stays constant and the mean is kept; fewer outputs average, more
    outputs repeat.
    """
    edges = np.arange(outputs + 1) * (inputs / outputs)
    cells = np.arange(inputs)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    overlap = np.maximum(overlap, 0.0)
    return np.asarray(overlap / overlap.sum(axis=1, keepdims=True), np.float32)


def space_to_depth(volume: np.ndarray, block: int) -> np.ndarray:
    """Turn (N, P * B, P * B) into (P, P, N * B * B), channel (slice * B + row) * B + column."""
    slices, height, width = volume.shape
    blocks = volume.reshape(slices, height // block, block, width // block, block)
    tokens = blocks.transpose(1, 3, 0, 2, 4).reshape(height // block, width // block, -1)
    return np.ascontiguousarray(tokens)
