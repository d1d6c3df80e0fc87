"""GeoTIFF as it arrives in scenes: colours of classes, what lies beside it, and files that are mostly air."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine

from fastdiffclip.errors import InputDataError, ResourceError
from fastdiffclip.scene.ingest import IngestReport, IngestRequest, ingest
from fastdiffclip.scene.readers import open_raster
from fastdiffclip.scene.store import ClassInfo, open_scene

from .envi_files import write_envi

PLACE = {"crs": "EPSG:32617", "transform": Affine(2, 0, 5e5, 0, -2, 4.1e6)}


def tiff(path: Path, values: np.ndarray, **more: Any) -> Path:
    planes = values[np.newaxis] if values.ndim == 2 else np.moveaxis(values, -1, 0)
    with rasterio.open(
        path, "w", driver="GTiff", count=len(planes), height=planes.shape[1], width=planes.shape[2],
        dtype=values.dtype, **{**PLACE, **more},
    ) as dataset:  # fmt: skip
        dataset.write(planes)
    return path


def run(folder: Path, hsi: Path | str, **options: Any) -> IngestReport:
    return ingest(IngestRequest([("hsi", str(hsi))], folder / "o.zarr", overwrite=True, **options))


def test_colours_and_names_of_a_label_raster_reach_the_class_table(tmp_path: Path) -> None:
    hsi = tiff(tmp_path / "hsi.tif", np.random.default_rng(0).integers(1, 99, (4, 5, 3)).astype("uint16"))
    labels = tiff(tmp_path / "gt.tif", np.array([[1, 2, 3, 9, 0]] * 4, "uint8"))
    with rasterio.open(labels, "r+") as dataset:
        dataset.write_colormap(1, {0: (255, 255, 255), 1: (10, 20, 30, 255), 2: (40, 50, 60, 255), 3: (0, 0, 0, 255)})
    named = "".join(f"<Category>{name}</Category>" for name in ("", "oak", "pine", "road"))
    (tmp_path / "gt.tif.aux.xml").write_text(f"<PAMDataset><CategoryNames>{named}</CategoryNames></PAMDataset>")
    report = run(tmp_path, hsi, labels=[("labels", str(labels))])
    classes = {info.value: info for info in open_scene(report.scenes[0]).classes}
    assert [(value, info.name) for value, info in classes.items()] == [
        (1, "oak"), (2, "pine"), (3, "road"), (9, "class 9")
    ]  # fmt: skip
    assert classes[1].colour == (10, 20, 30) and classes[2].colour == (40, 50, 60)
    assert len({info.colour for info in classes.values()} | {None, (0, 0, 0)}) == 6  # the others got one of their own
    table = [ClassInfo(1, "tree"), ClassInfo(2, "fir", "", (1, 2, 3)), ClassInfo(3, "way"), ClassInfo(9, "rest")]
    scene = open_scene(run(tmp_path, hsi, labels=[("labels", str(labels))], classes=table).scenes[0])
    assert [info.colour for info in scene.classes[:2]] == [(10, 20, 30), (1, 2, 3)]


def test_labels_that_the_mask_of_the_file_leaves_out(tmp_path: Path) -> None:
    hsi = tiff(tmp_path / "hsi.tif", np.random.default_rng(0).integers(1, 99, (4, 5, 3)).astype("uint16"))
    labels = tiff(tmp_path / "gt.tif", np.ones((4, 5), "uint8"))
    with rasterio.open(labels, "r+") as dataset, rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        dataset.write_mask(np.arange(20).reshape(4, 5) > 3)
    scene = open_scene(run(tmp_path, hsi, labels=[("labels", str(labels))]).scenes[0])
    assert np.count_nonzero(scene.read_labels() == 0) == 4


def test_class_names_beside_a_file_are_read_without_entities(tmp_path: Path) -> None:
    labels = tiff(tmp_path / "gt.tif", np.ones((4, 5), "uint8"))
    (tmp_path / "gt.tif.aux.xml").write_text('<!DOCTYPE a [<!ENTITY b "c">]><PAMDataset>&b;</PAMDataset>')
    with pytest.raises(InputDataError, match=r"gt\.tif\.aux\.xml has a document type definition"):
        open_raster(labels)


@pytest.mark.parametrize("tiled", [True, False])
def test_a_tiny_file_that_declares_a_giant_is_refused(tmp_path: Path, tiled: bool) -> None:
    path = tmp_path / "giant.tif"
    with rasterio.open(
        path, "w", driver="GTiff", height=10**6, width=10**6, count=20, dtype="uint32", SPARSE_OK=True, BIGTIFF=True,
        tiled=tiled, blockxsize=16384 if tiled else 10**6, blockysize=16384 if tiled else 1000, **PLACE,
    ):  # fmt: skip
        pass
    for options in ({}, {"labels": [("labels", str(path))]}):
        hsi = path if not options else tiff(tmp_path / "hsi.tif", np.ones((2, 2, 2), "uint8"))
        with pytest.raises(InputDataError, match=r"giant\.tif declares 1000000 x 1000000 pixels with 20 bands and has"):
            run(tmp_path, hsi, **options)
    assert not (tmp_path / "o.zarr").exists()


def test_a_disk_that_is_too_small_is_said_before_a_file_is_read_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hsi = tiff(tmp_path / "hsi.tif", np.ones((4, 5, 3), "uint32"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 50})())
    monkeypatch.setattr("fastdiffclip.scene.convert.row_blocks", lambda source: pytest.fail("it was read"))
    with pytest.raises(ResourceError, match="needs about .* GiB more"):
        run(tmp_path, hsi)


def test_rows_that_no_memory_holds_are_refused(tmp_path: Path) -> None:
    np.lib.format.open_memmap(tmp_path / "wide.npy", "w+", np.uint16, (1, 2**20, 600))  # sparse
    with pytest.raises(InputDataError, match=r"wide\.npy has rows of 1048576 pixels with 600 bands, 1\.17 GiB each"):
        run(tmp_path, tmp_path / "wide.npy")


def test_wavelengths_and_bad_bands_of_an_envi_header_for_any_cube(tmp_path: Path) -> None:
    hsi = tiff(tmp_path / "hsi.tif", np.random.default_rng(0).integers(1, 99, (4, 5, 3)).astype("uint16"))
    lines = ("wavelength = {0.45, 0.55, 0.65}", "wavelength units = Micrometers", "bbl = {1, 1, 0}")
    header = write_envi(tmp_path / "other.img", np.zeros((1, 1, 3), "u1"), *lines)
    modality = open_scene(run(tmp_path, hsi, wavelengths=header, bad_bands=header).scenes[0]).modalities["hsi"]
    assert modality.wavelengths == (450.0, 550.0, 650.0) and modality.bad_bands == (False, False, True)
    header = write_envi(tmp_path / "empty.img", np.zeros((1, 1, 3), "u1"))
    with pytest.raises(InputDataError, match=r"empty\.hdr has no wavelengths"):
        run(tmp_path, hsi, wavelengths=header)
    with pytest.raises(InputDataError, match=r"empty\.hdr has no list of bad bands"):
        run(tmp_path, hsi, bad_bands=header)
