"""Raster readers: what they read, and one clear sentence for what they cannot."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.readers import expand, open_raster
from fastdiffclip.scene.readers.source import RasterSource

from .readers.damage import Canary

TRANSFORM = rasterio.Affine(0.5, 0, 404023, 0, -0.5, 3284961)
REAL_DTYPES = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"]


def write_tiff(path: Path, cube: np.ndarray, **profile: object) -> None:
    """Write (H, W, bands) as GeoTIFF with a CRS, unless the profile says otherwise."""
    height, width, bands = cube.shape
    options = {"crs": "EPSG:32617", "transform": TRANSFORM, **profile}
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=bands, dtype=cube.dtype, **options
    ) as dataset:
        dataset.write(np.moveaxis(cube, -1, 0))


def whole(source: RasterSource) -> np.ndarray:
    """Read a raster two rows at a time."""
    starts = range(0, source.height, 2)
    return np.concatenate([source.read_rows(slice(r, min(r + 2, source.height))) for r in starts])


@settings(max_examples=30, deadline=None)
@given(
    cube=st.sampled_from([d for d in REAL_DTYPES if d not in ("bool", "int8")]).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            hnp.array_shapes(min_dims=3, max_dims=3, max_side=6),
            elements={"allow_nan": False} if "f" in dtype else None,
        )
    ),
    tiled=st.booleans(),
)
def test_geotiff_round_trip(tmp_path_factory: pytest.TempPathFactory, cube: np.ndarray, tiled: bool) -> None:
    path = tmp_path_factory.mktemp("tif") / "x.tif"
    tiles = {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"} if tiled else {}
    write_tiff(path, cube, **tiles)
    with open_raster(path) as source:
        assert (source.height, source.width, source.bands) == cube.shape
        assert source.dtype == cube.dtype
        np.testing.assert_array_equal(whole(source), cube)


@settings(max_examples=30, deadline=None)
@given(
    cube=st.sampled_from(REAL_DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=2, max_dims=3, max_side=6))
    ),
    fortran=st.booleans(),
    zipped=st.booleans(),
)
def test_numpy_round_trip(
    tmp_path_factory: pytest.TempPathFactory, cube: np.ndarray, fortran: bool, zipped: bool
) -> None:
    folder = tmp_path_factory.mktemp("npy")
    array = np.asfortranarray(cube) if fortran else cube
    if zipped:
        np.savez_compressed(folder / "x.npz", cube=array, other=np.ones(3))
        source = open_raster(folder / "x.npz")
    else:
        np.save(folder / "x.npy", array)
        source = open_raster(folder / "x.npy")
    with source:
        np.testing.assert_array_equal(whole(source), cube.reshape(*cube.shape[:2], -1))
        assert source.crs_wkt is None and source.affine_transform is None


def test_geotiff_hands_over_what_it_knows(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    write_tiff(path, np.ones((3, 4, 2), np.int16), nodata=-9999)
    with rasterio.open(path, "r+") as dataset:
        dataset.scales, dataset.offsets = (1e-4, 1e-4), (0.5, 0.5)
        dataset.update_tags(1, wavelength="0.4505", wavelength_units="Micrometers", fwhm="0.01")
        dataset.update_tags(2, wavelength="0.851", wavelength_units="Micrometers", fwhm="0.02")
    with open_raster(path) as source:
        assert source.wavelengths == (450.5, 851.0) and source.fwhm == (10.0, 20.0)
        assert (source.nodata, source.scale, source.offset) == (-9999, 1e-4, 0.5)
        assert source.affine_transform == tuple(TRANSFORM)[:6]
        assert rasterio.CRS.from_wkt(source.crs_wkt).to_epsg() == 32617
        assert source.crs_wkt.startswith("PROJCRS")  # WKT2


def test_geotiff_wavelengths_from_descriptions(tmp_path: Path) -> None:
    for name, descriptions, expected in (
        ("a", ["Band 1 (450.5 nm)", "851 nanometers"], (450.5, 851.0)),
        ("b", ["0.45 um", "0.851 µm"], (450.0, 851.0)),
        ("c", ["Band 1", "Band 2"], None),
        ("d", ["450 nm", "red"], None),
    ):
        write_tiff(tmp_path / f"{name}.tif", np.ones((1, 1, 2), np.int16))
        with rasterio.open(tmp_path / f"{name}.tif", "r+") as dataset:
            dataset.descriptions = descriptions
        with open_raster(tmp_path / f"{name}.tif") as source:
            assert source.wavelengths == expected


def test_geotiff_bands_of_different_scale_become_physical(tmp_path: Path) -> None:
    write_tiff(tmp_path / "x.tif", np.full((2, 2, 2), 10, np.int16))
    with rasterio.open(tmp_path / "x.tif", "r+") as dataset:
        dataset.scales, dataset.offsets = (0.5, 2.0), (0.0, 1.0)
    with open_raster(tmp_path / "x.tif") as source:
        assert (source.dtype, source.scale, source.offset) == (np.float32, 1.0, 0.0)
        np.testing.assert_array_equal(whole(source)[0, 0], [5.0, 21.0])


def test_geotiff_mask_colours_and_category_names(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    write_tiff(path, np.array([[[1], [2]]], np.uint8))
    with rasterio.open(path, "r+") as dataset:
        dataset.write_colormap(1, {1: (10, 20, 30, 255), 2: (40, 50, 60, 255)})
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            dataset.write_mask(np.array([[True, False]]))
    (tmp_path / "x.tif.aux.xml").write_text(
        "<PAMDataset><PAMRasterBand band='1'><CategoryNames><Category></Category><Category>oak</Category>"
        "<Category>pine</Category></CategoryNames></PAMRasterBand></PAMDataset>"
    )
    with open_raster(path) as source:
        assert source.class_names == {1: "oak", 2: "pine"}
        assert source.class_colours[2] == (40, 50, 60)
        assert source.read_mask is not None
        np.testing.assert_array_equal(source.read_mask(slice(0, 1)), [[True, False]])


def test_geotiff_without_georeference_is_silent(tmp_path: Path) -> None:
    array = np.ones((2, 2, 1), np.uint8)
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        write_tiff(tmp_path / "x.tif", array, crs=None, transform=None)
    with open_raster(tmp_path / "x.tif") as source:
        assert source.crs_wkt is None and source.affine_transform is None


def test_missing_variable_lists_what_is_there(tmp_path: Path) -> None:
    arrays = {"cube": np.ones((3, 4, 5), np.int16), "gt": np.ones((3, 4), np.uint8)}
    scipy.io.savemat(tmp_path / "x.mat", arrays)
    np.savez(tmp_path / "x.npz", **arrays)
    for name in ("x.mat", "x.npz"):
        with pytest.raises(InputDataError, match=r"no variable 'HSI'; it holds cube \(3 x 4 x 5 int16\), gt \(3 x 4"):
            open_raster(tmp_path / name, "HSI")
        with pytest.raises(InputDataError, match=r"say which variable to read, as in x\.\w+:cube"):
            open_raster(tmp_path / name)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.95])
@pytest.mark.parametrize("suffix", [".mat", ".npy", ".npz", ".tif", ".tiff"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"x{suffix}"
    cube = np.random.default_rng(0).integers(0, 9999, (40, 30, 20)).astype(np.uint16)
    if suffix == ".mat":
        scipy.io.savemat(path, {"cube": cube})
    elif suffix == ".npy":
        np.save(path, cube)
    elif suffix == ".npz":
        np.savez(path, cube=cube)
    else:
        write_tiff(path, cube)
    os.truncate(path, max(1, int(path.stat().st_size * share)))
    with pytest.raises(InputDataError, match=r"x\.\w+.*(truncated|damaged)"), open_raster(path) as source:
        whole(source)


@pytest.mark.parametrize("suffix", [".mat", ".npy", ".npz", ".tif", ".tiff"])
def test_empty_and_garbage_files_are_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"empty{suffix}").touch()
    with pytest.raises(InputDataError, match="is empty"):
        open_raster(tmp_path / f"empty{suffix}")
    (tmp_path / f"text{suffix}").write_text("this is not a raster at all\n" * 50)
    with pytest.raises(InputDataError, match=f"text{suffix} cannot be read"):
        open_raster(tmp_path / f"text{suffix}")


def test_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "cube.xyz").write_text("x")
    (tmp_path / "folder.tif").mkdir()
    for name in ("cube.xyz", "folder.tif"):
        with pytest.raises(InputDataError, match=r"give one of \.mat, \.tif, \.tiff, \.npy, \.npz"):
            open_raster(tmp_path / name)
    with pytest.raises(InputDataError, match="there is no file"):
        open_raster(tmp_path / "nothing.tif")


def test_pickled_objects_are_never_run(tmp_path: Path) -> None:
    bird = tmp_path / "sang"
    objects = np.array([[Canary(bird)]], object)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "b.npz", allow_pickle=True, cube=objects)
    (tmp_path / "c.npy").write_bytes(pickle.dumps(objects))
    for name, variable in (("a.npy", None), ("b.npz", "cube"), ("c.npy", None)):
        with pytest.raises(InputDataError, match="Python objects"):
            open_raster(tmp_path / name, variable)
        assert not bird.exists()
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert bird.exists()  # the canary does sing when somebody lets it


def test_npz_that_promises_more_than_it_holds_is_refused_before_allocation(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (2**20, 2**20, 2**10)}
    )
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("cube.npy", header.getvalue() + b"0" * 100)
    with pytest.raises(InputDataError, match=r"declares \d+ bytes and holds"):
        open_raster(tmp_path / "x.npz")


@pytest.mark.parametrize(("array", "message"), [
    (np.ones(3), r"has shape \(3,\)"),
    (np.ones((1, 2, 3, 4)), r"has shape \(1, 2, 3, 4\)"),
    (np.ones((0, 4)), r"has shape \(0, 4\)"),
    (np.ones((2, 2)) * 1j, "holds complex128"),
    (np.array([["a"]]), "holds <U1"),
    (np.zeros((2, 2), "f4,f4"), "Python objects|holds"),
])  # fmt: skip
def test_arrays_that_are_no_rasters(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputDataError, match=message):
        open_raster(tmp_path / "x.npy")


def test_variables_where_there_are_none(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 2)))
    write_tiff(tmp_path / "x.tif", np.ones((2, 2, 1)))
    for name in ("x.npy", "x.tif"):
        with pytest.raises(InputDataError, match="leave out ':HSI'"):
            open_raster(tmp_path / name, "HSI")


def test_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.mat", "a:b.mat", "p10.tif", "p9.tif", "p9.txt", "odd[1].tif"):
        Path(name).touch()
    assert expand("a.mat:HSI") == ([Path("a.mat")], "HSI")
    assert expand("a.mat") == ([Path("a.mat")], None)
    assert expand("a:b.mat") == ([Path("a:b.mat")], None)
    assert expand("a:b.mat:HSI") == ([Path("a:b.mat")], "HSI")
    assert expand("p*.tif") == ([Path("p9.tif"), Path("p10.tif")], None)
    assert expand("*.mat:HSI") == ([Path("a.mat"), Path("a:b.mat")], "HSI")
    assert expand("odd[1].tif") == ([Path("odd[1].tif")], None)
    assert expand("a.mat:hsi.Lidar{1}.z") == ([Path("a.mat")], "hsi.Lidar{1}.z")
    with pytest.raises(InputDataError, match=r"there is no file b\.mat"):
        expand("b.mat:HSI")
    with pytest.raises(InputDataError, match=r"no file matches q\*\.tif"):
        expand("q*.tif")
    with pytest.raises(InputDataError, match=r"there is no file C:\\x.mat"):
        expand("C:\\x.mat")


def test_specs_whose_variable_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.h5", "b.h5"):
        Path(name).touch()
    for name in ("s.zarr", "plots"):
        Path(name).mkdir()
    Path("s.zarr/zarr.json").touch()
    Path("plots/c:d.h5").touch()
    assert expand("a.h5:/group/cube") == ([Path("a.h5")], "/group/cube")
    assert expand("*.h5:group/cube@byx") == ([Path("a.h5"), Path("b.h5")], "group/cube@byx")
    assert expand("a.h5:/odd:name/x") == ([Path("a.h5")], "/odd:name/x")
    assert expand("s.zarr:group/hsi") == ([Path("s.zarr")], "group/hsi")
    assert expand("plots/c:d.h5") == ([Path("plots/c:d.h5")], None)
    assert expand("plots/c:d.h5:/x/y") == ([Path("plots/c:d.h5")], "/x/y")
    for spec, missing in {
        "none.h5:/a/b": "none.h5",
        "plots:2020/a.tif": "plots:2020/a.tif",  # a folder holds no variables
        "C:/x/y.tif": "C:/x/y.tif",
        "a.h5:": "a.h5:",
    }.items():
        with pytest.raises(InputDataError, match=f"there is no file {missing}: check the name"):
            expand(spec)
