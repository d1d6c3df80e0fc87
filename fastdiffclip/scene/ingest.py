"""From the files a user has to scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastdiffclip.errors import InputDataError, UsageError, nearest
from fastdiffclip.scene.bands import read_bad_bands, read_wavelengths
from fastdiffclip.scene.convert import converted_rows, stored_dtype
from fastdiffclip.scene.georeference import Grid, require_same_grid
from fastdiffclip.scene.labels import class_table, count_values, read_class_table, read_label_map
from fastdiffclip.scene.layout import LABEL_MAPS, file_sha256
from fastdiffclip.scene.matching import SceneFiles, match_scenes
from fastdiffclip.scene.pending import is_folder_of_scenes, is_scene, pending_folder, require_free
from fastdiffclip.scene.readers import RasterSource, open_raster
from fastdiffclip.scene.store import ClassInfo, Modality
from fastdiffclip.scene.writer import SceneWriter

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class IngestRequest:
    """What to read and where to write it.

    ``modalities`` are (name, spec), the first usually hsi; ``labels`` are (labels|train|test, spec);
    ``valid`` maps a modality to the spec of a one-band mask, not 0 = valid. A spec is ``FILE[:VARIABLE]``;
    FILE may be a glob, and where the first modality has several files there is one scene per file,
    ``<stem>.zarr`` in the folder ``out``.

    ``wavelengths`` and ``bad_bands`` are files about the first modality. ``nodata`` and ``scale`` are
    numbers per modality, in stored units and physical = stored * scale; a plain ``scale`` is for the first
    modality, a plain ``nodata`` for the first and for every other whose file names none itself.
    """

    modalities: Sequence[tuple[str, str]]
    out: Path | str
    labels: Sequence[tuple[str, str]] = ()
    classes: Path | str | None = None
    valid: Mapping[str, str] = field(default_factory=dict)
    wavelengths: Path | str | None = None
    bad_bands: Path | str | None = None
    nodata: float | Mapping[str, float] | None = None
    scale: float | Mapping[str, float] | None = None
    name: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class IngestReport:
    """The scenes written, what the user should know, and a summary of each in a few lines of text."""

    scenes: list[Path]
    warnings: list[str]
    lines: list[str]


@dataclass(frozen=True)
class _Labels:
    values: np.ndarray
    grid: Grid


class _Job:
    """One ingest: the request, what was found out so far, and how far it is."""

    def __init__(self, request: IngestRequest, scenes: list[SceneFiles], progress: Progress | None) -> None:
        self.request = request
        self.scenes = scenes
        self.progress = progress
        self.warnings: list[str] = []
        self.lines: list[str] = []
        self.classes: list[ClassInfo] = []
        self.labels: list[dict[str, _Labels]] = []

    def report(self, scene: int, share: float, text: str) -> None:
        """Tell the caller that ``share`` of the given scene is done."""
        if self.progress:
            self.progress((scene + share) / len(self.scenes), text)


def ingest(request: IngestRequest, progress: Progress | None = None) -> IngestReport:
    """Read the files of ``request`` and write its scenes; all of them or, on an error or Ctrl-C, none.

    Rasters are streamed in blocks of rows; label maps and validity are held in memory. ``progress`` is
    called with the share done (0 to 1) and a text. Raises UsageError, InputDataError or ResourceError with
    one sentence on what is wrong.
    """
    _check_request(request)
    out = Path(request.out)
    require_free(out, request.overwrite, lambda old: is_scene(old) or is_folder_of_scenes(old))
    specs = {f"modality {name}": spec for name, spec in request.modalities}
    specs.update({f"labels {name}": spec for name, spec in request.labels})
    specs.update({f"valid {name}": spec for name, spec in request.valid.items()})
    scenes, warnings = match_scenes(specs)
    job = _Job(request, scenes, progress)
    job.warnings += warnings
    _read_labels(job)
    if len(scenes) == 1:
        _write_scene(job, 0, out, request.name, request.overwrite)
        return IngestReport([out], job.warnings, job.lines)
    if request.name is not None:
        raise UsageError(f"a name fits one scene, and there are {len(scenes)}: leave it out, each is named by its file")
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
    for what, mapping in (("valid", request.valid), ("nodata", request.nodata), ("scale", request.scale)):
        for name in mapping if isinstance(mapping, Mapping) else ():
            if name not in names:
                raise UsageError(
                    f"{what} is given for '{name}'{nearest(name, names)}, the modalities are {', '.join(names)}"
                )


def _read_labels(job: _Job) -> None:
    """Read every label map and settle the one class table, before anything is written."""
    request = job.request
    sources = []
    for files in job.scenes:
        maps = {}
        for name, _ in request.labels:
            with _open(files, f"labels {name}") as source:
                maps[name] = _Labels(read_label_map(source), _grid(f"labels '{name}'", source))
            sources.append(source)
        job.labels.append(maps)
    given = None
    if request.classes is not None:
        given, warnings = read_class_table(Path(request.classes))
        job.warnings += warnings
    counts = count_values(found.values for maps in job.labels for found in maps.values())
    if request.labels and not counts:
        job.warnings.append("the label maps hold no labelled pixel (every value is 0 or nodata)")
    job.classes, warnings = class_table(counts, given, sources)
    job.warnings += warnings


def _open(files: SceneFiles, role: str) -> RasterSource:
    file = files.files[role]
    return open_raster(file.path, file.variable)


def _grid(what: str, source: RasterSource) -> Grid:
    return Grid(what, source.path, source.height, source.width, source.crs_wkt, source.affine_transform)


def _write_scene(job: _Job, number: int, out: Path, name: str | None, overwrite: bool) -> None:
    request, files = job.request, job.scenes[number]
    job.report(number, 0.0, f"reading {files.stem}")
    with ExitStack() as stack:
        sources = {key: stack.enter_context(_open(files, f"modality {key}")) for key, _ in request.modalities}
        masks = {key: stack.enter_context(_open(files, f"valid {key}")) for key in request.valid}
        grids = [_grid(key, source) for key, source in sources.items()]
        grids += [found.grid for found in job.labels[number].values()]
        grids += [_grid(f"validity of {key}", mask) for key, mask in masks.items()]
        crs_wkt, transform = require_same_grid(grids)
        writer = stack.enter_context(
            SceneWriter(
                out,
                height=grids[0].height,
                width=grids[0].width,
                crs_wkt=crs_wkt,
                affine_transform=transform,
                name=name,
                overwrite=overwrite,
            )
        )
        for i, (key, source) in enumerate(sources.items()):
            _write_modality(job, number, i, writer, key, source, masks.get(key))
        for key, found in job.labels[number].items():
            writer.add_labels(key, found.values)
            counts = count_values([found.values])
            job.lines.append(f"{writer.name}: {key}: {sum(counts.values())} pixels in {len(counts)} classes")
        writer.set_classes(job.classes)
        digests = {path: file_sha256(path) for path in {file.path for file in files.files.values()}}
        for role, file in files.files.items():
            writer.add_source_file(file.path, digests[file.path], role)
    job.report(number, 1.0, f"{files.stem} is written")


def _write_modality(
    job: _Job,
    number: int,
    position: int,
    writer: SceneWriter,
    name: str,
    source: RasterSource,
    mask: RasterSource | None,
) -> None:
    request, first = job.request, position == 0
    wavelengths, bad_bands = source.wavelengths, source.bad_bands
    if first and request.wavelengths is not None:
        wavelengths = read_wavelengths(str(request.wavelengths), source.bands)
    if first and request.bad_bands is not None:
        bad_bands = read_bad_bands(Path(request.bad_bands), source.bands)
    scale = _scale(request.scale, name, first)
    dtype = stored_dtype(source)
    done = 0

    def on_rows(rows: int) -> None:
        nonlocal done
        done += rows
        share = (position + done / source.height) / len(request.modalities)
        job.report(number, share, f"{writer.name}: {name}")

    modality = writer.add_modality(
        name,
        converted_rows(source, dtype),
        bands=source.bands,
        dtype=dtype,
        valid=_validity(source, mask),
        wavelengths=wavelengths,
        fwhm=source.fwhm if wavelengths == source.wavelengths else None,
        bad_bands=bad_bands,
        nodata=_nodata(request.nodata, name, first, source.nodata),
        scale=source.scale if scale is None else scale,
        offset=source.offset if scale is None else 0.0,
        on_rows=on_rows,
    )
    _describe(job, writer, modality)


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


def _validity(source: RasterSource, mask: RasterSource | None) -> Callable[[slice], np.ndarray] | None:
    """Combine the file's own mask with the user's; None where there is neither."""
    own = source.read_mask
    if mask is None:
        return own
    if mask.bands != 1:
        raise InputDataError(f"validity mask {mask.path} has {mask.bands} bands, expected one (not 0 = valid)")

    def read(rows: slice) -> np.ndarray:
        values = mask.read_rows(rows)[..., 0]
        valid = (values != 0) & (values == values)  # NaN is not valid
        return valid if own is None else valid & own(rows)

    return read


def _describe(job: _Job, writer: SceneWriter, modality: Modality) -> None:
    """Add summary line and warnings of a modality that was written; refuse one without a valid pixel."""
    where, pixels = f"{writer.name}: {modality.name}", writer.height * writer.width
    counts = writer.invalid_counts[modality.name]
    causes = {"nodata": "nodata", "nonfinite": "NaN or infinite", "masked": "by the mask"}
    listed = ", ".join(f"{counts[key]} {text}" for key, text in causes.items() if counts[key])
    if modality.valid_pixels == 0:
        raise InputDataError(f"{where} has no valid pixel ({listed}): check nodata and the mask")
    job.lines.append(
        f"{where}: {writer.height} x {writer.width} pixels, {modality.bands} bands, {modality.dtype}, "
        f"{pixels - modality.valid_pixels} pixels invalid" + (f" ({listed})" if listed else "")
    )
    bad = modality.bad_bands or (False,) * modality.bands
    constant = [i for i, (std, skip) in enumerate(zip(modality.std, bad, strict=True), 1) if std == 0 and not skip]
    if constant:
        shown = ", ".join(map(str, constant[:10])) + (", ..." if len(constant) > 10 else "")
        job.warnings.append(
            f"{where}: {len(constant)} of {modality.bands} bands are constant and tell nothing: {shown}"
        )
