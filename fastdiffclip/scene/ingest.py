"""From the files a user has to scenes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastdiffclip.errors import InputDataError, UsageError, nearest
from fastdiffclip.scene.bands import read_bad_bands, read_wavelengths
from fastdiffclip.scene.class_names import numbered
from fastdiffclip.scene.convert import converted_rows, stored_dtype
from fastdiffclip.scene.ingest_inputs import SceneInputs, is_located
from fastdiffclip.scene.labels import LabelMap, class_table, count_values, read_class_table
from fastdiffclip.scene.layout import LABEL_MAPS, file_sha256
from fastdiffclip.scene.matching import SceneFiles, match_scenes
from fastdiffclip.scene.pending import (
    is_folder_of_scenes,
    is_scene,
    pending_folder,
    remove_leftovers,
    require_free,
)
from fastdiffclip.scene.readers import RasterSource
from fastdiffclip.scene.readers.quiet import quiet_gdal
from fastdiffclip.scene.resample import method_of
from fastdiffclip.scene.store import ClassInfo, Modality
from fastdiffclip.scene.writer import SceneWriter

Progress = Callable[[float, str], None]
_WRITTEN, _SUMMED = 0.85, 0.95  # share of the work on a scene that is done when arrays and checksums are there


@dataclass(frozen=True)
class IngestRequest:
    """What to read and where to write it.

    ``modalities`` are (name, spec), the first usually hsi; ``labels`` are (labels|train|test, spec);
    ``valid`` maps a modality to the spec of a one-band mask, not 0 = valid. A spec is ``FILE[:VARIABLE]``;
    FILE may be a glob, and where the first modality has several files there is one scene per file,
    ``<stem>.zarr`` in the folder ``out``. ``classes`` is a CSV file, or the classes themselves.

    ``wavelengths`` and ``bad_bands`` are files about the first modality. ``nodata`` and ``scale`` are
    numbers per modality, in stored units and physical = stored * scale; a plain ``scale`` is for the first
    modality, a plain ``nodata`` for the first and for every other whose file names none itself. ``nodata`` by
    the name of a label map is a value that means unlabelled there, beside 0.

    ``resample`` allows rasters on other grids: nearest, bilinear, average or cubic aligns the modalities to the
    grid of the first, ``auto`` means bilinear; labels and validity go by nearest neighbour.
    """

    modalities: Sequence[tuple[str, str]]
    out: Path | str
    labels: Sequence[tuple[str, str]] = ()
    classes: Path | str | Sequence[ClassInfo] | None = None
    valid: Mapping[str, str] = field(default_factory=dict)
    wavelengths: Path | str | None = None
    bad_bands: Path | str | None = None
    nodata: float | Mapping[str, float] | None = None
    scale: float | Mapping[str, float] | None = None
    name: str | None = None
    overwrite: bool = False
    resample: str | None = None


@dataclass(frozen=True)
class IngestReport:
    """The scenes written, what the user should know, and a summary of each in a few lines of text."""

    scenes: list[Path]
    warnings: list[str]
    lines: list[str]


class _Job:
    """One ingest: the request, what was found out so far, and how far it is."""

    def __init__(self, request: IngestRequest, scenes: list[SceneFiles], progress: Progress | None) -> None:
        self.request = request
        self.scenes = scenes
        self.method = None if request.resample is None else method_of(request.resample)
        self.progress = progress
        self.warnings: list[str] = []
        self.lines: list[str] = []
        self.classes: list[ClassInfo] = []
        self.labels: list[dict[str, LabelMap]] = []

    def report(self, scene: int, share: float, text: str) -> None:
        """Tell the caller that ``share`` of the given scene is done."""
        if self.progress:
            self.progress((scene + share) / len(self.scenes), text)


def ingest(request: IngestRequest, progress: Progress | None = None) -> IngestReport:
    """Read the files of ``request`` and write its scenes; all of them or, on an error or Ctrl-C, none.

    Rasters are streamed in blocks of rows; label maps, validity and gridded point clouds are held in memory. What an
    ingest to the same place left behind when it was killed is removed first. ``progress`` is called with the share
    done (0 to 1) and a text. Raises UsageError, InputDataError or ResourceError with
    one sentence on what is wrong.
    """
    _check_request(request)
    out = Path(request.out)
    remove_leftovers(out)
    require_free(out, request.overwrite, lambda old: is_scene(old) or is_folder_of_scenes(old))
    specs = {f"modality {name}": spec for name, spec in request.modalities}
    specs.update({f"labels {name}": spec for name, spec in request.labels})
    specs.update({f"valid {name}": spec for name, spec in request.valid.items()})
    scenes, warnings = match_scenes(specs, is_located)
    if len(scenes) > 1 and request.name is not None:
        raise UsageError(f"a name fits one scene, and there are {len(scenes)}: leave it out, each is named by its file")
    job = _Job(request, scenes, progress)
    job.warnings += warnings
    with quiet_gdal():
        _read_labels(job)
        if len(scenes) == 1:
            _write_scene(job, 0, out, request.name, request.overwrite)
            return IngestReport([out], job.warnings, job.lines)
        with pending_folder(out, request.overwrite, is_folder_of_scenes) as folder:
            for i, files in enumerate(scenes):
                _write_scene(job, i, folder / f"{files.stem}.zarr", None, False)
    return IngestReport([out / f"{files.stem}.zarr" for files in scenes], job.warnings, job.lines)


def _check_request(request: IngestRequest) -> None:
    names = [name for name, _ in request.modalities]
    if not names:
        raise UsageError("ingest needs at least one modality: give --hsi FILE")
    for kind, given in (("modality", names), ("label map", [name for name, _ in request.labels])):
        repeated = sorted({name for name in given if given.count(name) > 1})
        if repeated:
            raise UsageError(f"{kind} '{repeated[0]}' is given twice: give each one once")
    for name, _ in request.labels:
        if name not in LABEL_MAPS:
            raise UsageError(
                f"'{name}' is no label map{nearest(name, LABEL_MAPS)}: it is one of {', '.join(LABEL_MAPS)}"
            )
    maps = [name for name, _ in request.labels]
    for what, mapping, known in (
        ("valid", request.valid, names), ("nodata", request.nodata, names + maps), ("scale", request.scale, names),
    ):  # fmt: skip
        for name in mapping if isinstance(mapping, Mapping) else ():
            if name not in known:
                raise UsageError(
                    f"{what} is given for '{name}'{nearest(name, known)}, the modalities are {', '.join(names)}"
                )


def _read_labels(job: _Job) -> None:
    """Read every label map and settle the one class table, before anything is written."""
    request = job.request
    nodata = request.nodata if isinstance(request.nodata, Mapping) else {}
    maps: list[LabelMap] = []
    for files in job.scenes if request.labels else ():
        job.report(0, 0.0, f"reading the labels of {files.stem}")
        with SceneInputs(files, job.method) as inputs:
            found = [inputs.labels(name, nodata.get(name)) for name, _ in request.labels]
        where = f"{files.stem}: " if len(job.scenes) > 1 else ""
        job.warnings += dict.fromkeys(where + warning for one in found for warning in one.warnings)
        maps += found
    given = None
    if isinstance(request.classes, Path | str):
        given, warnings = read_class_table(Path(request.classes))
        job.warnings += warnings
    elif request.classes is not None:
        given = list(request.classes)
    maps, warnings = numbered(maps, given)
    job.warnings += warnings
    counts = count_values(one.values for one in maps)
    if request.labels and not counts:
        job.warnings.append("the label maps hold no labelled pixel (every value is 0 or nodata)")
    job.classes, warnings = class_table(counts, given, maps)
    job.warnings += warnings
    names = [name for name, _ in request.labels]
    of_scene = len(names)
    job.labels = [
        dict(zip(names, maps[i * of_scene : (i + 1) * of_scene], strict=True)) for i in range(len(job.scenes))
    ]


def _write_scene(job: _Job, number: int, out: Path, name: str | None, overwrite: bool) -> None:
    request, files = job.request, job.scenes[number]
    job.report(number, 0.0, f"reading {files.stem}")
    with SceneInputs(files, job.method) as inputs:
        grid = inputs.grid
        with SceneWriter(
            out,
            height=grid.height,
            width=grid.width,
            crs_wkt=grid.crs_wkt,
            affine_transform=grid.affine_transform,
            name=name,
            overwrite=overwrite,
        ) as writer:
            used = {role: [file.path] for role, file in files.files.items()}
            for i, (key, _) in enumerate(request.modalities):
                used[f"modality {key}"] += _write_modality(job, number, i, inputs, writer, key)
            for key, found in job.labels[number].items():
                used[f"labels {key}"] += [found.path, *found.companions]
                writer.add_labels(key, found.values)
                if found.resampled:
                    writer.add_resampling(f"labels {key}", found.resampled)
                counts = count_values([found.values])
                job.lines.append(f"{writer.name}: {key}: {sum(counts.values())} pixels in {len(counts)} classes")
            writer.set_classes(job.classes)
            _add_sources(job, number, writer, used)
            job.report(number, _SUMMED, f"{writer.name}: flushing to disk")
    job.report(number, 1.0, f"{files.stem} is written")


def _add_sources(job: _Job, number: int, writer: SceneWriter, used: Mapping[str, list[Path]]) -> None:
    """Record the files of a scene with their checksums; to compute these every file is read once more."""
    paths = list(dict.fromkeys(path for files in used.values() for path in files))
    digests = {}
    for i, path in enumerate(paths):
        share = _WRITTEN + (_SUMMED - _WRITTEN) * i / len(paths)
        job.report(number, share, f"{writer.name}: checksum of {path.name}")
        digests[path] = _digest(path)
    for role, files in used.items():
        for path in dict.fromkeys(files):
            writer.add_source_file(path, digests[path], role)


def _digest(path: Path) -> str:
    """Return the sha256 of a file; of a folder, that of its files' names and checksums."""
    if not path.is_dir():
        return file_sha256(path)
    total = hashlib.sha256()
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        total.update(f"{file.relative_to(path).as_posix()}\0{file_sha256(file)}\n".encode())
    return total.hexdigest()


def _write_modality(
    job: _Job, number: int, position: int, inputs: SceneInputs, writer: SceneWriter, name: str
) -> list[Path]:
    """Write one modality; return the files it came from."""
    count, done = len(job.request.modalities), 0.0

    def report(what: str, share: float) -> None:
        job.report(number, _WRITTEN * (position + share) / count, f"{writer.name}: {what}")

    source = inputs.modality(name, lambda share: report(f"{name}, {share:.0%} of the points", 0.0))
    source = _as_said(job.request, name, position == 0, source)
    job.warnings += source.warnings
    result = inputs.on_grid(name, source)
    aligned = result.source

    def on_scan(rows: int) -> None:
        nonlocal done
        done += rows / aligned.height
        report(f"{name}, range of values {done:.0%}", 0.0)

    def on_rows(rows: int) -> None:
        nonlocal done
        done += rows / aligned.height
        report(name, done)

    writer.require_space(aligned.height * aligned.width * (2 * aligned.bands + 1))  # before a file is read through
    dtype, done = stored_dtype(aligned, on_scan), 0.0
    modality = writer.add_modality(
        name,
        converted_rows(aligned, dtype),
        bands=aligned.bands,
        dtype=dtype,
        valid=aligned.read_mask,
        wavelengths=aligned.wavelengths,
        fwhm=aligned.fwhm,
        bad_bands=aligned.bad_bands,
        nodata=aligned.nodata,
        scale=aligned.scale,
        offset=aligned.offset,
        on_rows=on_rows,
    )
    for role, how in result.resampled.items():
        writer.add_resampling(role, how)
    _describe(job, writer, modality, result.resampled.get(f"modality {name}"))
    return [source.path, *source.companions]


def _as_said(request: IngestRequest, name: str, first: bool, source: RasterSource) -> RasterSource:
    """Return a modality with what the user says of it in place of what its file says."""
    source = replace(source, nodata=_nodata(request.nodata, name, first, source.nodata))
    if first and request.wavelengths is not None:
        wavelengths = read_wavelengths(str(request.wavelengths), source.bands)
        fwhm = source.fwhm if wavelengths == source.wavelengths else None
        source = replace(source, wavelengths=wavelengths, fwhm=fwhm)
    if first and request.bad_bands is not None:
        source = replace(source, bad_bands=read_bad_bands(Path(request.bad_bands), source.bands))
    scale = _scale(request.scale, name, first)
    return source if scale is None else replace(source, scale=scale, offset=0.0)


def _scale(given: float | Mapping[str, float] | None, name: str, first: bool) -> float | None:
    if isinstance(given, Mapping):
        return given.get(name)
    return given if first else None


def _nodata(given: float | Mapping[str, float] | None, name: str, first: bool, of_file: float | None) -> float | None:
    if isinstance(given, Mapping):
        return given.get(name, of_file)
    if given is None or (of_file is not None and not first):
        return of_file
    return given


def _describe(job: _Job, writer: SceneWriter, modality: Modality, resampled: Mapping[str, Any] | None) -> None:
    """Add summary line and warnings of a modality that was written; refuse one without a valid pixel."""
    where, pixels = f"{writer.name}: {modality.name}", writer.height * writer.width
    counts = writer.invalid_counts[modality.name]
    causes = {"nodata": "nodata", "nonfinite": "NaN or infinite", "masked": "by the mask"}
    listed = ", ".join(f"{counts[key]} {text}" for key, text in causes.items() if counts[key])
    if modality.valid_pixels == 0:
        raise InputDataError(f"{where} has no valid pixel ({listed}): check nodata and the mask")
    job.lines.append(
        f"{where}: {writer.height} x {writer.width} pixels, {modality.bands} bands, {modality.dtype}, "
        f"{pixels - modality.valid_pixels} pixels invalid"
        + (f" ({listed})" if listed else "")
        + (f", {resampled['method']} from {' x '.join(map(str, resampled['shape']))} pixels" if resampled else "")
    )
    bad = modality.bad_bands or (False,) * modality.bands
    constant = [i for i, (std, skip) in enumerate(zip(modality.std, bad, strict=True), 1) if std == 0 and not skip]
    if constant:
        shown = ", ".join(map(str, constant[:10])) + (", ..." if len(constant) > 10 else "")
        job.warnings.append(
            f"{where}: {len(constant)} of {modality.bands} bands are constant and tell nothing: {shown}"
        )
