"""Writes the small, whole files that are then damaged, one function per format."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

HEIGHT, WIDTH, BANDS = 7, 9, 5
TRANSFORM = (1.0, 0.0, 500000.0, 0.0, -1.0, 4100000.0)


def cube(dtype: str = "uint16") -> np.ndarray:
    """A raster (7, 9, 5)."""
    return np.random.default_rng(7).integers(1, 200, (HEIGHT, WIDTH, BANDS)).astype(dtype)


def write_npy(path: Path, array: np.ndarray, version: tuple[int, int] = (1, 0)) -> None:
    with path.open("wb") as stream:
        np.lib.format.write_array(stream, array, version)


def write_tiff(path: Path, array: np.ndarray, **options: Any) -> None:
    import rasterio

    planes = np.moveaxis(array, -1, 0)
    colours = options.pop("colours", None)
    profile = {"driver": "GTiff", "crs": "EPSG:32617", "transform": rasterio.Affine(*TRANSFORM), **options}
    with rasterio.open(
        path, "w", height=array.shape[0], width=array.shape[1], count=len(planes), dtype=array.dtype, **profile
    ) as dataset:
        dataset.write(planes)
        if colours:
            dataset.write_colormap(1, colours)
    if colours:
        names = "".join(f"<Category>{name}</Category>" for name in ("", "oak", "road"))
        band = f'<PAMRasterBand band="1"><CategoryNames>{names}</CategoryNames></PAMRasterBand>'
        write_text(path.with_name(f"{path.name}.aux.xml"), f"<PAMDataset>{band}</PAMDataset>")


def write_mat(path: Path, compressed: bool, variables: dict[str, Any]) -> None:
    import scipy.io

    scipy.io.savemat(path, variables, do_compression=compressed)


def nested() -> dict[str, Any]:
    """A struct with a cell of structs, as MUUFL's."""
    cells = np.empty((1, 2), object)
    for place in range(2):
        cells[0, place] = {"z": cube("float32")[..., :1], "info": "flight"}
    return {
        "Data": cube("float64"), "info": {"wavelength": np.linspace(400, 900, BANDS)}, "Lidar": cells,
        "sceneLabels": {"labels": (cube() % 3).astype("int8")[..., 0]},
    }  # fmt: skip


def write_hdf5(path: Path, matlab: bool = False, **options: Any) -> None:
    import h5py

    with h5py.File(path, "w", userblock_size=512 if matlab else 0) as file:
        group = file if matlab else file.create_group("data")
        values = cube("float32").transpose(2, 1, 0) if matlab else cube()
        array = group.create_dataset("cube", data=values, **options)
        array.attrs["units"], array.attrs["_FillValue"] = "1", values.dtype.type(3)
        if matlab:
            array.attrs["MATLAB_class"] = np.bytes_("single")
        waves = np.linspace(400, 900, BANDS)
        group.create_dataset("wavelength", data=waves[:, np.newaxis] if matlab else waves)
    if matlab:
        data = path.read_bytes()
        path.write_bytes(b"MATLAB 7.3 MAT-file, made for a test".ljust(124) + b"\x00\x02IM" + data[128:])


def write_netcdf3(path: Path) -> None:
    import scipy.io

    with scipy.io.netcdf_file(path, "w") as file:
        for name, size in (("band", BANDS), ("y", HEIGHT), ("x", WIDTH)):
            file.createDimension(name, size)
            file.createVariable(name, "f8", (name,))[:] = np.arange(size) * 1.0
        variable = file.createVariable("reflectance", "f4", ("band", "y", "x"))
        variable[:] = cube("float32").transpose(2, 0, 1)
        variable.scale_factor, variable._FillValue = 0.5, np.float32(-1)


def write_netcdf4(path: Path) -> None:
    from ..scene.readers.test_netcdf import scene
    from ..scene.readers.test_netcdf import write_netcdf4 as write

    write(path, scene())


def write_struct_73(path: Path) -> None:
    from ..scene.readers.matlab73_files import write_matlab73
    from ..scene.readers.test_matlab import gulfport

    write_matlab73(path, gulfport())


def write_emit(path: Path) -> None:
    from ..scene.readers.test_emit import write_emit as write

    write(path)


def write_prisma(path: Path) -> None:
    from ..scene.readers.test_prisma import write_prisma as write

    write(path)


def write_enmap(path: Path) -> None:
    from ..scene.readers.test_enmap import product

    product(path.parent)


def write_zarr(path: Path, form: int, zipped: bool = False) -> None:
    import zarr

    place = path.with_suffix(".folder") if zipped else path
    group = zarr.create_group(place, zarr_format=form)
    names = {"dimension_names": ["y", "x", "band"]} if form == 3 else {}
    array = group.create_array("cube", shape=cube().shape, chunks=(4, 5, BANDS), dtype="uint16", **names)
    array[:] = cube()
    array.attrs["wavelength"] = [400.0, 500.0, 600.0, 700.0, 800.0]
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(place.rglob("*")):
                if file.is_file():
                    archive.write(file, file.relative_to(place).as_posix())
        for file in sorted(place.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        place.rmdir()


def write_envi(path: Path, interleave: str, order: int, more: str = "") -> None:
    axes = {"bsq": (2, 0, 1), "bil": (0, 2, 1), "bip": (0, 1, 2)}[interleave]
    values = cube("int16").transpose(axes).astype(np.dtype("int16").newbyteorder("<>"[order]))
    path.with_suffix(".img").write_bytes(bytes(16) + values.tobytes())
    path.write_text(
        f"ENVI\ndescription = {{made\n for a test}}\nsamples = {WIDTH}\nlines = {HEIGHT}\nbands = {BANDS}\n"
        f"header offset = 16\nfile type = ENVI Standard\ndata type = 2\ninterleave = {interleave}\n"
        f"byte order = {order}\nwavelength units = Nanometers\nwavelength = {{400, 500, 600, 700.5, 800}}\n"
        f"fwhm = {{5, 5, 5, 5, 5}}\nbbl = {{1, 1, 0, 1, 1}}\ndata ignore value = -9999\n"
        f"map info = {{UTM, 1, 1, 500000, 4100000, 1, 1, 17, North, WGS-84, units=Meters}}\n{more}",
        encoding="utf-8",
    )


def write_geojson(path: Path) -> None:
    ring = [[500001, 4099999], [500005, 4099999], [500005, 4099995], [500001, 4099995], [500001, 4099999]]
    features = [
        {"type": "Feature", "properties": {"class": name}, "geometry": {"type": "Polygon", "coordinates": [shifted]}}
        for name, shifted in (("oak", ring), ("pine", [[x + 2, y] for x, y in ring]))
    ]
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32617"}}
    path.write_text(json.dumps({"type": "FeatureCollection", "crs": crs, "features": features}, indent=1))


def write_vector(path: Path, driver: str) -> None:
    import pyogrio.raw
    import shapely

    boxes = [shapely.box(500001 + i, 4099995, 500005 + i, 4099999) for i in (0, 2)]
    pyogrio.raw.write(
        path, shapely.to_wkb(np.array(boxes)), [np.array(["oak", "pine"], object)], ["class"], driver=driver,
        geometry_type="Polygon", crs="EPSG:32617",
    )  # fmt: skip


def write_rois(path: Path) -> None:
    lines = [f"; ENVI Output of ROIs (4.8)\n; Number of ROIs: 2\n; File Dimension: {WIDTH} x {HEIGHT}\n;"]
    for name, points in (("grass_healthy", 3), ("tree", 2)):
        lines.append(f"; ROI name: {name}\n; ROI rgb value: {{0, 205, 0}}\n; ROI npts: {points}\n;")
    lines.append(";    ID     X    Y")
    lines += [f"{number:7} {x:5} {y:4}" for number, x, y in ((1, 3, 2), (2, 4, 2), (3, 5, 2), (1, 7, 6), (2, 8, 6))]
    path.write_text("\n".join(lines) + "\n")


def write_points(path: Path) -> None:
    import laspy

    header = laspy.LasHeader(point_format=3, version="1.2")
    header.scales, header.offsets = np.full(3, 0.01), np.array([500000.0, 4099990.0, 0.0])
    cloud = laspy.LasData(header)
    rng = np.random.default_rng(3)
    cloud.x, cloud.y, cloud.z = 500000 + 9 * rng.random(60), 4099993 + 7 * rng.random(60), 5 * rng.random(60)
    cloud.intensity, cloud.return_number = rng.integers(0, 900, 60), np.ones(60, np.uint8)
    cloud.write(path)


def write_scene(path: Path) -> None:
    from fastdiffclip.scene.store import ClassInfo
    from fastdiffclip.scene.writer import SceneWriter

    with SceneWriter(path, height=HEIGHT, width=WIDTH, affine_transform=TRANSFORM) as writer:
        writer.add_modality("hsi", cube(), bands=BANDS, dtype="uint16", wavelengths=(400, 500, 600, 700, 800))
        writer.add_labels("labels", cube()[..., 0] % 2)
        writer.set_classes([ClassInfo(1, "oak", "a tree", (0, 90, 0))])


def write_exams(path: Path) -> None:
    for plane in ("axial", "coronal", "sagittal"):
        (path / "train" / plane).mkdir(parents=True)
        for number in range(2):
            write_npy(path / "train" / plane / f"{number:04}.npy", cube("uint8").transpose(2, 0, 1) + number)
    (path / "train-acl.csv").write_text("0000,1\n0001,0\n")


def write_text(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")
