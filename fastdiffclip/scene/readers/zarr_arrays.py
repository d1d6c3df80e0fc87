"""zarr stores of format 2 and 3, folders or .zip files, by the path of an array: ``DIR.zarr:group/array``.

How an array becomes a raster is said in :mod:`hdf5_arrays` and :mod:`netcdf_cf`; dimensions are ``dimension_names``
or ``_ARRAY_DIMENSIONS``. Data types are numbers, codecs those that unpack bytes; a chunk that is missing is an error
unless the fill value is declared as nodata (``_FillValue``, or a fill value other than 0 where xarray wrote format 2).
A scene of ours is read through its own checksums, by the name of a modality or label map.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastdiffclip.scene.readers.guard_files import GuardedFile
from fastdiffclip.scene.readers.hdf5 import open_array
from fastdiffclip.scene.readers.source import RasterSource, choose_variable

_MARKS = ("zarr.json", ".zgroup", ".zarray")


def is_zarr(path: Path) -> bool:
    """Tell whether a folder is a zarr store."""
    return path.is_dir() and any((path / mark).is_file() for mark in _MARKS)


def open_zarr(path: Path, variable: str | None) -> RasterSource:
    """Open an array of a store, its only raster where ``variable`` is None."""
    if path.is_dir() and (path / "manifest" / "zarr.json").is_file():
        return _open_scene(path, variable)
    file = GuardedFile(path, "zarr", "a zarr store")
    try:
        return open_array(file, file.listing(), variable)
    except BaseException:
        file.close()
        raise


def _open_scene(path: Path, variable: str | None) -> RasterSource:
    """Open a modality or label map of a scene; its modality where it has one and none is named."""
    from fastdiffclip.scene.store import open_scene

    scene = open_scene(path)
    place = (scene.height, scene.width)
    found: dict[str, tuple[tuple[int, ...], str]] = {
        name: ((*place, modality.bands), modality.dtype) for name, modality in scene.modalities.items()
    }
    if variable is not None or len(found) != 1:
        found |= {name: (place, "uint16") for name in scene.label_maps}
    name = choose_variable(path, variable.strip("/") if variable is not None else None, found)
    if name in scene.label_maps:
        labels = scene.read_labels(name)[:, :, np.newaxis]
        return RasterSource(
            path, *place, 1, labels.dtype, labels.__getitem__, crs_wkt=scene.crs_wkt,
            affine_transform=scene.affine_transform, class_names={info.value: info.name for info in scene.classes},
            class_colours={info.value: info.colour for info in scene.classes if info.colour},
        )  # fmt: skip
    modality = scene.modalities[name]
    return RasterSource(
        path,
        *place,
        modality.bands,
        np.dtype(modality.dtype),
        lambda rows: scene.read(name, rows),
        lambda rows: scene.read_valid(name, rows),
        crs_wkt=scene.crs_wkt,
        affine_transform=scene.affine_transform,
        nodata=modality.nodata,
        scale=modality.scale,
        offset=modality.offset,
        wavelengths=modality.wavelengths,
        fwhm=modality.fwhm,
        bad_bands=modality.bad_bands,
    )
