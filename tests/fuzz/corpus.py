"""What is damaged: small inputs of every kind, and how each is read.

An entry writes its files into an empty folder, and ``folder / main`` is what is read. Numbers are fixed, so that a
case is the same wherever it runs; where a library writes the time into a file, only that differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fastdiffclip.scene.bands import read_bad_bands, read_wavelengths
from fastdiffclip.scene.convert import require_readable_rows, row_blocks
from fastdiffclip.scene.georeference import Grid
from fastdiffclip.scene.labels import read_class_table, read_label_map
from fastdiffclip.scene.readers import expand, open_raster
from fastdiffclip.scene.readers.source import RasterSource

from . import files
from .files import BANDS, HEIGHT, TRANSFORM, WIDTH, cube

BLOCKS = 4  # of a raster that are read; a damaged header may well declare thousands
Reader = Callable[[Path], None]


@dataclass(frozen=True)
class Entry:
    """One input: its main file, how to write and read it, and whether it can be a modality of a scene as it is."""

    name: str
    main: str
    write: Callable[[Path], None]
    read: Reader
    ingested: bool = False


def grid() -> Grid:
    """The grid that labels and points are laid on."""
    from rasterio.crs import CRS

    return Grid("hsi", Path("hsi.tif"), HEIGHT, WIDTH, CRS.from_epsg(32617).to_wkt(), TRANSFORM)


def found(path: Path) -> Path:
    """The file, as an ingest looks for it."""
    return expand(str(path))[0][0]


def read_source(source: RasterSource) -> None:
    """Read the first blocks and the last one, with their masks, as an ingest would."""
    require_readable_rows(source)
    blocks = row_blocks(source)
    rows = [part for part, _ in zip(blocks, range(BLOCKS), strict=False)]
    last = slice(source.height - 1, source.height)
    for part in [*rows, *([last] if rows[-1].stop < source.height else [])]:
        block = source.read_rows(part)
        wanted = (part.stop - part.start, source.width, source.bands)
        assert block.shape == wanted and block.dtype == source.dtype, (block.shape, block.dtype, wanted, source.dtype)
        if source.read_mask is not None:
            mask = source.read_mask(part)
            assert mask.shape == wanted[:2] and mask.dtype == bool, (mask.shape, mask.dtype)


def raster(variable: str | None = None) -> Reader:
    """A reader of a raster's rows; one of labels as well where there is one band."""

    def read(path: Path) -> None:
        with open_raster(path, variable) as source:
            read_source(source)
            if source.bands == 1:
                read_label_map(source)

    return read


def polygons(variable: str | None) -> Reader:
    """A reader of polygons burnt into a map."""

    def read(path: Path) -> None:
        from fastdiffclip.scene.vectors import read_polygons

        assert read_polygons(found(path), variable, grid()).values.shape == (HEIGHT, WIDTH)

    return read


def read_regions(path: Path) -> None:
    from fastdiffclip.scene.rois import read_rois

    assert read_rois(found(path), None, grid()).values.shape == (HEIGHT, WIDTH)


def read_points(path: Path) -> None:
    from fastdiffclip.scene.readers.points import open_points

    with open_points(found(path), None, grid()) as source:
        read_source(source)


def read_stored_scene(path: Path) -> None:
    from fastdiffclip.scene.store import open_scene, scene_summary, verify_scene

    verify_scene(path)
    scene = open_scene(path)
    scene_summary(scene)
    for name in scene.modalities:
        scene.read(name)


def read_exams(path: Path) -> None:
    from fastdiffclip.scene.mrnet import MrnetLayout, _find_exams, read_volume

    layout = MrnetLayout(window=3, slices=2, block=2)
    for exam in _find_exams(path, "acl")[0]:
        for volume in exam.volumes.values():
            assert read_volume(volume, layout).shape == (3, 3, layout.channels)


CLASSES = 'value,name,description,colour\n1,oak,"a tree, broad",#00aa00\n2,road,,#888888\n0,unlabelled,,\n'
PROMPTS = "oak: 'A broad tree: green.'\nroad: >-\n  A grey\n  strip.\n7: Deep water.\n"
WAVES = "band,wavelength,fwhm\n1,400.5,5\n2,500,5\n3,600,5\n4,700,5\n5,800.25,5\n"
ENMAP = "ENMAP01-____L2A-DT0000001867_20220724T104526Z_008_V010302_20230628T165614Z-METADATA.XML"
COLOURS = {1: (0, 200, 0, 255), 2: (200, 0, 0, 255)}
TILES = {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate", "predictor": 3}
CHUNKS = {"chunks": (4, 5, 2), "compression": "gzip", "shuffle": True, "fletcher32": True}


def entries() -> list[Entry]:
    """Every kind of input."""
    return [*arrays(), *rasters(), *matlab(), *stores(), *products(), *labels(), *others()]


def arrays() -> list[Entry]:
    turned, archive = np.asfortranarray(cube(">f8")), {"cube": cube(), "gt": cube()[..., 0], "note": np.array("text")}
    return [
        Entry("npy", "a.npy", partial(files.write_npy, array=cube()), raster(), True),
        Entry("npy-fortran-v2", "a.npy", partial(files.write_npy, array=turned, version=(2, 0)), raster()),
        Entry("npz", "a.npz", partial(np.savez, **archive), raster("cube")),
        Entry("npz-deflate", "a.npz", partial(np.savez_compressed, **archive), raster("gt")),
    ]


def rasters() -> list[Entry]:
    write, envi = files.write_tiff, files.write_envi
    names = "band names = {a, b, c, d, e}\n"
    return [
        Entry("tif", "a.tif", partial(write, array=cube(), nodata=3), raster(), True),
        Entry("tif-tiles", "a.tif", partial(write, array=cube("float32"), **TILES), raster()),
        Entry("tif-lzw", "a.tif", partial(write, array=cube("int16"), compress="lzw", interleave="band"), raster()),
        Entry("tif-palette", "a.tif", partial(write, array=cube("uint8")[..., :1], colours=COLOURS), raster()),
        Entry("envi-bsq", "a.hdr", partial(envi, interleave="bsq", order=0), raster(), True),
        Entry("envi-bil", "a.hdr", partial(envi, interleave="bil", order=1), raster()),
        Entry("envi-bip", "a.hdr", partial(envi, interleave="bip", order=0, more=names), raster()),
    ]


def matlab() -> list[Entry]:
    write, nested = files.write_mat, {"hsi": files.nested()}
    plain = {"HSI": cube(), "name": "text"}
    return [
        Entry("mat", "a.mat", partial(write, compressed=False, variables=plain), raster("HSI")),
        Entry(
            "mat-deflate", "a.mat", partial(write, compressed=True, variables={"HSI": cube("float64")}), raster(), True
        ),
        Entry("mat-struct", "a.mat", partial(write, compressed=False, variables=nested), raster("hsi.Lidar{1}.z")),
        Entry(
            "mat-nested", "a.mat", partial(write, compressed=True, variables=nested), raster("hsi.sceneLabels.labels")
        ),
        Entry("mat-7.3", "a.mat", partial(files.write_hdf5, matlab=True), raster("cube")),
        Entry("mat-7.3-struct", "a.mat", files.write_struct_73, raster("hsi.Lidar{1}.z")),
    ]


def stores() -> list[Entry]:
    return [
        Entry("hdf5", "a.h5", files.write_hdf5, raster("data/cube")),
        Entry("hdf5-chunks", "a.h5", partial(files.write_hdf5, **CHUNKS), raster("data/cube")),
        Entry("netcdf3", "a.nc", files.write_netcdf3, raster("reflectance")),
        Entry("netcdf4", "a.nc", files.write_netcdf4, raster(), True),
        Entry("zarr-2", "a.zarr", partial(files.write_zarr, form=2), raster("cube")),
        Entry("zarr-3", "a.zarr", partial(files.write_zarr, form=3), raster(), True),
        Entry("zarr-zip", "a.zip", partial(files.write_zarr, form=3, zipped=True), raster("cube")),
        Entry("scene", "a.zarr", files.write_scene, read_stored_scene),
    ]


def products() -> list[Entry]:
    return [
        Entry("emit", "a.nc", files.write_emit, raster(), True),
        Entry("prisma", "a.he5", files.write_prisma, raster(), True),
        Entry("enmap", ENMAP, files.write_enmap, raster("cloud"), True),
    ]


def labels() -> list[Entry]:
    return [
        Entry("geojson", "a.geojson", files.write_geojson, polygons("class")),
        Entry("geopackage", "a.gpkg", partial(files.write_vector, driver="GPKG"), polygons("class")),
        Entry("shapefile", "a.shp", partial(files.write_vector, driver="ESRI Shapefile"), polygons("class")),
        Entry("envi-rois", "a.txt", files.write_rois, read_regions),
    ]


def others() -> list[Entry]:
    flags = "0\n1\n0\n0\n1\n"
    return [
        Entry("las", "a.las", files.write_points, read_points),
        Entry("laz", "a.laz", files.write_points, read_points),
        Entry("mrnet", "exams", files.write_exams, read_exams),
        Entry(
            "classes", "a.csv", partial(files.write_text, content=CLASSES), lambda path: void(read_class_table(path))
        ),
        Entry("prompts", "a.yaml", partial(files.write_text, content=PROMPTS), read_prompts),
        Entry("wavelengths", "a.csv", partial(files.write_text, content=WAVES), read_waves),
        Entry(
            "bad-bands",
            "a.txt",
            partial(files.write_text, content=flags),
            lambda path: void(read_bad_bands(path, BANDS)),
        ),
    ]


def read_prompts(path: Path) -> None:
    from fastdiffclip.model.prompts import ClassText, resolve_prompts

    assert len(resolve_prompts(str(path), [ClassText(1, "oak"), ClassText(2, "road")], ["hsi"])) == 2


def read_waves(path: Path) -> None:
    read_wavelengths(str(path), BANDS)


def void(_: object) -> None:
    """Drop a result."""
