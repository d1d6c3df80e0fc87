"""The whole job with the files of remote sensing: ENVI cube, point cloud, polygons and regions, other grids."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .console import BANDS, HEIGHT, WIDTH, leftovers, tiny

Call = Callable[..., Any]
TRANSFORM = (2.0, 0.0, 3e5, 0.0, -2.0, 4e6)
TURNED = (1.6, 1.2, 3e5, 1.2, -1.6, 4e6)  # by 36.87 degrees, pixels of 2 m


def write_envi(folder: Path, transform: tuple[float, ...] = TRANSFORM) -> None:
    """cube.img and cube.hdr: the cube of the other tests, little by little as float32 with an empty corner."""
    cube = np.load(folder / "cube.npy").astype("<f4")
    cube[0, :5] = -9999
    cube.transpose(2, 0, 1).tofile(folder / "cube.img")
    angle = float(np.degrees(np.arctan2(transform[3], transform[0])))
    (folder / "cube.hdr").write_text(
        f"ENVI\nsamples = {WIDTH}\nlines = {HEIGHT}\nbands = {BANDS}\ndata type = 4\ninterleave = bsq\nbyte order = 0\n"
        f"data ignore value = -9999\nwavelength = {{{', '.join(str(0.4 + 0.05 * i) for i in range(BANDS))}}}\n"
        "wavelength units = Micrometers\n"
        f"map info = {{UTM, 1, 1, 300000, 4000000, 2, 2, 15, North, WGS-84, rotation={angle!r}}}\n"
    )


def write_polygons(folder: Path) -> None:
    """plots.gpkg: the labels of the other tests as named squares."""
    import pyogrio
    import shapely

    boxes, names = [], []
    for strip, name in enumerate(("grass", "road", "roof")):
        for column in (1, 14, 28):
            left, top = 3e5 + 2 * column, 4e6 - 2 * (10 * strip + 3)
            boxes.append(shapely.box(left, top - 8, left + 8, top))
            names.append(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyogrio.raw.write(
            folder / "plots.gpkg", shapely.to_wkb(np.array(boxes)), [np.array(names, object)], ["cover"],
            geometry_type="Polygon", crs="EPSG:32615", driver="GPKG", layer="plots",
        )  # fmt: skip


def write_cloud(folder: Path) -> None:
    """cloud.las: one point in every pixel but one."""
    laspy = pytest.importorskip("laspy")
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    keep = ~((rows == 9) & (columns == 9))
    data = laspy.LasData(laspy.LasHeader(point_format=3, version="1.2"))
    data.header.scales, data.header.offsets = [0.01] * 3, [3e5, 4e6, 0]
    data.x, data.y = 3e5 + 2 * columns[keep] + 1, 4e6 - 2 * rows[keep] - 1
    data.z, data.intensity = 3.0 * (rows[keep] // 10) + 0.1, 100 + rows[keep]
    data.return_number = data.number_of_returns = np.ones(keep.sum(), np.uint8)
    data.write(str(folder / "cloud.las"))


def mapped(call: Call, folder: Path, scene: str = "x.zarr") -> Any:
    """Train on a scene, predict it, and return the opened map."""
    import rasterio

    assert call(["train-flc", scene, "--umd", "none", "--out", "m", *tiny()], folder).code == 0
    result = call(["predict", scene, "--model", "m", "--out", "map.tif", "--json"], folder)
    assert result.code == 0, result.err
    return rasterio.open(folder / "map.tif"), result.json


def test_envi_cube_point_cloud_and_polygons(real: Call, call: Call, files: Path) -> None:
    write_envi(files)
    write_polygons(files)
    write_cloud(files)
    modalities = ["--hsi", "cube.hdr", "--modality", "lidar=cloud.las:height"]
    result = real(["ingest", *modalities, "--labels", "plots.gpkg:cover", "--out", "x.zarr", "--json"], files)
    assert result.code == 0, result.err
    assert result.err.strip() == "warning: cloud.las has no CRS, that of the scene is taken"
    summary = call(["scene", "info", "x.zarr", "--json"], files).json
    assert [item["name"] for item in summary["classes"]] == ["grass", "road", "roof"]
    assert [item["pixels"]["labels"] for item in summary["classes"]] == [48, 48, 48]
    hsi, lidar = summary["modalities"]
    assert hsi["wavelength_range"] == pytest.approx([400, 750]) and hsi["nodata"] == -9999
    assert lidar["valid_percent"] == pytest.approx(100 * (1 - 1 / (HEIGHT * WIDTH)))
    assert {row["file"] for row in summary["sources"]} == {"cube.hdr", "cube.img", "cloud.las", "plots.gpkg"}
    raster, said = mapped(call, files)
    with raster:
        assert raster.crs.to_epsg() == 32615 and tuple(raster.transform)[:6] == TRANSFORM
        values, nodata = raster.read(1), raster.nodata
    assert said["nodata_pixels"] == 6
    assert (values[0, :5] == nodata).all() and values[9, 9] == nodata and np.count_nonzero(values == nodata) == 6


def test_a_turned_envi_cube_gives_a_turned_map(call: Call, files: Path) -> None:
    write_envi(files, TURNED)
    assert call(["ingest", "--hsi", "cube.img", "--labels", "gt.npy", "--out", "x.zarr"], files).code == 0
    raster, _ = mapped(call, files)
    with raster:
        assert raster.crs.to_epsg() == 32615 and tuple(raster.transform)[:6] == pytest.approx(TURNED)


def test_regions_as_official_maps(call: Call, files: Path) -> None:
    write_envi(files)
    labels = np.load(files / "gt.npy")
    for name, half in (("TR", labels[:, :10]), ("VA", labels)):
        lines = [f"; ENVI Output of ROIs (4.8)\n; Number of ROIs: 3\n; File Dimension: {WIDTH} x {HEIGHT}"]
        for value, region in enumerate(("grass", "road", "roof"), 1):
            places = np.argwhere(half == value)
            lines.append(f"; ROI name: {region}\n; ROI rgb value: {{{value}, 9, 9}}\n; ROI npts: {len(places)}")
            lines.append("; ID X Y")
            lines += [f"{i} {column + 1} {row + 1}" for i, (row, column) in enumerate(places, 1)]
        (files / f"{name}.txt").write_text("\n".join(lines))
    maps = ["--labels", "train=TR.txt", "--labels", "test=VA.txt"]
    assert call(["ingest", "--hsi", "cube.hdr", *maps, "--out", "x.zarr"], files).code == 0
    summary = call(["scene", "info", "x.zarr", "--json"], files).json
    assert [(item["name"], item["colour"]) for item in summary["classes"]] == [
        ("grass", [1, 9, 9]), ("road", [2, 9, 9]), ("roof", [3, 9, 9])
    ]  # fmt: skip
    official = ["train-flc", "x.zarr", "--split", "official", "--shots", "all", "--umd", "none", "--out", "m", *tiny()]
    assert call(official, files).code == 0


def write_dsm(folder: Path) -> None:
    import rasterio
    from affine import Affine

    heights = np.repeat(np.repeat(np.arange(HEIGHT) // 10 * 3.0, 2)[:, None], 2 * WIDTH, 1).astype("float32")
    profile = {"height": 2 * HEIGHT, "width": 2 * WIDTH, "count": 1, "dtype": "float32", "crs": "EPSG:32615"}
    with rasterio.open(
        folder / "fine.tif", "w", driver="GTiff", transform=Affine(1, 0, 3e5, 0, -1, 4e6), **profile
    ) as to:
        to.write(heights, 1)


def test_resample_alone_and_with_a_method(call: Call, files: Path) -> None:
    write_envi(files)
    write_dsm(files)
    ingest = ["ingest", "--hsi", "cube.hdr", "--modality", "lidar=fine.tif", "--out", "x.zarr", "--overwrite"]
    refused = call(ingest, files)
    refused.one_sentence(3, "fine.tif: 60 x 80", "cube.img: 30 x 40", "--resample")
    for words, method in (
        (["--resample"], "bilinear"), (["--resample", "average"], "average"), (["--resample", "--json"], "bilinear"),
        (["--resample=nearest"], "nearest"),
    ):  # fmt: skip
        result = call([*ingest, *words], files)
        assert result.code == 0, result.err
        assert f", {method} from 60 x 80 pixels" in result.out
        summary = call(["scene", "info", "x.zarr", "--json"], files).json
        assert summary["resampled"]["modality lidar"]["method"] == method
    wrong = call([*ingest, "--resample", "bilinar"], files)
    wrong.one_sentence(2, "'bilinar' is no way to resample (did you mean 'bilinear'?)")


@pytest.mark.parametrize(("arguments", "words"), [
    (["--hsi", "lost.hdr"], ["lost.hdr", "no data file beside it"]),
    (["--hsi", "lost.img"], ["lost.img", "no ENVI header beside it"]),
    (["--hsi", "huge.hdr"], ["huge.img", "declares 9600000000000000000000"]),
    (["--hsi", "cube.hdr", "--labels", "bad.gpkg:a"], ["bad.gpkg", "is no GeoPackage"]),
    (["--hsi", "cube.hdr", "--labels", "notes.txt"], ["notes.txt", "ROI name"]),
    (["--hsi", "cube.hdr", "--modality", "lidar=bad.las"], ["bad.las", "LASF"]),
    (["--hsi", "bomb-METADATA.XML"], ["bomb-METADATA.XML"]),
])  # fmt: skip
def test_hostile_files_are_one_sentence_and_leave_nothing(
    call: Call, files: Path, arguments: list[str], words: list[str]
) -> None:
    write_envi(files)
    header = (files / "cube.hdr").read_text()
    (files / "lost.hdr").write_text(header)
    (files / "lost.img.txt").write_text("")
    (files / "huge.hdr").write_text(header.replace(f"samples = {WIDTH}", f"samples = {'1' + '0' * 19}"))
    (files / "huge.img").write_bytes(b"0" * 100)
    if arguments[1] == "lost.img":
        (files / "lost.hdr").rename(files / "other.hdr")
        (files / "lost.img").write_bytes(b"0" * 100)
    (files / "bad.gpkg").write_bytes(b"SQL?" * 100)
    (files / "bad.las").write_bytes(b"0" * 1000)
    (files / "notes.txt").write_text("some notes\n")
    (files / "bomb-METADATA.XML").write_text("<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>")
    before = sorted(path.name for path in files.iterdir())
    result = call(["ingest", *arguments, "--out", "x.zarr"], files)
    result.one_sentence(3, *words)
    assert sorted(path.name for path in files.iterdir()) == before and leftovers(files) == []


def test_progress_is_shown_and_an_interrupt_leaves_nothing(interrupt: Call, files: Path) -> None:
    cube = np.lib.format.open_memmap(files / "large.npy", "w+", np.int32, (1800, 400, 100))
    cube[::7] = 3
    stopped = interrupt(["ingest", "--hsi", "large.npy", "--out", "x.zarr"], files, "range of values")
    assert stopped.code == 130 and leftovers(files) == [] and not (files / "x.zarr").exists()
    stopped = interrupt(["ingest", "--hsi", "large.npy", "--out", "x.zarr"], files, r" [1-8]\d/100 .* x: hsi")
    assert stopped.code == 130 and leftovers(files) == [] and not (files / "x.zarr").exists()
